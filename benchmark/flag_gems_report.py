"""Each finding of docs/flaggems_analysis_report.md about attention in flag_gems 5.0.2, reproduced on this machine.

    python benchmark/flag_gems_report.py --csv flag_gems_report.csv --json flag_gems_report.json

Needs flag_gems on the path, and what it imports: sqlalchemy, PyYAML, packaging, typing_extensions. Without flag_gems
it says so, and exits with 2.

Every case is a small problem in fp16. What is right is attention in fp64 (flash_attn_plus.reference, on the CPU); the
error of flag_gems and that of the same call through flash_attn_plus stand beside each other: the largest difference,
and ||result - right|| / ||right||. A result is right where its largest difference is within 8 times that of the same
maths in plain PyTorch at fp16, plus a rounding floor: what is reported as wrong is wrong by far more than rounding.
Many findings say what flag_gems computes instead; then that is compared too.

The verdicts:
    as reported                 right where the finding says so; wrong, in the way that it says, or raised
    not reproduced              right where the finding says wrong
    wrong, not as predicted     wrong, but something else than the finding says
    wrong, reported as right
    raised ..., crashed, timed out, not run

Cases run in worker processes, several at a time: one that crashes or hangs takes nothing else with it, and those that
write outside their memory have a process of their own. What a call allocates lies between guards, which are compared
afterwards, and is NaN before: elements that nothing writes are seen. Where flag_gems would tune among its configs, one
that it ships is chosen, so that a case takes seconds; `sdpagrad_tuned` lets it tune.

The exit status is 1 where ours is wrong.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from attention import checkout, machine, markdown, reason
from torch import Tensor

import flash_attn_plus as fap
from flash_attn_plus import reference
from flash_attn_plus.schemas import Variant, Varlen

DTYPE = torch.float16
FACTOR = 8.0  # times the error of the same maths in plain PyTorch
GUARD = 2**18  # elements before and behind what a call allocates
SENTINEL = 77
LN2, LOG2E = math.log(2), 1 / math.log(2)
RIGHT, WRONG, RAISES, FACT = "right", "wrong", "raises", "fact"
BROKEN = "broken"  # wrong, or an illegal access to memory: which of them depends on what lies there
COLUMNS = [
    *("case", "finding", "right", "flag_gems max abs", "flag_gems relative"),
    *("ours max abs", "ours relative", "verdict", "note"),
]
MACHINE = ["device", "torch", "triton", "flag_gems", "commit"]

Results = dict[str, Tensor]


class NotHereError(Exception):
    """A case that means nothing on this machine."""


@dataclass(frozen=True)
class Case:
    name: str
    claim: str
    finding: str  # one sentence, as it stands in the report
    right: str  # what is right, in words
    run: Callable[[Any, torch.device], Evidence]
    group: str
    alone: bool
    raises: str = ""  # the name of the exception, where it raises


@dataclass
class Evidence:
    """What one case found. ``holds`` is whether a fact is so; otherwise results are compared."""

    theirs: Results = field(default_factory=dict)
    mine: Results = field(default_factory=dict)
    right: Results = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    predicted: Results | None = None
    raised: BaseException | None = None
    holds: bool | None = None
    note: str = ""


CASES: dict[str, Case] = {}


def case(claim: str, finding: str, right: str, alone: bool = False, raises: str = "") -> Callable:
    """Registers a function of (flag_gems, device) under its own name; its first word is its group."""

    def register(run: Callable) -> Callable:
        name = run.__name__
        group = name if alone else name.partition("_")[0]
        CASES[name] = Case(name, claim, finding, right, run, group, alone, raises)
        return run

    return register


# Problems and what is right for them


class Problem(NamedTuple):
    """q (b, sq, h, d), k and v (b, sk, hk, d), or packed; on the device, of any strides."""

    q: Tensor
    k: Tensor
    v: Tensor
    variant: Variant = Variant()
    layout: Varlen | None = None
    dout: Tensor | None = None


def draw(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(hash(shape) % 2**31 + seed)
    return torch.randn(shape, generator=generator).to(DTYPE).to(device)


def dense(
    device: torch.device,
    sq: int = 128,
    sk: int | None = None,
    heads: int = 4,
    heads_k: int | None = None,
    dim: int = 64,
    batch: int = 2,
    backward: bool = False,
    **variant: Any,
) -> Problem:
    sk, heads_k = sk or sq, heads_k or heads
    q, dout = (draw(device, batch, sq, heads, dim, seed=seed) for seed in (1, 2))
    k, v = (draw(device, batch, sk, heads_k, dim, seed=seed) for seed in (3, 4))
    return Problem(q, k, v, Variant(**variant), dout=dout if backward else None)


def offsets(device: torch.device, lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def packed(
    device: torch.device,
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    heads: int = 4,
    heads_k: int = 2,
    dim: int = 64,
    **variant: Any,
) -> Problem:
    lengths_k = lengths_k or lengths_q
    q = draw(device, sum(lengths_q), heads, dim, seed=1)
    k, v = (draw(device, sum(lengths_k), heads_k, dim, seed=seed) for seed in (3, 4))
    starts = offsets(device, lengths_q), offsets(device, lengths_k)
    return Problem(q, k, v, Variant(**variant), Varlen(*starts, max(lengths_q), max(lengths_k)))


def paged(
    device: torch.device, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], page: int = 16, **variant: Any
) -> Problem:
    """The keys of each sequence in pages, in no order."""
    counts = [-(-length // page) for length in lengths_k]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5)).int()
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, part in zip(table, order.split(counts), strict=True):
        row[: len(part)] = part
    q = draw(device, sum(lengths_q), 4, 64, seed=1)
    k, v = (draw(device, sum(counts), page, 2, 64, seed=seed) for seed in (3, 4))
    used = torch.tensor(lengths_k, dtype=torch.int32, device=device)
    layout = Varlen(offsets(device, lengths_q), offsets(device, lengths_k), max(lengths_q), max(lengths_k))._replace(
        seqused_k=used, block_table=table.to(device)
    )
    return Problem(q, k, v, Variant(**variant), layout)


def on_cpu(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().cpu()
    return type(x)(*map(on_cpu, x)) if isinstance(x, (Problem, Variant, Varlen)) else x


def computed(problem: Problem, dtype: torch.dtype | None) -> Results:
    """out, lse, and the gradients where there is a gradient of out, in plain PyTorch on the CPU."""
    problem = on_cpu(problem)
    leaves = [x.to(dtype or x.dtype).requires_grad_(problem.dout is not None) for x in problem[:3]]
    if problem.layout is None:
        out, lse = reference.attention(*leaves, problem.variant, dtype=dtype)
    else:
        out, lse = reference.varlen_attention(*leaves, problem.layout, problem.variant, dtype=dtype)
    return with_gradients(out, lse, leaves, problem.dout)


def with_gradients(out: Tensor, lse: Tensor, leaves: list[Tensor], dout: Tensor | None) -> Results:
    found = {"out": out.detach(), "lse": lse.detach()}
    if dout is not None:
        grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
        found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return found


def by_ours(problem: Problem) -> Results:
    """The same call through the operators of flash_attn_plus."""
    q, k, v, variant, layout, dout = problem
    leaves = [x.detach().requires_grad_(dout is not None) for x in (q, k, v)]
    ops = torch.ops.flash_attn_plus
    if layout is None:
        out, lse = ops.fwd(*leaves, *variant)
    else:
        out, lse = ops.varlen_fwd(*leaves, *layout[:4], *variant, *layout[4:])
    return with_gradients(out, lse, leaves, dout)


def instead(problem: Problem, **variant: Any) -> Results:
    """What is right for the same inputs under another variant."""
    return computed(problem._replace(variant=problem.variant._replace(**variant)), torch.float64)


def compared(
    problem: Problem, call: Callable[[], Results], names: tuple[str, ...] = ("out",), predicted: Results | None = None
) -> Evidence:
    """Ours runs first, and everything goes to the CPU: a call that breaks the device takes no result with it."""
    right, plain = computed(problem, torch.float64), computed(problem, None)
    evidence = Evidence(right={name: right[name] for name in names}, predicted=predicted)
    for name in names:
        floor = 2 * torch.finfo(DTYPE).eps * 2.0 ** math.floor(math.log2(largest(right[name]) + 0.3))
        evidence.bounds[name] = FACTOR * difference(plain[name], right[name])[0] + floor
    evidence.mine = {name: x.cpu() for name, x in by_ours(problem).items() if name in names}
    return called(evidence, call)


def called(evidence: Evidence, call: Callable[[], Results]) -> Evidence:
    with guarded() as guards:
        try:
            found = call()
            evidence.theirs = {name: found[name].detach().cpu() for name in evidence.right if name in found}
            outside = guards.changed()
        except Exception as error:
            evidence.raised = error
            return evidence
    if outside:
        evidence.note = f"{outside} elements outside its memory written"
    return evidence


def largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def difference(actual: Tensor, right: Tensor) -> tuple[float, float, int]:
    """Largest, relative, and how many elements are not finite where they should be, or the reverse."""
    actual, right = actual.double(), right.double()
    if actual.shape != right.shape:
        return math.inf, math.inf, actual.numel()
    same = (actual == right) | (actual.isnan() & right.isnan())
    both = actual.isfinite() & right.isfinite()
    unlike = int((~same & ~both).sum())
    off = torch.where(both, actual - right, 0.0)
    norm = torch.where(right.isfinite(), right, 0.0).norm().item()
    if unlike:
        return math.inf, math.inf, unlike
    return (off.abs().max().item() if off.numel() else 0.0), off.norm().item() / max(norm, 1e-30), 0


class Guards:
    """Memory between guards: what torch.empty and torch.empty_like give out while a call is looked at."""

    def __init__(self, empty: Callable, empty_like: Callable) -> None:
        self.buffers: list[tuple[Tensor, int]] = []
        self._empty, self._empty_like = empty, empty_like

    def empty(self, *size: Any, **options: Any) -> Tensor:
        return self._between(self._empty, size, options)

    def empty_like(self, x: Tensor, **options: Any) -> Tensor:
        return self._between(self._empty_like, (x,), {"dtype": x.dtype, "device": x.device} | options)

    def _between(self, make: Callable, arguments: tuple, options: dict) -> Tensor:
        shape = make(*arguments, **{**options, "device": "meta"})
        size = 1 + sum((n - 1) * stride for n, stride in zip(shape.shape, shape.stride(), strict=True))
        if shape.numel() == 0 or options.get("out") is not None or shape.dtype == torch.bool:
            return make(*arguments, **options)
        buffer = self._empty(size + 2 * GUARD, dtype=shape.dtype, device=options.get("device"))
        buffer.fill_(SENTINEL)
        inside = buffer.as_strided(shape.shape, shape.stride(), GUARD)
        self.buffers.append((buffer, size))
        return inside.fill_(torch.nan if shape.is_floating_point() else torch.iinfo(shape.dtype).max)

    def changed(self) -> int:
        """Elements of the guards that something wrote."""
        outside = (torch.cat((buffer[:GUARD], buffer[GUARD + size :])) for buffer, size in self.buffers)
        return sum(int((part != SENTINEL).sum()) for part in outside)


@contextmanager
def guarded() -> Iterator[Guards]:
    empty, empty_like = torch.empty, torch.empty_like
    guards = Guards(empty, empty_like)
    torch.empty, torch.empty_like = guards.empty, guards.empty_like
    try:
        yield guards
    finally:
        torch.empty, torch.empty_like = empty, empty_like


# flag_gems's own calls


def kernel(gems: ModuleType, module: str, name: str) -> Any:
    """One of its kernels, behind libentry; raises where there is none."""
    found = getattr(sys.modules.get(f"flag_gems.ops.{module}"), name, None)
    if not hasattr(found, "kernel_cache"):
        raise NotHereError(f"flag_gems has no {name} behind libentry here")
    return found


def shipped(entry: Any) -> list:
    """The configs of a kernel, whatever ``choose`` has left of them."""
    return vars(entry).setdefault("shipped", list(entry.fn.configs))


def choose(gems: ModuleType, module: str, name: str, stages: int = 2, **values: int) -> None:
    """Leaves it one config of those that it ships; nothing is tuned, nor remembered."""
    try:
        entry = kernel(gems, module, name)
    except NotHereError:
        return  # of a stand-in
    for config in shipped(entry):
        if (config.num_warps, config.num_stages) == (4, stages) and values.items() <= config.kwargs.items():
            entry.fn.configs = [config]
            break
    else:
        raise NotHereError(f"{name} ships no config with {values}")
    for cache in entry.kernel_cache:
        cache.clear()


SDPA_TILE = dict(BLOCK_M=128, BLOCK_N=32)
FULL_ROWS = dict(BLOCK_M1=32, BLOCK_N1=128, BLOCK_M2=128, BLOCK_N2=32)
HALF_ROWS = (
    dict(BLOCK_M1=64, BLOCK_N1=128, BLOCK_M2=64, BLOCK_N2=64),
    dict(BLOCK_M1=64, BLOCK_N1=128, BLOCK_M2=64, BLOCK_N2=32),
)


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def sdpa(gems: ModuleType, problem: Problem, mask: Tensor | None = None, causal: bool = False) -> Results:
    """scaled_dot_product_attention_forward: (b, h, s, d); its second result is in base 2."""
    choose(gems, "attention", "_attn_fwd", **SDPA_TILE)
    q, k, v = map(heads_first, problem[:3])
    gqa = q.shape[1] != k.shape[1]
    out, lse = gems.scaled_dot_product_attention_forward(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)
    return {"out": out.transpose(1, 2), "lse": lse * LN2}


def sdpa_backward(
    gems: ModuleType,
    problem: Problem,
    causal: bool,
    mask: Tensor | None = None,
    dout: Tensor | None = None,
    tile: dict | None = FULL_ROWS,
) -> Results:
    if tile is not None:
        choose(gems, "attention", "_attn_fwd", **SDPA_TILE)
        choose(gems, "attention", "_attn_bwd", **tile)
    q, k, v, do = map(heads_first, (*problem[:3], problem.dout))
    options = dict(attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    out, lse = gems.scaled_dot_product_attention_forward(q, k, v, **options)
    do = do if dout is None else dout
    grads = gems.scaled_dot_product_attention_backward(do, q, k, v, out, lse, **options)
    return {name: x.transpose(1, 2) for name, x in zip(("dq", "dk", "dv"), grads, strict=True)}


def flash(
    gems: ModuleType, problem: Problem, split: bool = False, scale: float | None = None, **options: Any
) -> Results:
    """flash_attention_forward: (b, s, h, d), aten's arguments."""
    if not split:
        choose(gems, "flash_kernel", "flash_fwd_kernel", BLOCK_M=128, BLOCK_N=32)
    q, k, v, variant = problem[:4]
    out, lse, *_ = gems.flash_attention_forward(
        *(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, variant.causal, False),
        scale=scale,
        softcap=variant.softcap,
        alibi_slopes=variant.alibi_slopes,
        disable_splitkv=not split,
        **options,
    )
    return {"out": out, "lse": lse}


