"""How close is close enough, for whoever checks a device without the tests: by their rule, no number picked by hand.

A result may be 2 times (a gradient: 3 times) as far from the fp64 oracle as the same maths in plain PyTorch at the
tested dtype, plus a rounding floor.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

_FORWARD_FACTOR, _GRADIENT_FACTOR = 2.0, 3.0

Results = dict[str, Tensor]  # by name; of gradients: "d" and the name of what they are of


class Result(NamedTuple):
    """How far a result is from the oracle, and how far it may be. ``failure`` is "" where that is well."""

    name: str
    error: float | None  # None where there is none to speak of: no result, a wrong dtype or shape, NaN
    bound: float
    failure: str


def compare(
    actual: Results, oracle: Results, trials: list[Results], dtype: torch.dtype, exact: Collection[str] = ()
) -> list[Result]:
    """``actual`` by the rule, all on the CPU: every result that the oracle has, in the dtype that belongs to inputs of
    ``dtype``. ``trials`` are the same maths at the tested dtype, of equal problems: one can be close by luck, so the
    furthest from the oracle counts. ``exact`` names what has no error at all.
    """
    # A flash backward recomputes P = exp(s - lse): the rounding of lse is a relative error of P, and of a gradient.
    recomputed = rounding_floor(oracle["lse"], _dtype_of("lse", dtype)) if "lse" in oracle else 0.0
    results = []
    for name, of_oracle in oracle.items():
        expected = of_oracle.double()
        bound = 0.0
        if name not in exact:
            gradient = name.startswith("d")
            plain = max(_largest(_distance(trial[name], expected)) for trial in trials)
            relative = recomputed * _largest(expected) if gradient else 0.0
            floor = rounding_floor(expected, _dtype_of(name, dtype)) + relative
            bound = (_GRADIENT_FACTOR if gradient else _FORWARD_FACTOR) * plain + floor
        results.append(_result(name, actual.get(name), _dtype_of(name, dtype), expected, bound))
    return results


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of a result, by the inputs': that of a gradient is its input's, and no lse is rounded to 16 bits."""
    return torch.float32 if name == "lse" and dtype != torch.float64 else dtype


def same_bits(first: Results, second: Results) -> Result:
    """Whether a second call gave what the first one gave: it launches its kernels another way."""
    if first.keys() != second.keys() or any(_kind(x) != _kind(second[name]) for name, x in first.items()):
        return Result("second call", None, 0.0, "expected results of the first call's dtypes and shapes, got others")
    differ = [name for name, x in first.items() if not torch.equal(_bits(x), _bits(second[name]))]
    error = max((_largest(_distance(second[name], first[name].double())) for name in differ), default=0.0)
    failure = f"{', '.join(differ)}: expected the bits of the first call, got others" if differ else ""
    return Result("second call", error, 0.0, failure)


def rounding_floor(expected: Tensor, dtype: torch.dtype) -> float:
    """Twice what rounding at ``dtype`` costs numbers of this size: two roundings of half a unit in the last place."""
    magnitude = torch.tensor(_largest(expected.to(dtype)) + 0.3, dtype=torch.float64)
    return 2 * torch.finfo(dtype).eps * 2.0 ** magnitude.log2().floor().item()


def _result(name: str, actual: Tensor | None, dtype: torch.dtype, expected: Tensor, bound: float) -> Result:
    if actual is None:
        return Result(name, None, bound, "expected a result, got none")
    if actual.dtype != dtype:
        return Result(name, None, bound, f"expected {dtype}, got {actual.dtype}")
    if actual.shape != expected.shape:
        return Result(name, None, bound, f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    # -inf stands where the oracle has it: the log-sum-exp of a row that sees no key.
    wrong = (actual.isfinite() != expected.isfinite()) | (~expected.isfinite() & (actual.double() != expected))
    if wrong.any():
        finite = "are not what the oracle has" if not expected.isfinite().all() else "are not finite"
        return Result(name, None, bound, f"{int(wrong.sum())} of {wrong.numel()} elements {finite}")
    distances = _distance(actual, expected)
    error = _largest(distances)
    if error <= bound:
        return Result(name, error, bound, "")
    at = (distances == distances.max()).nonzero()[0].tolist()
    found, wanted = actual[tuple(at)].item(), expected[tuple(at)].item()
    return Result(
        name, error, bound, f"expected {wanted:.6g}, found {found:.6g} at {at}; error {error:.3g} > bound {bound:.3g}"
    )


def _distance(actual: Tensor, expected: Tensor) -> Tensor:
    """0 where something is not finite: ``_result`` sees to that."""
    distances = (actual.detach().double() - expected).abs()
    return distances.masked_fill(~distances.isfinite(), 0.0)


def _largest(x: Tensor) -> float:
    """Of the finite numbers."""
    finite = x[x.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def _kind(x: Tensor) -> tuple[torch.dtype, torch.Size]:
    return x.dtype, x.shape


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
