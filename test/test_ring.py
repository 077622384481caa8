"""Ring attention over ``flash_attn``'s private functions, as libraries write it: each of two ranks has half a sequence.

A rank sends its keys and values around the ring. Of each block it takes attention with ``_flash_attn_forward``, and it
merges out and log-sum-exp by a formula of its own. Backward, it hands the merged ones to ``_flash_attn_backward``, once
for each block, with gradients that it has allocated.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from assertions import (
    FORWARD_FACTOR,
    GRADIENT_FACTOR,
    assert_close_to_oracle,
    oracle_results,
    random_gradients,
    same_dtype_results,
)
from cases import Problem
from torch import Tensor

from flash_attn_plus import as_flash_attn
from flash_attn_plus.schemas import Variant, Varlen

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32", reason="needs gloo and fork"
)

RANKS = 2
WAIT = timedelta(seconds=60)  # for each other, and for them
HEADS, HEADS_K, DIM = 4, 2, 32
LENGTHS = (32, 6, 74)  # of packed sequences: multiples of RANKS


class Case(NamedTuple):
    causal: bool
    packed: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = "packed" if self.packed else "dense"
        return "-".join((kind, "causal" if self.causal else "full", str(self.dtype).removeprefix("torch.")))

    def problem(self) -> Problem:
        """The whole, the same in every process."""
        generator = torch.Generator().manual_seed(0)

        def tensor(heads: int) -> Tensor:
            rows = (sum(LENGTHS),) if self.packed else (2, 70)
            return torch.randn(*rows, heads, DIM, generator=generator).to(self.dtype).requires_grad_()

        q, k, v = tensor(HEADS), tensor(HEADS_K), tensor(HEADS_K)
        varlen = Varlen(*[offsets(LENGTHS)] * 2, *[max(LENGTHS)] * 2) if self.packed else None
        return Problem(q, k, v, Variant(causal=self.causal), varlen)

    def dout(self) -> Tensor:
        out = self.problem().q.detach()
        return random_gradients(out, out[..., 0].float(), "out")[0]

    def rows(self, rank: int) -> Tensor:
        """Which rows of the whole a rank holds: its part of each sequence."""
        if not self.packed:
            return torch.arange(70).chunk(RANKS)[rank]
        starts = offsets(LENGTHS).tolist()
        return torch.cat([torch.arange(*starts[b : b + 2]).chunk(RANKS)[rank] for b in range(len(LENGTHS))])


CASES = [
    Case(causal, packed, dtype)
    for packed in (False, True)
    for causal in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
]


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


# What a library's module has.


def default_arguments(function: Callable) -> dict:
    """Libraries fill in what they do not know, so that they run with several versions."""
    parameters = inspect.signature(function if inspect.isfunction(function) else function._init_fn).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


class Ring:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def pass_on(self, *tensors: Tensor) -> list[Tensor]:
        """To the next rank; those of the one before."""
        received = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
        to, source = (self.rank + 1) % RANKS, (self.rank - 1) % RANKS
        operations = [dist.P2POp(dist.isend, x.contiguous(), to) for x in tensors]
        operations += [dist.P2POp(dist.irecv, x, source) for x in received]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        return received

    def sees(self, step: int, causal: bool) -> bool:
        """Whether the block that has come here after so many steps, that of ``rank - step``, is not in the future."""
        return not causal or step <= self.rank


def merge(state: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, with the log-sum-exp beside the rows: (..., rows, heads, 1)."""
    out, lse = out.float(), lse.transpose(-1, -2)[..., None]
    if state is None:
        return out, lse
    all_out, all_lse = state
    merged = all_out - torch.sigmoid(lse - all_lse) * (all_out - out)
    return merged, all_lse - torch.nn.functional.logsigmoid(all_lse - lse)


