"""How close is close enough: no tolerance is picked by hand.

An operator may be ``factor`` times as far from the fp64 oracle as the same maths in plain PyTorch at the tested dtype,
plus a rounding floor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, Problem
from torch import Tensor

from flash_attn_plus import reference

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0

Douts = tuple[Tensor | None, Tensor | None]


def rounding_floor(oracle: Tensor, dtype: torch.dtype) -> float:
    """Twice what rounding at ``dtype`` costs numbers of the oracle's size.

    The most that ``2 * (ref + 0.3 - 0.3 - ref).abs().max()`` can be for numbers up to ref's largest: two roundings of
    half a unit in the last place. Taken literally it is 0 for a small tensor whose numbers happen to round well.
    """
    magnitude = torch.tensor(_largest(oracle.to(dtype)) + 0.3, dtype=torch.float64)
    return 2 * torch.finfo(dtype).eps * 2.0 ** magnitude.log2().floor().item()


def assert_close_to_oracle(
    actual: Tensor,
    oracle: Tensor,
    same_dtype: Tensor,
    factor: float = FORWARD_FACTOR,
    name: str = "result",
    relative: float = 0.0,
) -> None:
    """max |actual - oracle| <= factor * max |same_dtype - oracle| + the rounding floor at actual's dtype.

    ``oracle`` is fp64. -inf must stand exactly where the oracle has it; anything else that is not finite fails.
    ``relative`` adds to the floor that part of the oracle's largest number.
    """
    assert actual.shape == oracle.shape, f"{name}: expected shape {tuple(oracle.shape)}, got {tuple(actual.shape)}"
    oracle = oracle.detach().double()
    error, wrong = _error(actual, oracle)
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are not finite where the oracle is, or the reverse; "
        f"first at {_position(wrong)}: got {actual[wrong][0].item()}, expected {oracle[wrong][0].item()}"
    )
    finite = oracle[oracle.isfinite()]
    plain = _largest(_error(same_dtype, oracle)[0])
    floor = rounding_floor(finite, actual.dtype) + relative * _largest(finite)
    bound, worst = factor * plain + floor, _largest(error)
    assert worst <= bound, (
        f"{name}: error {worst:.3g} > bound {bound:.3g} = {factor:g} x {plain:.3g} (same maths at the tested dtype) "
        f"+ {floor:.3g} (rounding); worst at {_position(error == worst)}"
    )


def run_op(problem: Problem) -> tuple[Tensor, Tensor]:
    """out, lse of the operator."""
    ops = torch.ops.flash_attn_plus
    q, k, v, variant, varlen = problem
    if varlen is None:
        return ops.fwd(q, k, v, *variant)
    return ops.varlen_fwd(q, k, v, *varlen[:4], *variant, *varlen[4:])


def run_reference(problem: Problem, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """out, lse of the oracle, computed in ``dtype`` (None: the inputs')."""
    q, k, v, variant, varlen = problem
    if varlen is None:
        return reference.attention(q, k, v, variant, dtype=dtype)
    return reference.varlen_attention(q, k, v, varlen, variant, dtype=dtype)


def cast(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem with every differentiable input as a leaf of ``dtype``."""

    def leaf(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point():
            return x
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    q, k, v, variant, varlen = problem
    variant = variant._replace(sink=leaf(variant.sink), attn_bias=leaf(variant.attn_bias))
    return Problem(leaf(q), leaf(k), leaf(v), variant, varlen)


def gradients(outputs: tuple[Tensor, Tensor], problem: Problem, douts: Douts) -> dict[str, Tensor]:
    """Gradients of every differentiable input, through each of out and lse that has a gradient of its own."""
    inputs = problem.differentiable()
    used = [(output, dout.to(output.dtype)) for output, dout in zip(outputs, douts, strict=True) if dout is not None]
    grads = torch.autograd.grad(
        tuple(output for output, _ in used),
        tuple(inputs.values()),
        tuple(dout for _, dout in used),
        allow_unused=True,
        materialize_grads=True,
    )
    return {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def oracle_results(problem: Problem, douts: Douts | None) -> dict[str, Tensor]:
    """out, lse and gradients in fp64."""
    problem = cast(problem, torch.float64)
    return _results(problem, run_reference(problem, torch.float64), douts)


def same_dtype_results(
    problem: Problem, douts: Douts | None, oracle: dict[str, Tensor], lse_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The same maths in plain PyTorch at the problem's dtype; lse at ``lse_dtype`` instead, where one is given.

    One evaluation can be close by luck, most of all where a result has few elements. So equal problems are evaluated,
    whose sums round otherwise, and each result is the one of them that is furthest from the oracle.
    """
    if problem.q.dtype == torch.float64:
        # The oracle has fp64's error too: fp32's, scaled to fp64's precision, stands for it and for the maths' own.
        ratio = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        single = same_dtype_results(cast(problem, torch.float32), douts, oracle)
        return {name: torch.where(x.isfinite(), x + (single[name] - x) * ratio, x) for name, x in oracle.items()}
    trials = []
    for number in range(len(_STRETCHES)):
        trial = _results(problem, _run_equal(problem, number, None), douts)
        if lse_dtype is not None:
            with torch.no_grad():
                trial["lse"] = _run_equal(problem, number, lse_dtype)[1]
        trials.append(trial)
    return {name: max((t[name] for t in trials), key=lambda x: _largest(_error(x, oracle[name])[0])) for name in oracle}


def random_gradients(out: Tensor, lse: Tensor, loss: str = "out lse") -> Douts:
    """dout and dlse of a loss that depends on those that ``loss`` names."""
    generator = torch.Generator().manual_seed(1)
    named = {"out": out, "lse": lse}
    return tuple(
        torch.randn(x.shape, generator=generator).to(x) if name in loss.split() else None for name, x in named.items()
    )


def check_problem(
    problem: Problem,
    name: str,
    loss: str = "out lse",
    lse_maths: torch.dtype | None = None,
    run: Callable[[Problem], tuple[Tensor, Tensor]] = run_op,
) -> None:
    """The operator against the oracle: out, lse and all gradients of a ``loss`` of both ("" is forward only).

    ``lse_maths`` holds lse to the error of that dtype's maths instead of the tested one's; ``run`` is what runs
    instead of the operator.
    """
    dtype = problem.q.dtype
    outputs = run(problem)
    out, lse = outputs
    assert out.dtype == dtype, f"{name}: out: expected dtype {dtype}, got {out.dtype}"
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert lse.dtype == lse_dtype, f"{name}: lse: expected dtype {lse_dtype}, got {lse.dtype}"
    assert out.is_contiguous() and lse.is_contiguous(), f"{name}: expected contiguous results"

    douts = random_gradients(out, lse, loss) if loss else None
    actual = {"out": out, "lse": lse}
    if douts is not None:
        actual |= gradients(outputs, problem, douts)
    if problem.q.is_cuda:
        _check_again(problem, name, run, douts, actual)
    expected = oracle_results(problem, douts)
    plain = same_dtype_results(problem, douts, expected, lse_maths)
    sees_no_key = (expected["lse"] == float("-inf")).transpose(-1, -2)
    # A flash backward recomputes P = exp(s - lse): the rounding of lse is a relative error of P, and so of a gradient.
    # Plain PyTorch keeps P, which a row of one key makes exactly 1.
    recomputed = rounding_floor(lse[lse.isfinite()], lse_dtype)
    for tensor, value in actual.items():
        forward = tensor in ("out", "lse")
        factor, relative = (FORWARD_FACTOR, 0.0) if forward else (GRADIENT_FACTOR, recomputed)
        assert_close_to_oracle(value, expected[tensor], plain[tensor], factor, f"{name}, {dtype}: {tensor}", relative)
    for tensor in {"out", "dq"} & set(actual):
        assert (actual[tensor][sees_no_key] == 0).all(), f"{name}, {dtype}: {tensor}: not exactly 0 where lse is -inf"


def _check_again(problem: Problem, name: str, run: Callable, douts: Douts | None, first: dict[str, Tensor]) -> None:
    """A second call, which launches another way than the first one, has the same bits."""
    outputs = run(problem)
    again = dict(zip(("out", "lse"), outputs, strict=True))
    if douts is not None:
        again |= gradients(outputs, problem, douts)
    for tensor, value in again.items():
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
        same = torch.equal(value.detach().view(bits), first[tensor].detach().view(bits))
        assert same, f"{name}: {tensor}: a second call differs from the first one"


def check_case(
    case: Case,
    device: str,
    dtype: torch.dtype,
    loss: str = "out lse",
    lse_maths: torch.dtype | None = None,
    run: Callable[[Problem], tuple[Tensor, Tensor]] = run_op,
) -> None:
    """One row of cases.py on one device in one dtype, forward and (unless it is forward only) backward."""
    loss = "" if case.forward_only else loss
    check_problem(case.make(device, dtype, requires_grad=bool(loss)), case.name, loss, lse_maths, run)


def _results(problem: Problem, outputs: tuple[Tensor, Tensor], douts: Douts | None) -> dict[str, Tensor]:
    results = {"out": outputs[0].detach(), "lse": outputs[1].detach()}
    return results if douts is None else results | gradients(outputs, problem, douts)


_STRETCHES = (1.0, 1.3, 0.7)


def _run_equal(problem: Problem, number: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """out, lse of an equal problem: q longer by what the scale is smaller, columns in another order (0: neither).

    q becomes longer in the dtype that is computed in: rounded to fewer bits it would be another problem.
    """
    q, k, v, variant, _ = problem
    if dtype is not None:
        q = q.to(dtype)
    scale = q.shape[-1] ** -0.5 if variant.softmax_scale is None else variant.softmax_scale
    of_qk, of_v = (_order(x.shape[-1], number).to(q.device) for x in (q, v))
    equal = problem._replace(
        q=q[..., of_qk] * _STRETCHES[number],
        k=k[..., of_qk],
        v=v[..., of_v],
        variant=variant._replace(softmax_scale=scale / _STRETCHES[number]),
    )
    out, lse = run_reference(equal, dtype)
    return out[..., of_v.argsort()], lse


def _order(columns: int, number: int) -> Tensor:
    if number == 0:
        return torch.arange(columns)
    return torch.randperm(columns, generator=torch.Generator().manual_seed(number))


def _error(actual: Tensor, oracle: Tensor) -> tuple[Tensor, Tensor]:
    """|actual - oracle| (0 where both are -inf), and where one of them is not finite and the other is not the same."""
    actual = actual.detach().double()
    equal = actual == oracle
    wrong = ~(actual.isfinite() & oracle.isfinite()) & ~equal
    return (actual - oracle).abs().masked_fill(equal | wrong, 0.0), wrong


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _position(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
