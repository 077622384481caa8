"""Kernels that start before the kernel in front has ended (kernels/early.py), in the interpreter.

Until a program waits, lengths, paddings, numbers of caches and pages hold anything here; results are NaN. What it does
before must not show, and must not leave the caches. On a GPU test_gpu_kvcache.py has graphs in which all of these are
written in front.
"""

from __future__ import annotations

import importlib
import random
import sys
import zlib

import numpy as np
import pytest
import torch
from test_kvcache import Case, Decoding, check_decoding, places_of
from torch import Tensor

from flash_attn_plus import gpu, plan
from flash_attn_plus.plan import DecodePlan, DecodeRow

pytest.importorskip("triton", reason="the kernels do not run: Triton is not installed")
arguments, early = (importlib.import_module(f"flash_attn_plus.kernels.{name}") for name in ("arguments", "early"))

_RAGGED = {"lengths": (140, 0, 7, 60, 1, 33), "capacity": 150, "dim": 24}
CASES = [
    Case("line", **_RAGGED),
    Case("line_leftpad", leftpad=(20, 0, 7, 3, 0, 32), batch_idx=(5, 0, 3, 3, 7, 1), caches=8, **_RAGGED),
    Case("line_window", window=(40, -1), seqlen_new=2, dim_v=8, **_RAGGED),
    *(Case(f"line_pages_{n}", page_size=n, **_RAGGED) for n in (3, 4, 16, 48)),
    Case("equal", (140,), capacity=150, dim=24),
    Case("equal_two", (140, 33), capacity=150, dim=40, num_splits=3, layout="heads_first"),
    Case("equal_leftpad", (70,), capacity=80, dim=16, leftpad=(37,), batch_idx=(2,), caches=3, heads=4, heads_k=2),
    Case("equal_window", (140,), capacity=150, dim=24, window=(70, 0), seqlen_q=2),
    *(Case(f"equal_pages_{n}", (140,), capacity=150, dim=24, page_size=n) for n in (3, 4, 16, 48)),
    Case("whole", (140, 20), capacity=150, dim=24, num_splits=1),
]
WRONG = (-(2**31), -1, 0, 1, 5, 17, 33, 64, 149, 150, 200, 2**20, 2**31 - 1)


class InFront:
    """The kernel in front of every program: it has ended where the program has waited."""

    def __init__(self, problem: Decoding) -> None:
        self.problem, self.results, self.before, self.turns = problem, [], [], 0
        cache = problem.cache
        lists = (cache.cache_seqlens, cache.cache_batch_idx, cache.cache_leftpad, cache.block_table)
        self.lists = [(x, x.clone()) for x in lists if x is not None]
        self.random = random.Random(zlib.crc32(repr(problem.q.shape).encode()))
        self.asked: list[tuple[np.ndarray, int]] = []
        self.lies = True

    def begin(self) -> None:
        for x, _ in self.lists if self.lies else ():
            x.copy_(torch.tensor(self.random.choices(WRONG, k=x.numel()), dtype=torch.int32).view(x.shape))

    def end(self) -> None:
        for x, right in self.lists:
            x.copy_(right)

    # What stands in the place of the functions of early.py

    def let_next_start(self, EARLY) -> None:
        told = sys._getframe(1).f_locals
        if any(getattr(told.get(name), "value", told.get(name)) for name in ("AHEAD", "FIRST")):
            self.begin()  # it is the first thing that a program does

    def wait(self, x, EARLY) -> None:
        assert (np.asarray(x.handle.data) >= 0).all()
        self.end()

    def number_of_turns(self, EARLY) -> int:
        self.begin()
        self.before = [x.clone() for x in self.results]
        return 2

    def turn(self, number, EARLY) -> bool:
        if int(number) > 0:
            for x, before in zip(self.results, self.before, strict=True):
                assert torch.equal(x.view(torch.uint8), before.view(torch.uint8)), "written before the wait"
            self.end()
            self.turns += 1
        return int(number) > 0

    def ask(self, row_ptrs, exist, DIM) -> None:
        rows = np.asarray(row_ptrs.handle.data).astype(np.int64)
        asked = np.broadcast_to(np.asarray(exist.handle.data), rows.shape)
        self.asked.append((rows[asked], int(getattr(DIM, "value", DIM))))