def ring_forward(ring: Ring, q: Tensor, k: Tensor, v: Tensor, causal: bool, layout: tuple) -> tuple[Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    function = interface._flash_attn_varlen_forward if layout else interface._flash_attn_forward
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    state = None
    for step in range(RANKS):
        if ring.sees(step, causal):
            arguments = default_arguments(function) | dict(zip(names, layout, strict=False))
            arguments |= dict(q=q, k=k, v=v, dropout_p=0.0, softmax_scale=DIM**-0.5, causal=causal and step == 0)
            arguments |= dict(window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None)
            out, lse, _, _ = function(**arguments, **({} if layout else {"return_softmax": False}))
            state = merge(state, out, lse)
        if step + 1 < RANKS:
            k, v = ring.pass_on(k, v)
    out, lse = state
    return out.to(q.dtype), lse.squeeze(-1).transpose(-1, -2)


def ring_backward(
    ring: Ring, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, layout: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    function = interface._flash_attn_varlen_backward if layout else interface._flash_attn_backward
    # Slices of what is larger, as zigzag rings give, used again by every block: what is not written would show.
    block_dq = torch.full_like(q, torch.nan).repeat_interleave(2, dim=-3).unflatten(-3, (-1, 2))[..., 0, :, :]
    block_dk, block_dv = k.new_full((*k.shape[:-2], 2, *k.shape[-2:]), torch.nan).unbind(-3)
    dq = torch.zeros_like(q, dtype=torch.float32)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for step in range(RANKS):
        if ring.sees(step, causal):
            function(
                *(dout, q, k, v, out, lse.contiguous(), block_dq, block_dk, block_dv, *layout),
                *(0.0, DIM**-0.5, causal and step == 0, -1, -1, 0.0, None, False),
            )
            dq += block_dq
            dk += block_dk
            dv += block_dv
        # A block's gradients go with it, and after the last step they are at home.
        k, v, dk, dv = ring.pass_on(k, v, dk, dv)
    return tuple(x.to(q.dtype) for x in (dq, dk, dv))


def run_case(ring: Ring, case: Case) -> dict[str, Tensor]:
    q, k, v, _, _ = case.problem()
    rows = case.rows(ring.rank)
    q, k, v, dout = (x.detach().index_select(x.dim() - 3, rows) for x in (q, k, v, case.dout()))
    lengths = tuple(n // RANKS for n in LENGTHS)
    layout = (offsets(lengths), offsets(lengths), max(lengths), max(lengths)) if case.packed else ()
    out, lse = ring_forward(ring, q, k, v, case.causal, layout)
    dq, dk, dv = ring_backward(ring, dout, q, k, v, out, lse, case.causal, layout)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def run_rank(rank: int, folder: str, failing: int | None) -> None:
    """One process: its part of every case, written to a file."""
    torch.set_num_threads(1)
    # gloo would ask for the address of the host's name, which not every host has.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    as_flash_attn.serve(replace=True)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=WAIT)
    try:
        if rank == failing:
            raise RuntimeError(f"rank {rank} cannot go on")
        ring = Ring(rank)
        torch.save({str(case): run_case(ring, case) for case in CASES}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(folder: Path, failing: int | None = None) -> None:
    """All ranks, to their end; raises what one of them raises, and ends the others."""
    # Its children have torch already.
    mp.get_context("forkserver").set_forkserver_preload(["flash_attn_plus", "torch.distributed", "assertions"])
    ranks = mp.start_processes(
        run_rank, (str(folder), failing), nprocs=RANKS, join=False, start_method="forkserver", daemon=True
    )
    deadline = time.monotonic() + WAIT.total_seconds()
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < deadline, f"the ranks do not come to an end in {WAIT}"
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
            process.join()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ring")
    run_ranks(folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ring_is_the_attention_of_the_whole(case: Case, results) -> None:
    problem = case.problem()
    expected = oracle_results(problem, (case.dout(), None))
    plain = same_dtype_results(problem, (case.dout(), None), expected)
    for name, oracle in expected.items():
        whole = torch.full(oracle.shape, torch.nan, dtype=torch.float32 if name == "lse" else case.dtype)
        for rank in range(RANKS):
            axis = whole.dim() - (1 if name == "lse" else 3)
            whole.index_copy_(axis, case.rows(rank), results[rank][str(case)][name])
        factor = FORWARD_FACTOR if name in ("out", "lse") else GRADIENT_FACTOR
        assert_close_to_oracle(whole, oracle, plain[name], factor, f"{case}: {name}")


def test_a_rank_that_fails_ends_the_others(tmp_path) -> None:
    start = time.monotonic()
    # Rank 0 may be the first to end: its connection breaks.
    with pytest.raises((mp.ProcessRaisedException, mp.ProcessExitedException)):
        run_ranks(tmp_path, failing=1)
    assert time.monotonic() - start < WAIT.total_seconds()
