"""A few small problems on one device, forward and backward, held to the oracle.

The rule is that of the tests: an error of at most 2 times (gradients: 3 times) that of the same maths in plain PyTorch
at the tested dtype, plus a rounding floor. It is here to find an installation, a driver or a device that is broken, in
seconds; the tests find what is wrong in a kernel.
"""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

import torch
from torch import Tensor

import flash_attn_plus

from . import reference
from .schemas import Variant, Varlen

_FACTORS = {"out": 2.0, "lse": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}


class Check(NamedTuple):
    """One problem. ``lengths`` are those of a packed batch, of queries and of keys; heads are 4, key heads 2."""

    name: str
    dtype: torch.dtype
    head_dim: int = 64
    seqlen_q: int = 96
    seqlen_k: int = 96
    lengths: tuple[int, ...] = ()
    window_left: int = -1
    backward: bool = True


# Each is a kernel, or three, to compile on a GPU: these few meet every dtype and every pass.
CHECKS = (
    Check("causal", torch.bfloat16),
    Check("sliding window", torch.float32, window_left=20),
    Check("packed sequences", torch.bfloat16, lengths=(17, 0, 70, 33)),
    Check("one query", torch.float16, head_dim=128, seqlen_q=1, seqlen_k=200, backward=False),
)


class Result(NamedTuple):
    """How far a result is from the oracle, and how far it may be. ``failure`` is "" where that is well."""

    name: str
    error: float | None  # None where there is none to speak of: a wrong shape, NaN
    bound: float
    failure: str


class Outcome(NamedTuple):
    results: list[Result]
    seconds: float
    first_call_seconds: float  # of that: until the kernels' first results; on a GPU this compiles them


class _Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    layout: Varlen | None
    variant: Variant


def run(check: Check, device: torch.device) -> Outcome:
    """Raises what the kernels raise."""
    start = time.perf_counter()
    inputs = _inputs(check, device)
    with torch.enable_grad():
        # Compared on the CPU: it has float64, and is no part of what may be broken.
        actual = {name: x.cpu() for name, x in _ours(check, inputs).items()}
        first_call_seconds = time.perf_counter() - start
        inputs = _inputs(check, torch.device("cpu"))
        oracle = _plain(check, inputs, torch.float64)
        # One evaluation can be close by luck: equal problems, q larger by what the scale is smaller.
        trials = [_plain(check, inputs, None, stretch) for stretch in (1.0, 1.3, 0.7)]
    # A flash backward recomputes P = exp(s - lse): the rounding of lse is a relative error of P, and of a gradient.
    recomputed = _rounding_floor(oracle["lse"], torch.float32)
    results = []
    for name, x in actual.items():
        expected = oracle[name]
        plain = max(_error(trial[name], expected) for trial in trials)
        relative = 0.0 if name in ("out", "lse") else recomputed
        floor = _rounding_floor(expected, x.dtype) + relative * _largest(expected)
        results.append(_result(name, x, expected, _FACTORS[name] * plain + floor))
    return Outcome(results, time.perf_counter() - start, first_call_seconds)


def _inputs(check: Check, device: torch.device) -> _Inputs:
    generator = torch.Generator().manual_seed(1)  # of its own: the caller's random numbers stay what they are

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(check.dtype).to(device).requires_grad_(check.backward)

    layout, batch = None, (2,)
    seqlen_q, seqlen_k = check.seqlen_q, check.seqlen_k
    if check.lengths:
        starts = torch.tensor([0, *itertools.accumulate(check.lengths)], dtype=torch.int32, device=device)
        layout = Varlen(starts, starts, max(check.lengths), max(check.lengths))
        batch, seqlen_q, seqlen_k = (), sum(check.lengths), sum(check.lengths)
    q, dout = (draw(*batch, seqlen_q, 4, check.head_dim) for _ in range(2))
    k, v = (draw(*batch, seqlen_k, 2, check.head_dim) for _ in range(2))
    return _Inputs(q, k, v, dout.detach(), layout, Variant(causal=True, window_left=check.window_left))


def _ours(check: Check, inputs: _Inputs) -> dict[str, Tensor]:
    """By the public functions."""
    q, k, v, dout, layout, _ = inputs
    options = dict(causal=True, window_size=(check.window_left, -1), return_lse=True)
    if layout is None:
        out, lse = flash_attn_plus.flash_attn_func(q, k, v, **options)
    else:
        out, lse = flash_attn_plus.flash_attn_varlen_func(q, k, v, *layout[:4], **options)
    return _with_gradients(check, out, lse, (q, k, v), dout)


def _plain(check: Check, inputs: _Inputs, dtype: torch.dtype | None, stretch: float = 1.0) -> dict[str, Tensor]:
    """The textbook's maths in ``dtype`` (None: the inputs'), on q times ``stretch``."""
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_(check.backward) for x in inputs[:3])
    variant = inputs.variant._replace(softmax_scale=check.head_dim**-0.5 / stretch)
    if inputs.layout is None:
        out, lse = reference.attention(q * stretch, k, v, variant, dtype=dtype)
    else:
        out, lse = reference.varlen_attention(q * stretch, k, v, inputs.layout, variant, dtype=dtype)
    return _with_gradients(check, out, lse, (q, k, v), inputs.dout)


def _with_gradients(check: Check, out: Tensor, lse: Tensor, inputs: tuple, dout: Tensor) -> dict[str, Tensor]:
    results = {"out": out.detach(), "lse": lse.detach()}
    if check.backward:
        # Of a sum: given gradients to start from, PyTorch imports its symbolic shapes, which takes a second.
        grads = torch.autograd.grad((out * dout.to(out.dtype)).sum(), inputs)
        results |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return results


def _result(name: str, actual: Tensor, expected: Tensor, bound: float) -> Result:
    if actual.shape != expected.shape:
        return Result(name, None, bound, f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    if not actual.isfinite().all():
        wrong = ~actual.isfinite()
        return Result(name, None, bound, f"{int(wrong.sum())} of {wrong.numel()} elements are not finite")
    error = _error(actual, expected)
    if error <= bound:
        return Result(name, error, bound, "")
    differences = (actual.double() - expected).abs()
    at = (differences == differences.max()).nonzero()[0].tolist()
    found, wanted = actual[tuple(at)].item(), expected[tuple(at)].item()
    return Result(
        name, error, bound, f"expected {wanted:.6g}, found {found:.6g} at {at}; error {error:.3g} > bound {bound:.3g}"
    )


def _error(actual: Tensor, expected: Tensor) -> float:
    return _largest(actual.double() - expected)


def _rounding_floor(expected: Tensor, dtype: torch.dtype) -> float:
    """Twice what rounding at ``dtype`` costs numbers of this size: two roundings of half a unit in the last place."""
    magnitude = torch.tensor(_largest(expected.to(dtype)) + 0.3, dtype=torch.float64)
    return 2 * torch.finfo(dtype).eps * 2.0 ** magnitude.log2().floor().item()


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