@pytest.fixture
def run(device: str, monkeypatch: pytest.MonkeyPatch):
    """decode with kernels that start early: (out, lse), and what was in front of them."""
    if device != "cpu":
        pytest.skip("here the interpreter stands for the GPU")
    import interpreter

    interpreter.install()
    empty = arguments.empty

    def decode(problem: Decoding, tile: DecodePlan, lies: bool = True) -> tuple[tuple[Tensor, Tensor], InFront]:
        front = InFront(problem)
        front.lies = lies

        def poisoned(*results):
            front.results = [x if x is None else x.fill_(float("nan")) for x in empty(*results)]
            found, front.results = front.results, [x for x in front.results[:2] if x is not None]
            return found

        monkeypatch.setattr(arguments, "empty", poisoned)
        monkeypatch.setattr(plan, "decode", lambda *problem: DecodeRow(tile, tile))
        monkeypatch.setattr(plan, "is_alone", lambda *tile: True)
        monkeypatch.setattr(early, "allowed", lambda on: True)
        monkeypatch.setattr(early, "options", lambda on: {})
        for name in ("let_next_start", "wait", "turn", "ask"):
            monkeypatch.setattr(early, name, getattr(front, name))
        monkeypatch.setattr(early, "turns", front.number_of_turns)
        given = (*problem[:3], problem.cache, problem.variant, problem.num_splits)
        results = gpu.prepare_decode(*given)(*given)
        front.end()
        return results, front

    return decode


def rows_of(problem: Decoding) -> list[set[int]]:
    """Where the rows of keys, and of values, that any sequence sees begin in memory."""
    found = []
    for x in problem[1:3]:
        rows = set()
        for b in range(problem.q.shape[0]):
            for cache, row in zip(*places_of(x, problem.cache, b), strict=True):
                offsets = (cache * x.stride(0) + row * x.stride(1) + head * x.stride(2) for head in range(x.shape[2]))
                rows.update(x.data_ptr() + x.element_size() * offset for offset in offsets)
        found.append(rows)
    return found


def tile_of(case: Case) -> DecodePlan:
    programs = 0 if case.name == "whole" else 5 if case.name.startswith("line") else 4
    return DecodePlan(16, 4, 1, programs=programs * case.heads_k, shortest=16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_read_before_the_wait_does_not_show(case: Case, run) -> None:
    fronts = []

    def decode(problem: Decoding) -> tuple[Tensor, Tensor]:
        results, front = run(problem, tile_of(case))
        fronts.append(front)
        return results

    check_decoding(case.decoding("cpu", torch.float16), case.name, decode)
    split = case.name != "whole"
    assert bool(fronts[0].turns) is split and bool(fronts[0].asked) is split


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "whole"], ids=str)
def test_what_is_asked_for_lies_in_the_caches(case: Case, run) -> None:
    problem = case.decoding("cpu", torch.float16)
    whole = []  # all rows that the caches have
    for x in problem[1:3]:
        offsets = (torch.arange(n) * stride for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
        a, b, c = offsets
        places = (a[:, None, None] + b[:, None] + c).flatten().tolist()
        whole.append({x.data_ptr() + x.element_size() * place for place in places})
    for lies, allowed in ((True, whole), (False, rows_of(problem))):
        _, front = run(problem, tile_of(case), lies)
        assert len(front.asked) % 2 == 0
        for i, (rows, dim) in enumerate(front.asked):
            assert dim == problem[1 + i % 2].shape[3]
            assert set(rows.tolist()) <= allowed[i % 2], f"outside of {('k_cache', 'v_cache')[i % 2]}, {lies=}"
        assert sum(len(rows) for rows, _ in front.asked) > 0