def varlen(gems: ModuleType, problem: Problem, **options: Any) -> Results:
    """flash_attn_varlen_func: vLLM's arguments."""
    q, k, v, variant, layout, _ = problem
    if layout.block_table is None:
        keys = dict(cu_seqlens_k=layout.cu_seqlens_k)
    else:
        keys = dict(seqused_k=layout.seqused_k, block_table=layout.block_table)
    window = (variant.window_left, variant.window_right)
    out, lse = gems.flash_attn_varlen_func(
        *(q, k, v, layout.max_seqlen_q, layout.cu_seqlens_q, layout.max_seqlen_k),
        **keys,
        softmax_scale=variant.softmax_scale,
        causal=variant.causal,
        window_size=None if window == (-1, -1) else window,
        softcap=variant.softcap,
        alibi_slopes=variant.alibi_slopes,
        return_softmax_lse=True,
        **options,
    )
    return {"out": out, "lse": lse}


def band(problem: Problem, visible: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A bool mask (1, 1, sq, sk) from rows and columns."""
    sq, sk = problem.q.shape[-3], problem.k.shape[-3]
    rows, columns = torch.arange(sq)[:, None], torch.arange(sk)
    return visible(rows, columns)[None, None]


def reread(x: Tensor, like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """The memory of x as a kernel reads it that takes it to have the strides of another."""
    return torch.as_strided(x, shape or x.shape, like.stride(), x.storage_offset())


# scaled_dot_product_attention


@case(WRONG, "causal is aligned top-left, the other forwards of flag_gems bottom-right", "bottom-right (flash-attn)")
def sdpa_causal_alignment(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 64, 128, causal=True)
    return compared(problem, lambda: sdpa(gems, problem, causal=True), predicted=instead(problem, diagonal=0))


@case(WRONG, "a bool mask is inverted: True hides the key", "True keeps the key (PyTorch's SDPA)")
def sdpa_bool_mask(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device)
    mask = draw(device, 2, 4, 128, 128, seed=9) > 0
    problem = problem._replace(variant=Variant(attn_bias=mask))
    return compared(problem, lambda: sdpa(gems, problem, mask), predicted=instead(problem, attn_bias=~mask.cpu()))


@case(WRONG, "a float bias is added without the factor log2(e): it counts ln 2 times", "scores + bias")
def sdpa_float_bias(gems: ModuleType, device: torch.device) -> Evidence:
    bias = draw(device, 2, 4, 128, 128, seed=9)
    problem = dense(device)._replace(variant=Variant(attn_bias=bias))
    predicted = instead(problem, attn_bias=bias.double() * LN2)
    return compared(problem, lambda: sdpa(gems, problem, bias), predicted=predicted)


@case(WRONG, "with causal, the factor is there on the diagonal blocks only", "scores + bias, everywhere")
def sdpa_float_bias_causal(gems: ModuleType, device: torch.device) -> Evidence:
    bias = draw(device, 2, 4, 256, 256, seed=9)
    problem = dense(device, 256)._replace(variant=Variant(attn_bias=bias, causal=True))
    left = band(problem, lambda i, j: j < i // SDPA_TILE["BLOCK_M"] * SDPA_TILE["BLOCK_M"])
    predicted = instead(problem, attn_bias=bias.cpu().double() * torch.where(left, LN2, 1.0))
    return compared(problem, lambda: sdpa(gems, problem, bias, causal=True), predicted=predicted)


@case(WRONG, "a mask that broadcasts is read by its own strides, past its entries", "(1, 1, sq, sk) broadcasts")
def sdpa_mask_broadcast(gems: ModuleType, device: torch.device) -> Evidence:
    beyond = draw(device, 2, 4, 128, 128, seed=9)
    bias = beyond[:1, :1]
    problem = dense(device)._replace(variant=Variant(attn_bias=bias))
    predicted = instead(problem, attn_bias=beyond.double() * LN2)
    return compared(problem, lambda: sdpa(gems, problem, bias), predicted=predicted)


@case(WRONG, "v is read with the batch and head strides of k", "any strides")
def sdpa_value_strides(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device)
    q, k, _ = map(heads_first, problem[:3])
    v = draw(device, 2, 4, 192, 64, seed=9)[:, :, :128]
    problem = problem._replace(v=v.transpose(1, 2))

    def call() -> Results:
        choose(gems, "attention", "_attn_fwd", **SDPA_TILE)
        return {"out": gems.scaled_dot_product_attention_forward(q, k, v)[0].transpose(1, 2)}

    read = torch.as_strided(v, v.shape, (*k.stride()[:2], *v.stride()[2:]))
    return compared(problem, call, predicted=computed(problem._replace(v=read.transpose(1, 2)), torch.float64))


@case(WRONG, "its second result is the log-sum-exp in base 2", "a natural logarithm")
def sdpa_lse_base_2(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device)
    predicted = {"lse": computed(problem, torch.float64)["lse"] * LOG2E}
    return compared(problem, lambda: {"lse": sdpa(gems, problem)["lse"] * LOG2E}, ("lse",), predicted)


@case(RIGHT, "GQA without a mask", "4 query heads, 2 key heads")
def sdpa_gqa(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, heads_k=2)
    return compared(problem, lambda: sdpa(gems, problem), ("out", "lse"))


@case(RIGHT, "causal with as many queries as keys, of any number", "200 queries, 200 keys")
def sdpa_causal_square(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 200, causal=True)
    return compared(problem, lambda: sdpa(gems, problem, causal=True), ("out", "lse"))


@case(FACT, "the forward tunes 45 configs anew for every number of keys", "no tuning by lengths")
def sdpa_tunes_by_length(gems: ModuleType, device: torch.device) -> Evidence:
    entry = kernel(gems, "attention", "_attn_fwd")
    configs, keys = shipped(entry), entry.fn.keys
    return Evidence(holds="KV_CTX" in keys and len(configs) == 45, note=f"{len(configs)}, by {', '.join(keys)}")


GRADIENTS = ("dq", "dk", "dv")


@case(RIGHT, "its backward, causal, as many queries as keys, by the one config that writes every row", "dq, dk, dv")
def sdpagrad_causal(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, heads_k=2, causal=True, backward=True)
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=True), GRADIENTS)


@case(WRONG, "the backward masks causally where is_causal is False", "no mask")
def sdpagrad_full(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, backward=True)
    predicted = _masked_gradients(problem)
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=False), GRADIENTS, predicted)


def _masked_gradients(problem: Problem) -> Results:
    """The gradients of attention without a mask, its probabilities masked causally only now."""
    Q, K, V, dO = (x.cpu().double().transpose(1, 2) for x in (*problem[:3], problem.dout))
    scale = Q.shape[-1] ** -0.5
    P = (Q @ K.mT * scale).softmax(-1)
    delta = (P @ V * dO).sum(-1, keepdim=True)
    P = P.tril()
    dS = P * (dO @ V.mT - delta) * scale
    return {name: x.transpose(1, 2) for name, x in (("dq", dS @ K), ("dk", dS.mT @ Q), ("dv", P.mT @ dO))}


@case(WRONG, "two of the three tiles that it ships leave rows of dq unwritten", "every row")
def sdpagrad_dq_unwritten(gems: ModuleType, device: torch.device) -> Evidence:
    kernel(gems, "attention", "_attn_bwd")
    problem = dense(device, 256, causal=True, backward=True)
    notes = []
    for tile in HALF_ROWS:
        evidence = compared(problem, functools.partial(sdpa_backward, gems, problem, True, tile=tile), ("dq",))
        if evidence.raised:
            return evidence
        rows = evidence.theirs["dq"].isnan().any(-1)
        notes.append(f"BLOCK_M2 {tile['BLOCK_M2']}, BLOCK_N2 {tile['BLOCK_N2']}: {int(rows.sum())} of {rows.numel()}")
    evidence.note = f"rows unwritten: {'; '.join(notes)}"
    return evidence


@case(BROKEN, "left to tune, it takes a wrong tile, or crashes", "dq, dk, dv", alone=True)
def sdpagrad_tuned(gems: ModuleType, device: torch.device) -> Evidence:
    tuner = kernel(gems, "attention", "_attn_bwd").fn
    choose(gems, "attention", "_attn_fwd", **SDPA_TILE)
    problem = dense(device, 1024, heads=8, batch=1, causal=True, backward=True)

    def tuned() -> Results:
        sdpa_backward(gems, problem, causal=True, tile=None)
        torch.cuda.synchronize()
        return sdpa_backward(gems, problem, causal=True, tile=None)

    evidence = compared(problem, tuned, GRADIENTS)
    evidence.note = f"{len(tuner.configs)} configs; {getattr(tuner, 'best_config', None) or 'none chosen'}"
    return evidence


@case(WRONG, "with more keys than queries, dk and dv are wrong or unwritten", "zero for keys unseen", alone=True)
def sdpagrad_more_keys(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 128, 256, causal=True, diagonal=0, backward=True)
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=True), GRADIENTS)


@case(WRONG, "with more queries than keys it writes dk and dv outside their memory", "inside", alone=True)
def sdpagrad_more_queries(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, 128, causal=True, diagonal=0, backward=True)
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=True), GRADIENTS)


@case(WRONG, "it reads dout past its end where the number of queries is no multiple of its block", "NaN behind dout")
def sdpagrad_reads_past_dout(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 100, causal=True, backward=True)
    do = heads_first(problem.dout)
    memory = torch.full((2 * do.numel(),), torch.nan, dtype=DTYPE, device=device)
    dout = memory[: do.numel()].view(do.shape).copy_(do)
    problem = problem._replace(dout=dout.transpose(1, 2))
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=True, dout=dout), GRADIENTS)


@case(WRONG, "the backward ignores attn_mask", "gradients of the masked attention")
def sdpagrad_ignores_mask(gems: ModuleType, device: torch.device) -> Evidence:
    bias = 2 * draw(device, 2, 4, 128, 128, seed=9)  # one diagonal block: there, the forward is right
    problem = dense(device, 128, backward=True)._replace(variant=Variant(attn_bias=bias, causal=True))
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=True, mask=bias), GRADIENTS)


# flash_attention_forward


@case(RIGHT, "GQA", "4 query heads, 2 key heads")
def dense_gqa(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 100, 200, heads_k=2)
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"))


@case(RIGHT, "causal, aligned bottom-right, where the number of queries is a multiple of 128", "128 queries, 256 keys")
def dense_causal(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 128, 256, causal=True)
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"))


@case(RIGHT, "softcap", "softcap 2")
def dense_softcap(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, softcap=2.0)
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"))


def slopes(device: torch.device) -> Tensor:
    return torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)


@case(RIGHT, "ALiBi", "-slope * |distance|")
def dense_alibi(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 128, 256, alibi_slopes=slopes(device))
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"))


@case(RIGHT, "a window with two sides, where the number of queries is a multiple of 128", "window (64, 32)")
def dense_window(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, window_left=64, window_right=32)
    return compared(problem, lambda: flash(gems, problem, window_size_left=64, window_size_right=32))


@case(RIGHT, "head dimensions 24, 96, 192 and 256", "each of them")
def dense_head_dims(gems: ModuleType, device: torch.device) -> Evidence:
    for dim in (24, 96, 192, 256):
        problem = dense(device, 64, heads=2, dim=dim, batch=1)
        evidence = compared(problem, functools.partial(flash, gems, problem), ("out", "lse"))
        evidence.note = f"head dimension {dim}"
        if verdict(RIGHT, evidence) != "as reported":
            break
    return evidence


@case(RAISES, "head dimensions up to 16 raise AssertionError", "1 to 256", raises="AssertionError")
def dense_head_dim_16(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 64, dim=16)
    return compared(problem, lambda: flash(gems, problem))


def _truncated(problem: Problem, right: int) -> Tensor:
    """Which columns a block of 128 rows reaches, counted from the end of the last block instead of the last row."""
    sq, sk, blocks = problem.q.shape[1], problem.k.shape[1], -(-problem.q.shape[1] // 128)
    ends = [min(sk, sk + (block + 1 - blocks) * 128 + right) for block in range(blocks)]
    end = torch.tensor([-(-end // 32) * 32 for end in ends]).repeat_interleave(128)[:sq, None]
    return band(problem, lambda i, j: j < end)


@case(WRONG, "causal loses keys where the number of queries is no multiple of 128", "192 queries, 192 keys")
def dense_causal_odd(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 192, causal=True)
    predicted = instead(problem, attn_bias=_truncated(problem, 0))
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"), predicted)


@case(WRONG, "a window loses keys there too", "window (64, 32), 192 queries")
def dense_window_odd(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 192, window_left=64, window_right=32)
    predicted = instead(problem, attn_bias=_truncated(problem, 32))
    options = dict(window_size_left=64, window_size_right=32)
    return compared(problem, lambda: flash(gems, problem, **options), ("out", "lse"), predicted)


@case(WRONG, "a window with one side is dropped", "window (64, -1)")
def dense_window_left(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, window_left=64)
    call = functools.partial(flash, gems, problem, window_size_left=64)
    return compared(problem, call, predicted=instead(problem, window_left=-1))


@case(WRONG, "a window is dropped whose left side reaches all keys", "window (1000, 16)")
def dense_window_wide(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, window_left=1000, window_right=16)
    call = functools.partial(flash, gems, problem, window_size_left=1000, window_size_right=16)
    return compared(problem, call, predicted=instead(problem, window_left=-1, window_right=-1))


@case(WRONG, "v is read with the strides of k", "any strides")
def dense_value_strides(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device)
    v = draw(device, 2, 192, 4, 64, seed=9)[:, :128]
    problem = problem._replace(v=v)
    predicted = computed(problem._replace(v=reread(v, problem.k)), torch.float64)
    return compared(problem, lambda: flash(gems, problem), predicted=predicted)


@case(WRONG, "split-KV writes (b, s, h, d) wrongly and outside its memory", "8 heads, 16 queries", alone=True)
def dense_splitkv_contiguous(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 16, 2048, heads=8, batch=1)
    return compared(problem, lambda: flash(gems, problem, split=True))


@case(WRONG, "so does a decoding step without GQA", "8 heads, one query", alone=True)
def dense_splitkv_decode(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 1, 2048, heads=8, batch=1)
    return compared(problem, lambda: flash(gems, problem, split=True))


@case(RIGHT, "split-KV on memory in the order (b, h, s, d)", "the same, transposed", alone=True)
def dense_splitkv_transposed(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 16, 2048, heads=8, batch=1)
    problem = problem._replace(**{name: heads_first(getattr(problem, name)).transpose(1, 2) for name in "qkv"})
    return compared(problem, lambda: flash(gems, problem, split=True), ("out", "lse"))


@case(RIGHT, "split-KV with GQA and one query", "8 query heads, 2 key heads", alone=True)
def dense_splitkv_gqa_decode(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 1, 2048, heads=8, heads_k=2, batch=1)
    return compared(problem, lambda: flash(gems, problem, split=True))


@case(WRONG, "split-KV gives NaN to rows that see no key", "0", alone=True)
def dense_splitkv_empty_rows(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 512, 256, heads=2, batch=1, causal=True)
    problem = problem._replace(**{name: heads_first(getattr(problem, name)).transpose(1, 2) for name in "qkv"})
    return compared(problem, lambda: flash(gems, problem, split=True))


@case(WRONG, "scale=0.0 is taken for None", "every key counts the same")
def dense_scale_zero(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, softmax_scale=0.0)
    call = functools.partial(flash, gems, problem, scale=0.0)
    return compared(problem, call, predicted=instead(problem, softmax_scale=None))


@case(WRONG, "a negative scale under a mask gives NaN", "scale -0.125, causal")
def dense_scale_negative(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, softmax_scale=-0.125, causal=True)
    return compared(problem, lambda: flash(gems, problem, scale=-0.125))


@case(WRONG, "the log-sum-exp of a row that sees no key is +inf", "-inf; out is 0")
def dense_empty_rows(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, 128, causal=True)
    predicted = computed(problem, torch.float64)
    predicted["lse"] = predicted["lse"].masked_fill(predicted["lse"] == -torch.inf, torch.inf)
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"), predicted)


@case(FACT, "it has no backward and says nothing: the result needs no gradient", "a gradient, or an error")
def dense_no_gradient(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device)
    out = flash(gems, problem._replace(q=problem.q.requires_grad_()))["out"]
    return Evidence(holds=not out.requires_grad, note=f"out.requires_grad is {out.requires_grad}")


@case(WRONG, "100 keys of a cache after 128 of it reuse the kernel for even lengths, and see 128", "100 keys")
def libentry_cache_slice(gems: ModuleType, device: torch.device) -> Evidence:
    whole = dense(device, 128, 256)
    first, then = (whole._replace(k=whole.k[:, :n], v=whole.v[:, :n]) for n in (128, 100))

    notes: list[str] = []

    def call() -> Results:
        flash(gems, first)  # forgets what was compiled, and compiles
        try:
            remembered = kernel(gems, "flash_kernel", "flash_fwd_kernel").kernel_cache
        except NotHereError:
            remembered = ()
        before = sum(map(len, remembered))
        found = _flash_again(gems, then)
        notes.append(f"{sum(map(len, remembered)) - before} kernels compiled for it")
        return found

    evidence = compared(then, call, predicted=computed(first, torch.float64))
    evidence.note = "; ".join(filter(None, [evidence.note, *notes]))
    return evidence


def _flash_again(gems: ModuleType, problem: Problem) -> Results:
    q, k, v = problem[:3]
    arguments = (q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False)
    out, lse, *_ = gems.flash_attention_forward(*arguments, disable_splitkv=True)
    return {"out": out, "lse": lse}


# flash_attn_varlen_func

LENGTHS = (17, 70, 128)


@case(RIGHT, "causal, aligned bottom-right, with GQA", "lengths 17, 70, 128 of 40, 70, 200 keys")
def varlen_causal(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, (40, 70, 200), causal=True)
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(RIGHT, "softcap", "softcap 2")
def varlen_softcap(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, softcap=2.0)
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(RIGHT, "ALiBi", "-slope * |distance|")
def varlen_alibi(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, (40, 70, 200), alibi_slopes=slopes(device))
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(RIGHT, "a window with two sides", "window (30, 10)")
def varlen_window(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, window_left=30, window_right=10)
    return compared(problem, lambda: varlen(gems, problem))


@case(RIGHT, "a left window with causal", "window (30, -1), causal")
def varlen_window_causal(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, window_left=30, causal=True)
    return compared(problem, lambda: varlen(gems, problem))


@case(RIGHT, "head dimensions 24, 96 and 192", "each of them")
def varlen_head_dims(gems: ModuleType, device: torch.device) -> Evidence:
    for dim in (24, 96, 192):
        problem = packed(device, LENGTHS, dim=dim, causal=True)
        evidence = compared(problem, functools.partial(varlen, gems, problem), ("out", "lse"))
        evidence.note = f"head dimension {dim}"
        if verdict(RIGHT, evidence) != "as reported":
            break
    return evidence


@case(RIGHT, "keys in pages", "pages of 16, causal, GQA")
def varlen_paged(gems: ModuleType, device: torch.device) -> Evidence:
    problem = paged(device, (1, 20, 64), (40, 70, 200), causal=True)
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(RIGHT, "decoding from pages with GQA: the output", "3 sequences, one query each")
def varlen_paged_decode(gems: ModuleType, device: torch.device) -> Evidence:
    problem = paged(device, (1, 1, 1), (40, 70, 200), causal=True)
    return compared(problem, lambda: varlen(gems, problem))


@case(WRONG, "a window with a left side only also hides the query's own key and all behind it", "window (30, -1)")
def varlen_window_left(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (128,), window_left=30)
    predicted = instead(problem, attn_bias=band(problem, lambda i, j: (j >= i - 30) & (j <= i - 1)), window_left=-1)
    return compared(problem, lambda: varlen(gems, problem), predicted=predicted)


@case(WRONG, "a window with a right side only is dropped", "window (-1, 10)")
def varlen_window_right(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, window_right=10)
    return compared(problem, lambda: varlen(gems, problem), predicted=instead(problem, window_right=-1))


@case(WRONG, "a window is dropped whose left side reaches all keys", "window (1000, 10)")
def varlen_window_wide(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, window_left=1000, window_right=10)
    predicted = instead(problem, window_left=-1, window_right=-1)
    return compared(problem, lambda: varlen(gems, problem), predicted=predicted)


@case(WRONG, "decoding with GQA returns the log-sum-exps of several sequences in a wrong order", "(h, batch)")
def varlen_lse_decode(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (1, 1, 1), (40, 70, 200))
    right = computed(problem, torch.float64)
    right["lse"] = right["lse"].unflatten(0, (2, 2)).transpose(1, 2).reshape(4, 3)
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"), right)


@case(RIGHT, "decoding one sequence with GQA, its log-sum-exp included", "(h, 1)")
def varlen_lse_decode_single(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (1,), (200,))
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(WRONG, "the log-sum-exp of a row that sees no key is +inf", "-inf; out is 0")
def varlen_empty_rows(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (100, 20), (40, 70), causal=True)
    predicted = computed(problem, torch.float64)
    predicted["lse"] = predicted["lse"].masked_fill(predicted["lse"] == -torch.inf, torch.inf)
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"), predicted)


@case(WRONG, "what dropout keeps is not divided by 1 - p", "the mean stays: 1 for values of 1")
def varlen_dropout(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (256,), (512,))
    problem = problem._replace(v=torch.ones_like(problem.v))
    arguments = (*problem[:3], *problem.layout[:4])
    mine = fap.flash_attn_varlen_func(*arguments, dropout_p=0.5).mean()
    right = {"mean": torch.ones((), dtype=torch.float64)}
    predicted = {"mean": torch.tensor(0.5, dtype=torch.float64)}
    evidence = Evidence(mine={"mean": mine.cpu()}, right=right, bounds={"mean": 0.05}, predicted=predicted)
    return called(evidence, lambda: {"mean": varlen(gems, problem, dropout_p=0.5)["out"].mean()})


@case(WRONG, "s_aux (a sink) is accepted and ignored", "one more logit per head")
def varlen_sink(gems: ModuleType, device: torch.device) -> Evidence:
    sink = torch.full((4,), 4.0, device=device)
    problem = packed(device, LENGTHS, sink=sink)
    predicted = instead(problem, sink=None)
    return compared(problem, lambda: varlen(gems, problem, s_aux=sink), ("out", "lse"), predicted)


@case(WRONG, "a scale of 0 gives NaN", "every key counts the same")
def varlen_scale_zero(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, softmax_scale=0.0)
    return compared(problem, lambda: varlen(gems, problem))


@case(WRONG, "pages that lie apart are read as if they lay side by side", "keys and values in one tensor of pages")
def varlen_page_strides(gems: ModuleType, device: torch.device) -> Evidence:
    problem = paged(device, (20, 64), (70, 200))
    pool = draw(device, len(problem.k), 2, 16, 2, 64, seed=9)
    problem = problem._replace(k=pool[:, 0], v=pool[:, 1])
    beside = (16 * 2 * 64, 2 * 64, 64, 1)
    read = [torch.as_strided(x, x.shape, beside, x.storage_offset()) for x in (problem.k, problem.v)]
    predicted = computed(problem._replace(k=read[0], v=read[1]), torch.float64)
    return compared(problem, lambda: varlen(gems, problem), predicted=predicted)


@case(BROKEN, "offsets into pages are 32-bit numbers: more than 2**31 elements overflow", "the last pages", alone=True)
def varlen_paged_overflow(gems: ModuleType, device: torch.device) -> Evidence:
    if device.type == "cpu":
        raise NotHereError("needs 5 GB")
    pages = 2**31 // (16 * 2 * 64) + 16
    pool = torch.empty(pages, 16, 2, 64, dtype=DTYPE, device=device)
    few = paged(device, (20,), (200,))
    pool[-len(few.k) :] = few.k
    table = few.layout.block_table + (pages - len(few.k))
    big = few._replace(k=pool, v=pool, layout=few.layout._replace(block_table=table))
    mine = {"out": by_ours(big)["out"].cpu()}
    evidence = compared(few._replace(v=few.k), lambda: varlen(gems, big))
    evidence.mine = mine
    return evidence


@case(RAISES, "k and v of different strides raise AssertionError", "any strides", raises="AssertionError")
def varlen_value_strides(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS)
    v = draw(device, sum(LENGTHS), 4, 64, seed=9)[:, ::2]
    problem = problem._replace(v=v)
    return compared(problem, lambda: varlen(gems, problem))


@case(RAISES, "seqused_k without pages does not compile", "the used part of each sequence", raises="CompilationError")
def varlen_seqused(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS)
    used = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    q, k, v, _, layout, _ = problem
    problem = problem._replace(layout=layout._replace(seqused_k=used))
    arguments = (q, k, v, layout.max_seqlen_q, layout.cu_seqlens_q, layout.max_seqlen_k)
    return compared(problem, lambda: {"out": gems.flash_attn_varlen_func(*arguments, seqused_k=used)})


@case(
    RAISES,
    "flash_attn_varlen_opt_func without pages raises AttributeError (torch.emtpty)",
    "attention",
    raises="AttributeError",
)
def varlen_opt(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS)
    q, k, v, _, layout, _ = problem
    arguments = (q, k, v, layout.max_seqlen_q, layout.cu_seqlens_q, layout.max_seqlen_k, layout.cu_seqlens_k)
    return compared(problem, lambda: {"out": gems.flash_attn_varlen_opt_func(*arguments)})


# What calls cost


def _seconds(call: Callable, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _first_and_again(calls: list[Callable], device: torch.device) -> str:
    """The slowest first call and the fastest second one of all but the first, which compiles for everybody."""
    _seconds(calls[0], device)
    first = max(_seconds(call, device) for call in calls[1:])
    again = min(_seconds(call, device) for call in calls[1:])
    return f"{first * 1e3:.1f} ms, again {again * 1e3:.2f} ms"


def _recompiles(calls: list[Callable], ours: list[Callable], entry: Any, device: torch.device) -> Evidence:
    mine = _first_and_again(ours, device)
    before = sum(map(len, entry.kernel_cache))
    theirs = _first_and_again(calls, device)
    compiled = sum(map(len, entry.kernel_cache)) - before
    note = f"{compiled} kernels for {len(calls)} values; a new value costs {theirs}; ours {mine}"
    return Evidence(holds=compiled >= len(calls), note=note)


@case(FACT, "every softmax scale compiles anew", "one kernel")
def cost_scale(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS)
    entry = kernel(gems, "flash_kernel", "flash_varlen_fwd_kernel")
    problems = [problem._replace(variant=Variant(softmax_scale=scale)) for scale in (0.11, 0.12, 0.13, 0.14)]
    calls, ours = ([functools.partial(run, *a, p) for p in problems] for run, a in ((varlen, [gems]), (by_ours, [])))
    return _recompiles(calls, ours, entry, device)


@case(FACT, "every window compiles anew", "one kernel")
def cost_window(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS)
    entry = kernel(gems, "flash_kernel", "flash_varlen_fwd_kernel")
    problems = [problem._replace(variant=Variant(window_left=n, window_right=5)) for n in (11, 12, 13, 14)]
    calls, ours = ([functools.partial(run, *a, p) for p in problems] for run, a in ((varlen, [gems]), (by_ours, [])))
    return _recompiles(calls, ours, entry, device)


@case(FACT, "flash_attention_forward compiles anew for every batch size", "one kernel")
def cost_batch(gems: ModuleType, device: torch.device) -> Evidence:
    problems = [dense(device, batch=batch) for batch in (2, 3, 4, 5)]
    flash(gems, problems[0])  # chooses the config
    entry = kernel(gems, "flash_kernel", "flash_fwd_kernel")
    for cache in entry.kernel_cache:
        cache.clear()
    calls, ours = (
        [functools.partial(run, *a, p) for p in problems] for run, a in ((_flash_again, [gems]), (by_ours, []))
    )
    return _recompiles(calls, ours, entry, device)


@case(FACT, "a launch through libentry costs the host more than one by plain Triton", "about as much", alone=True)
def cost_launch(gems: ModuleType, device: torch.device) -> Evidence:
    entry = kernel(gems, "flash_kernel", "flash_varlen_fwd_kernel")
    problem = packed(device, (16,), heads=2, heads_k=2)
    seen: list[tuple] = []
    run = type(entry).run

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        if self is entry:
            seen.append((arguments, options))
        return run(self, *arguments, **options)

    type(entry).run = watched
    try:
        varlen(gems, problem)
    finally:
        type(entry).run = run
    arguments, options = seen[-1]
    grid = options["grid"]
    options = {name: value for name, value in options.items() if name not in ("grid", "warmup")}
    calls = {
        "libentry": lambda: entry[grid](*arguments, **options),
        "plain Triton": lambda: entry.jit_function[grid](*arguments, **options),
        "flash_attn_varlen_func": lambda: varlen(gems, problem),
        "ours, whole call": lambda: by_ours(problem),
    }
    micros = {}
    for name, call in calls.items():
        batches = []
        for _ in range(12):
            start = time.perf_counter()
            for _ in range(50):
                call()
            batches.append((time.perf_counter() - start) / 50 * 1e6)
            if device.type == "cuda":
                torch.cuda.synchronize()
        micros[name] = statistics.median(batches[2:])
    note = ", ".join(f"{name} {value:.0f} us" for name, value in micros.items())
    return Evidence(holds=micros["libentry"] > 1.5 * micros["plain Triton"], note=f"{len(arguments)} arguments: {note}")


# The package


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    done = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=done, check=False)


def _last_line(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if not line.startswith(" ") and "Error" in line]
    return (errors or lines or [""])[-1][:160]


MISSING = (
    *("flash_attn_with_kvcache", "flash_attn_func", "flash_attn_backward", "flash_attention_backward"),
    *("flash_attn_varlen_backward", "flash_attn_combine", "merge_attn_states"),
)
PRESENT = (
    *("flash_attention_forward", "flash_attn_varlen_func", "flash_attn_varlen_opt_func", "flash_mla"),
    *("scaled_dot_product_attention", "scaled_dot_product_attention_forward"),
    *("scaled_dot_product_attention_backward", "reshape_and_cache", "reshape_and_cache_flash", "apply_rotary_pos_emb"),
)


@case(FACT, "there is no attention over a KV cache and no backward in flash-attn's layout", "both")
def package_names(gems: ModuleType, device: torch.device) -> Evidence:
    found = [name for name in MISSING if hasattr(gems, name)]
    absent = [name for name in PRESENT if not hasattr(gems, name)]
    note = f"found after all: {found}" if found else f"none of {', '.join(MISSING)}"
    return Evidence(holds=not found and not absent, note=note + (f"; absent: {absent}" if absent else ""))


@case(RIGHT, "reshape_and_cache_flash writes keys and values into pages", "bit-equal copies")
def package_append(gems: ModuleType, device: torch.device) -> Evidence:
    k, v = (draw(device, 20, 2, 64, seed=seed) for seed in (1, 2))
    caches = [torch.zeros(8, 16, 2, 64, dtype=DTYPE, device=device) for _ in range(4)]
    slots = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:20].to(device)
    for cache, x in zip(caches[:2], (k, v), strict=True):
        cache.view(128, 2, 64)[slots] = x
    one = torch.ones((), device=device)
    right = {name: x.double().cpu() for name, x in zip("kv", caches[:2], strict=True)}

    def call() -> Results:
        gems.reshape_and_cache_flash(k, v, *caches[2:], slots, "auto", one, one)
        return {"k": caches[2], "v": caches[3]}

    return called(Evidence(right=right, bounds={"k": 0.0, "v": 0.0}), call)


@case(FACT, "vendors' operators are rebound on the top-level module only", "one name, one function")
def package_overrides(gems: ModuleType, device: torch.device) -> Evidence:
    ops = sys.modules.get("flag_gems.ops")
    if ops is None:
        raise NotHereError("no flag_gems.ops")
    names = [name for name in getattr(ops, "__all__", dir(ops)) if callable(getattr(gems, name, None))]
    differ = [name for name in names if getattr(gems, name) is not getattr(ops, name, None)]
    return Evidence(holds=bool(differ), note=f"{len(differ)} of {len(names)} names differ: {', '.join(differ[:6])}")


@case(FACT, "libentry passes constexprs on for Triton 3.3 to 3.6 only", "every Triton")
def package_triton(gems: ModuleType, device: torch.device) -> Evidence:
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version <= (3, 6):
        raise NotHereError(f"Triton {triton.__version__}: shows from 3.7 on")
    problem = packed(device, LENGTHS, causal=True)
    evidence = compared(
        problem, lambda: {**varlen(gems, problem), **varlen(gems, problem)}
    )  # the second is by libentry
    said = verdict(WRONG, evidence)
    return Evidence(holds=said != "not reproduced", note=f"Triton {triton.__version__}: {said}")


@case(FACT, "the import takes seconds, and initialises CUDA", "lazily")
def package_import(gems: ModuleType, device: torch.device) -> Evidence:
    code = """
import time, torch
start = time.perf_counter()
import flag_gems
print(f"{time.perf_counter() - start:.1f} {torch.cuda.is_initialized()}")
start = time.perf_counter()
import flash_attn_plus
print(f"{time.perf_counter() - start:.2f}")
"""
    done = _python(code)
    if done.returncode:
        return Evidence(raised=RuntimeError(_last_line(done)))
    seconds, initialised, ours = done.stdout.split()[-3:]
    note = f"{seconds} s after torch, CUDA initialised: {initialised}; flash_attn_plus {ours} s"
    return Evidence(holds=initialised == "True", note=note)


@case(FACT, "without a device the import raises RuntimeError, not ImportError", "an import, or ImportError")
def package_no_device(gems: ModuleType, device: torch.device) -> Evidence:
    done = _python("import flag_gems", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    said = _last_line(done) if done.returncode else "it imports"
    return Evidence(holds=said.startswith("RuntimeError"), note=said)


@case(FACT, "it asks every vendor's command-line tool which device this is, unless GEMS_VENDOR names one", "PyTorch")
def package_vendor_tools(gems: ModuleType, device: torch.device) -> Evidence:
    code = """
import os, subprocess, sys
os.environ.pop("GEMS_VENDOR", None)
tools, run = [], subprocess.run
def watched(command, *arguments, **options):
    if sys._getframe(1).f_globals.get("__name__", "").startswith("flag_gems"):  # and not by Triton, which asks too
        tools.append(command[0] if command else "(nothing)")
    return run(command, *arguments, **options)
subprocess.run = watched
try:
    import flag_gems
except RuntimeError:
    pass
print(" ".join(tools))
"""
    done = _python(code)
    tools = done.stdout.splitlines()[-1].split() if done.stdout.split() else []
    return Evidence(holds=len(tools) > 2, note=f"{len(tools)}: {' '.join(tools)}")


@case(FACT, "nothing of it works in Triton's interpreter", "kernels that can be debugged")
def package_interpreter(gems: ModuleType, device: torch.device) -> Evidence:
    done = _python("import flag_gems", TRITON_INTERPRET="1")
    return Evidence(holds=done.returncode != 0, note=_last_line(done) if done.returncode else "it imports")


# Verdicts


def wrong_names(found: Results, right: Results, bounds: dict[str, float]) -> list[str]:
    return [name for name, x in right.items() if name not in found or difference(found[name], x)[0] > bounds[name]]


def verdict(claim: str, evidence: Evidence, raises: str = "") -> str:
    if evidence.raised is not None:
        said = reason(evidence.raised)
        if claim == BROKEN:
            expected = "illegal memory access" in str(evidence.raised)
        else:
            expected = claim == RAISES and type(evidence.raised).__name__ == raises
        return f"as reported: raised {said}" if expected else f"raised {said}"
    if evidence.holds is not None:
        return "as reported" if evidence.holds else "not reproduced"
    wrong = wrong_names(evidence.theirs, evidence.right, evidence.bounds)
    outside = "outside" in evidence.note
    if claim == RAISES:
        return "not reproduced" if not wrong else "wrong, not as predicted"
    if not wrong and not outside:
        return "as reported" if claim == RIGHT else "not reproduced"
    if claim == RIGHT:
        return "wrong, reported as right"
    if evidence.predicted is not None:
        expected = {name: evidence.predicted[name] for name in evidence.right}
        if wrong_names(evidence.theirs, expected, evidence.bounds):
            return "wrong, not as predicted"
    return "as reported"


def ours_is_wrong(evidence: Evidence) -> bool:
    return bool(evidence.mine) and bool(wrong_names(evidence.mine, evidence.right, evidence.bounds))


def worst(found: Results, right: Results) -> tuple[str, str, str]:
    """Largest and relative difference over the results, and what is not finite."""
    if not found:
        return "", "", ""
    rows = {name: difference(found[name], x) for name, x in right.items() if name in found}
    counts = [f"{name}: {n} of {right[name].numel()} not finite" for name, (_, _, n) in rows.items() if n]
    return f"{max(r[0] for r in rows.values()):.1e}", f"{max(r[1] for r in rows.values()):.1e}", "; ".join(counts)


def row_of(case: Case, evidence: Evidence) -> dict[str, str]:
    theirs, mine = (worst(found, evidence.right) for found in (evidence.theirs, evidence.mine))
    said = verdict(case.claim, evidence, case.raises) + ("; OURS IS WRONG" if ours_is_wrong(evidence) else "")
    note = "; ".join(filter(None, (evidence.note, theirs[2])))
    return row(case, said, note, theirs, mine)


def row(case: Case, said: str, note: str = "", theirs: tuple = ("", ""), mine: tuple = ("", "")) -> dict[str, str]:
    finding = f"right: {case.finding}" if case.claim == RIGHT else case.finding
    values = (case.name, finding, case.right, *theirs[:2], *mine[:2], said, note)
    return dict(zip(COLUMNS, values, strict=True))


# Worker processes


def work(names: list[str], device: torch.device, out: Path) -> int:
    """Runs cases one after the other, and writes a line before and after each; the parent reads them."""

    def say(line: dict) -> None:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    try:
        import flag_gems as gems
    except Exception as error:  # RuntimeError where there is no device
        say({"not imported": reason(error)})
        return 2
    say({"version": getattr(gems, "__version__", "?")})
    for name in names:
        say({"begun": name})
        try:
            evidence = CASES[name].run(gems, device)
        except NotHereError as why:
            said = row(CASES[name], f"not run: {why}")
        except Exception as error:
            traceback.print_exc()
            evidence = Evidence(raised=error)
            said = row_of(CASES[name], evidence)
        else:
            said = row_of(CASES[name], evidence)
        say({"row": said})
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception:  # this process can do nothing more on its device
                return 3
    return 0


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")] if out.exists() else []


def attend(names: list[str], options: argparse.Namespace, folder: Path) -> dict:
    """Runs cases in processes until each has a row: {"rows": ..., "version": ..., "not imported": ...}."""
    rows: dict[str, dict] = {}
    facts: dict[str, str] = {}
    left = list(names)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton"), "FLAGGEMS_CACHE_DIR": str(folder / "gems")}
    if torch.version.cuda:
        environment.setdefault("GEMS_VENDOR", "nvidia")  # else its import runs every vendor's command-line tool
    while left and time.monotonic() < options.deadline:
        out = folder / f"{left[0]}.jsonl"
        command = [sys.executable, __file__, "--device", options.device, "--work", str(out), "--cases", ",".join(left)]
        with (folder / f"{left[0]}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            seen, since, late = 0, time.monotonic(), False
            while process.poll() is None:
                time.sleep(0.1)
                if time.monotonic() > options.deadline:
                    process.kill()
                if len(lines_of(out)) > seen:
                    seen, since = len(lines_of(out)), time.monotonic()
                elif time.monotonic() - since > options.timeout:
                    late = True
                    process.kill()
            process.wait()
        begun = None
        for line in lines_of(out):
            begun = line.get("begun", begun)
            if "row" in line:
                rows[line["row"]["case"]] = line["row"]
                begun = None
            facts |= {name: line[name] for name in ("version", "not imported") if name in line}
        if "not imported" in facts:
            return {"rows": {}, **facts}
        if time.monotonic() > options.deadline:
            break
        culprit = begun or next((name for name in left if name not in rows), None)
        if culprit is not None and (late or begun or not any(name in rows for name in left)):
            said = f"timed out after {options.timeout:.0f} s" if late else f"crashed with status {process.returncode}"
            tail = (folder / f"{left[0]}.log").read_text().strip().splitlines()[-1:]
            rows[culprit] = row(CASES[culprit], said, tail[0][:160] if tail else "")
        left = [name for name in left if name not in rows]
    for name in names:
        rows.setdefault(name, row(CASES[name], "not run", "out of time"))
    return {"rows": rows, **facts}


def groups_of(names: list[str], size: int) -> list[list[str]]:
    """Cases of one kind in one process, not too many; those that may harm others alone; the one that tunes first."""
    found = [[name] for name in names if CASES[name].alone]
    kinds: dict[str, list[str]] = {}
    for name in names:
        if not CASES[name].alone:
            kinds.setdefault(CASES[name].group, []).append(name)
    for members in kinds.values():
        found += [members[i : i + size] for i in range(0, len(members), size)]
    return sorted(found, key=lambda group: "sdpagrad_tuned" not in group)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="cpu: for a stand-in of flag_gems")
    parser.add_argument("--cases", default="", metavar="NAMES", help="default: all of them")
    parser.add_argument("--list", action="store_true", help="the names of the cases")
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="processes at once"
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each case")
    parser.add_argument("--at-most", type=float, default=math.inf, help="seconds in all; then the rest is not run")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", default=None, help="what is measured, where there is no git to say so")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.names = options.cases.split(",") if options.cases else list(CASES)
    if unknown := set(options.names) - set(CASES):
        parser.error(f"--cases: expected names that --list shows, got {', '.join(sorted(unknown))}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.list:
        print("\n".join(CASES))
        return 0
    if options.work:
        return work(options.names, torch.device(options.device), options.work)
    if importlib.util.find_spec("flag_gems") is None:
        print("flag_gems is not installed: pip install --no-deps flag_gems==5.0.2, ", end="", file=sys.stderr)
        print("and pip install sqlalchemy pyyaml packaging", file=sys.stderr)
        return 2
    start = time.monotonic()
    options.deadline = start + options.at_most
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        attended = functools.partial(attend, options=options, folder=Path(folder))
        results = list(pool.map(attended, groups_of(options.names, 5)))
    rows = {name: row for result in results for name, row in result["rows"].items()}
    if why := next((result["not imported"] for result in results if "not imported" in result), None):
        print(f"flag_gems is installed but does not import: {why}", file=sys.stderr)
        return 2
    version = next((result["version"] for result in results if "version" in result), "?")
    commit = checkout() if options.commit is None else options.commit
    facts = {**machine(options.device, commit), "flag_gems": version}
    ordered = [rows[name] for name in options.names]
    print(", ".join(f"{name} {facts[name]}" for name in MACHINE), end="\n\n")
    print(markdown([COLUMNS, *([r[column].replace("|", "\\|") for column in COLUMNS] for r in ordered)]))
    agreed = sum(r["verdict"].startswith("as reported") for r in ordered)
    skipped = sum(r["verdict"].startswith("not run") for r in ordered)
    seconds = time.monotonic() - start
    print(f"\n{agreed} of {len(ordered)} as reported, {skipped} not run, in {seconds:.0f} s")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *MACHINE])
            writer.writeheader()
            writer.writerows({**r, **facts} for r in ordered)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "cases": ordered}, indent=1) + "\n")
    return 1 if any("OURS IS WRONG" in r["verdict"] for r in ordered) else 0


if __name__ == "__main__":
    sys.exit(main())
