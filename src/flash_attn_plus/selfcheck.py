"""Small attention problems on one device, forward and backward, held to the oracle; the few of them that find an
installation, a driver or a device that is broken, in seconds. The rule is that of the tests (tolerance.py); the tests
find what is wrong in a kernel.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flash_attn_plus

from . import reference, tolerance
from .schemas import Variant, Varlen
from .tolerance import Result, Results


class Check(NamedTuple):
    """One problem. ``lengths`` are those of a packed batch, of queries and (unless ``lengths_k``) of keys."""

    name: str
    dtype: torch.dtype
    head_dim: int = 64
    seqlen_q: int = 96
    seqlen_k: int = 96
    lengths: tuple[int, ...] = ()
    window_left: int = -1
    backward: bool = True
    window_right: int = -1
    causal: bool = True
    softcap: float = 0.0
    options: str = ""  # of "alibi", "bias", "sink", "dropout"; "lse": the gradient comes through it too
    batch: int = 2
    heads: int = 4
    heads_k: int = 2
    head_dim_v: int | None = None  # None: head_dim
    lengths_k: tuple[int, ...] = ()
    page_size: int = 0  # 0: keys are not in pages
    layout: str = "contiguous"  # or "sliced", "heads first", "every other" (column); "packed": q, k, v in one tensor

    @property
    def shape(self) -> str:
        lengths = f"{self.seqlen_q} x {self.seqlen_k}"
        if self.lengths:
            lengths = "+".join(map(str, self.lengths)) + (
                f" x {'+'.join(map(str, self.lengths_k))}" * bool(self.lengths_k)
            )
        batch = "" if self.lengths else f"{self.batch} x "
        dims = f"{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v else "")
        return f"{batch}({lengths}), {self.heads}:{self.heads_k} heads, d {dims}"

    def run(self, device: torch.device, again: bool = False) -> Outcome:
        """Raises what the kernels raise. ``again`` holds a second call to the bits of the first."""
        return measure(lambda: _ours(self, _inputs(self, device)), lambda: _expected(self), self.dtype, again)


# Each is a kernel, or three, to compile on a GPU: these few meet every dtype and every pass.
CHECKS = (
    Check("causal", torch.bfloat16),
    Check("sliding window", torch.float32, window_left=20),
    Check("packed sequences", torch.bfloat16, lengths=(17, 0, 70, 33)),
    Check("one query", torch.float16, head_dim=128, seqlen_q=1, seqlen_k=200, backward=False),
)


class Outcome(NamedTuple):
    results: list[Result]
    seconds: float
    first_call_seconds: float  # of that: until the kernels' first results; on a GPU this compiles them


def measure(
    ours: Callable[[], Results],
    expected: Callable[[], tuple[Results, list[Results]]],
    dtype: torch.dtype,
    again: bool = False,
    exact: tuple[str, ...] = (),
) -> Outcome:
    """What ``ours`` computes on a device, against the oracle and the trials that ``expected`` computes on the CPU: it
    has float64, and is no part of what may be broken. ``dtype`` is that of the inputs.
    """
    start = time.perf_counter()
    with torch.enable_grad():
        actual = _on_cpu(ours())
        first_call_seconds = time.perf_counter() - start
        second = _on_cpu(ours()) if again else None
        results = tolerance.compare(actual, *expected(), dtype, exact)
    if second is not None:
        results.append(tolerance.same_bits(actual, second))
    return Outcome(results, time.perf_counter() - start, first_call_seconds)


def _on_cpu(results: Results) -> Results:
    return {name: x.cpu() for name, x in results.items() if x is not None}


class _Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    layout: Varlen | None
    variant: Variant


def _inputs(check: Check, device: torch.device) -> _Inputs:
    generator = torch.Generator().manual_seed(1)  # of its own: the caller's random numbers stay what they are

    def draw(*shape: int, dtype: torch.dtype = check.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    def leaf(x: Tensor) -> Tensor:
        return x.requires_grad_(check.backward)

    layout, of_q, of_k, of_lse = None, (check.batch, check.seqlen_q), (check.batch, check.seqlen_k), ()
    if check.lengths:
        layout, of_k = _layout(check, device)
        of_q = (sum(check.lengths),)
        of_lse = (check.heads, *of_q)
    else:
        of_lse = (check.batch, check.heads, check.seqlen_q)
    dim_v = check.head_dim_v or check.head_dim
    q, dout = draw(*of_q, check.heads, check.head_dim), draw(*of_q, check.heads, dim_v)
    k, v = draw(*of_k, check.heads_k, check.head_dim), draw(*of_k, check.heads_k, dim_v)
    options: dict[str, Any] = {}
    wanted = check.options.split()
    if "alibi" in wanted:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1.0, check.heads + 1, device=device)
    if "sink" in wanted:
        options["sink"] = leaf(draw(check.heads))
    if "bias" in wanted:
        options["attn_bias"] = leaf(draw(1, check.heads, check.seqlen_q, check.seqlen_k))
    if "dropout" in wanted:
        options |= dict(dropout_p=0.2, rng_state=torch.tensor([2**40 + 7, 3], device=device))
    variant = Variant(
        causal=check.causal,
        window_left=check.window_left,
        window_right=check.window_right,
        softcap=check.softcap,
        **options,
    )
    q, k, v = (leaf(laid_out(x, check.layout)) for x in (q, k, v))
    return _Inputs(q, k, v, dout, draw(*of_lse, dtype=torch.float32), layout, variant)


def _layout(check: Check, device: torch.device) -> tuple[Varlen, tuple[int, ...]]:
    """And the rows of k: those of all sequences, or (pages, page size)."""

    def starts(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    lengths_k = check.lengths_k or check.lengths
    of_q = starts(check.lengths)
    layout = Varlen(of_q, starts(lengths_k) if check.lengths_k else of_q, max(check.lengths), max(lengths_k))
    if not check.page_size:
        return layout, (sum(lengths_k),)
    table, pages = page_table(lengths_k, check.page_size)
    return layout._replace(block_table=table.to(device)), (pages, check.page_size)


def page_table(lengths: tuple[int, ...], page_size: int) -> tuple[Tensor, int]:
    """(batch, pages of the longest), the last pages first, and how many pages there are; page 0 belongs to nobody."""
    counts = [-(-length // page_size) for length in lengths]
    pages = sum(counts) + 1
    numbers = iter(range(pages - 1, 0, -1))
    rows = [[next(numbers) for _ in range(count)] + [0] * (max(counts) - count) for count in counts]
    return torch.tensor(rows, dtype=torch.int32), pages


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers at the strides that a name stands for; NaN lies between them."""
    if layout == "sliced":
        into = x.new_full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 8), torch.nan)[..., 1:, : x.shape[-1]]
    elif layout == "heads first":
        into = x.new_full((*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1]), torch.nan).transpose(-2, -3)
    elif layout == "every other":
        into = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., ::2]
    else:
        return x
    return into.copy_(x)


