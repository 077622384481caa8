"""What a case of flag_gems_report.py is, what it finds, and what is said of that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from attention import reason
from torch import Tensor

from flash_attn_plus import reference
from flash_attn_plus.schemas import Variant, Varlen

DTYPE = torch.float16
FACTOR = 8.0  # times the error of the same maths in plain PyTorch
GUARD = 2**18  # elements before and behind what a call allocates
SENTINEL = 77
LN2, LOG2E = math.log(2), 1 / math.log(2)
RIGHT, WRONG, RAISES, FACT = "right", "wrong", "raises", "fact"
BROKEN = "broken"  # wrong, or an illegal access to memory: which of them, and how, nothing says

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
    """What one case found. ``holds`` is whether a fact is so; otherwise results are compared.

    ``predicted`` is what flag_gems computes instead, but for elements that ``unspecified`` names, which depend on the
    order of its programs. ``outside`` counts the elements that it wrote outside its memory.
    """

    theirs: Results = field(default_factory=dict)
    mine: Results = field(default_factory=dict)
    right: Results = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    predicted: Results | None = None
    unspecified: dict[str, Tensor] = field(default_factory=dict)
    outside: int = 0
    predicted_outside: int = 0
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
    problem: Problem,
    call: Callable[[], Results],
    names: tuple[str, ...] = ("out",),
    predicted: Results | None = None,
    unspecified: dict[str, Tensor] | None = None,
    predicted_outside: int = 0,
) -> Evidence:
    """Ours runs first, and everything goes to the CPU: a call that breaks the device takes no result with it."""
    right, plain = computed(problem, torch.float64), computed(problem, None)
    evidence = Evidence(
        right={name: right[name] for name in names},
        predicted=predicted,
        unspecified=unspecified or {},
        predicted_outside=predicted_outside,
    )
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
            evidence.outside = guards.changed()
        except Exception as error:
            evidence.raised = error
    return evidence


def of_each(dims: tuple[int, ...], look: Callable[[int], Evidence]) -> Evidence:
    """Of the last head dimension, or of the first one that is not right."""
    for dim in dims:
        evidence = look(dim)
        evidence.note = f"head dimension {dim}"
        if verdict(RIGHT, evidence) != "as reported":
            break
    return evidence


def only_nan(problem: Problem) -> Results:
    return {"out": torch.full(problem.q.shape, torch.nan)}


def needs_no_gradient(results: Results) -> Evidence:
    needs = {name: x.requires_grad for name, x in results.items()}
    note = ", ".join(f"{name}.requires_grad is {it}" for name, it in needs.items())
    return Evidence(holds=not any(needs.values()), note=note)


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


# Verdicts


def wrong_names(found: Results, right: Results, bounds: dict[str, float]) -> list[str]:
    return [name for name, x in right.items() if name not in found or difference(found[name], x)[0] > bounds[name]]


def is_as_predicted(evidence: Evidence) -> bool:
    if evidence.outside != evidence.predicted_outside:
        return False
    expected, found, bounds = {}, {}, {}
    for name, right in evidence.right.items():
        if name not in evidence.theirs or evidence.theirs[name].shape != right.shape:
            return False
        left_out = evidence.unspecified.get(name, torch.zeros((), dtype=torch.bool))
        expected[name] = evidence.predicted[name].double().masked_fill(left_out, 0)
        found[name] = evidence.theirs[name].double().masked_fill(left_out, 0)
        # Rounding grows with the values.
        bounds[name] = evidence.bounds[name] * max(1.0, largest(expected[name]) / max(largest(right), 1e-30))
    return not wrong_names(found, expected, bounds)


def verdict(claim: str, evidence: Evidence, raises: str = "") -> str:
    if evidence.raised is not None:
        said = reason(evidence.raised)
        if claim == BROKEN and "illegal memory access" in str(evidence.raised):
            return f"broken, unspecified how: raised {said}"
        expected = claim == RAISES and type(evidence.raised).__name__ == raises
        return f"as reported: raised {said}" if expected else f"raised {said}"
    if evidence.holds is not None:
        return "as reported" if evidence.holds else "not reproduced"
    wrong = wrong_names(evidence.theirs, evidence.right, evidence.bounds) or evidence.outside
    if claim == RAISES:
        return "not reproduced" if not wrong else "wrong, not as predicted"
    if not wrong:
        return "as reported" if claim == RIGHT else "not reproduced"
    if claim == RIGHT:
        return "wrong, reported as right"
    if evidence.predicted is None:
        return "wrong, unspecified how"
    return "as reported" if is_as_predicted(evidence) else "wrong, not as predicted"


def ours_is_wrong(evidence: Evidence) -> bool:
    return bool(evidence.mine) and bool(wrong_names(evidence.mine, evidence.right, evidence.bounds))


def worst(found: Results, right: Results) -> tuple[str, str, str]:
    """Largest and relative difference over the results, and what is not finite."""
    if not found:
        return "", "", ""
    rows = {name: difference(found[name], x) for name, x in right.items() if name in found}
    counts = [f"{name}: {n} of {right[name].numel()} not finite" for name, (_, _, n) in rows.items() if n]
    return f"{max(r[0] for r in rows.values()):.1e}", f"{max(r[1] for r in rows.values()):.1e}", "; ".join(counts)