def _ours(check: Check, inputs: _Inputs) -> Results:
    """By the public functions, and with dropout by the operators: the oracle must know their random state."""
    (q, k, v), (layout, variant) = inputs[:3], inputs[5:]
    if variant.dropout_p:
        ops = torch.ops.flash_attn_plus
        out, lse = ops.fwd(q, k, v, *variant) if layout is None else ops.varlen_fwd(q, k, v, *layout[:4], *variant)
        return _with_gradients(check, out, lse, (q, k, v), inputs)
    options = dict(
        causal=variant.causal, window_size=(variant.window_left, variant.window_right), softcap=variant.softcap
    )
    options |= dict(alibi_slopes=variant.alibi_slopes, attn_bias=variant.attn_bias, sink=variant.sink, return_lse=True)
    if check.layout == "packed":
        qkv = torch.stack([x.detach() for x in (q, k, v)], dim=-3).requires_grad_(check.backward)
        if layout is None:
            out, lse = flash_attn_plus.flash_attn_qkvpacked_func(qkv, **options)
        else:
            starts, _, longest, *_ = layout
            out, lse = flash_attn_plus.flash_attn_varlen_qkvpacked_func(qkv, starts, longest, **options)
        return _with_gradients(check, out, lse, (qkv,), inputs)
    if layout is None:
        out, lse = flash_attn_plus.flash_attn_func(q, k, v, **options)
    else:
        options["block_table"] = layout.block_table
        out, lse = flash_attn_plus.flash_attn_varlen_func(q, k, v, *layout[:4], **options)
    return _with_gradients(check, out, lse, (q, k, v), inputs)


def _expected(check: Check) -> tuple[Results, list[Results]]:
    inputs = _inputs(check, torch.device("cpu"))
    return _plain(check, inputs, torch.float64), [_plain(check, inputs, None, number) for number in range(3)]


def _plain(check: Check, inputs: _Inputs, dtype: torch.dtype | None, number: int = 0) -> Results:
    """The textbook's maths in ``dtype`` (None: the inputs'), of equal problems, whose sums round otherwise: q is longer
    by what the scale is smaller, and columns are in another order (0: neither).
    """
    stretch = (1.0, 1.3, 0.7)[number]
    of_qk, of_v = (_order(x.shape[-1], number) for x in (inputs.q, inputs.v))

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype or x.dtype).requires_grad_(check.backward)

    q, k, v = map(leaf, inputs[:3])
    sink, bias = leaf(inputs.variant.sink), leaf(inputs.variant.attn_bias)
    variant = inputs.variant._replace(softmax_scale=check.head_dim**-0.5 / stretch, sink=sink, attn_bias=bias)
    equal = q[..., of_qk] * stretch, k[..., of_qk], v[..., of_v]
    if inputs.layout is None:
        out, lse = reference.attention(*equal, variant, dtype=dtype)
    else:
        out, lse = reference.varlen_attention(*equal, inputs.layout, variant, dtype=dtype)
    return _with_gradients(check, out[..., of_v.argsort()], lse, (q, k, v), inputs._replace(variant=variant))


def _order(columns: int, number: int) -> Tensor:
    if number == 0:
        return torch.arange(columns)
    return torch.randperm(columns, generator=torch.Generator().manual_seed(number))


def _with_gradients(check: Check, out: Tensor, lse: Tensor, qkv: tuple[Tensor, ...], inputs: _Inputs) -> Results:
    results = {"out": out.detach(), "lse": lse.detach()}
    if not check.backward:
        return results
    options = {"dsink": inputs.variant.sink, "dbias": inputs.variant.attn_bias}
    options = {name: x for name, x in options.items() if x is not None}
    # Of a sum: given gradients to start from, PyTorch imports its symbolic shapes, which takes a second.
    loss = (out * inputs.dout.to(out.dtype)).sum()
    if "lse" in check.options.split():
        loss = loss + (lse * inputs.dlse.to(lse.dtype)).sum()
    (*grads,) = torch.autograd.grad(loss, (*qkv, *options.values()))
    if len(qkv) == 1:
        grads = [*grads[0].unbind(-3), *grads[1:]]
    return results | dict(zip(("dq", "dk", "dv", *options), grads, strict=True))
