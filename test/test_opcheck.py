"""``torch.library.opcheck`` on every operator, and fakes beside real results, over the rows of cases.py.

The schema, the Autograd key and the fake are checked on every row. ``test_aot_dispatch_dynamic`` traces forward and
backward with symbolic sizes, which takes seconds; what it sees of a row is which tensors are there and which sizes
are 0 or 1, and the rows of ``TRACED`` differ in just that.
"""

from __future__ import annotations

import pytest
import torch
from cases import BY_NAME, CASES, Case, Problem
from torch import Tensor
from torch.library import opcheck
from torch.testing._internal.optests import OpCheckError

import flash_attn_plus  # noqa: F401  (defines the operators)

OPS = torch.ops.flash_attn_plus
EVERY_ROW = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = [
    *("plain", "no_keys", "batch_0", "bias_over_heads", "everything"),
    *("varlen_empty", "varlen_no_sequences", "varlen_everything", "paged_everything"),
]
DIFFERENTIABLE = [case for case in CASES if not case.forward_only]
DIFFERENTIABLE_TRACED = [name for name in TRACED if not BY_NAME[name].forward_only]

# name: (dtype of out, shape of out, shape of lse)
STATES = {
    "dense": (torch.float32, (2, 5, 3, 8), (2, 3, 5)),
    "packed": (torch.float32, (11, 3, 8), (3, 11)),
    "empty": (torch.float32, (0, 5, 3, 8), (0, 3, 5)),
    "bfloat16": (torch.bfloat16, (11, 3, 8), (3, 11)),
}


def forward_call(problem: Problem) -> tuple:
    """The operator and all its arguments."""
    q, k, v, variant, varlen = problem
    if varlen is None:
        return OPS.fwd.default, (q, k, v, *variant)
    return OPS.varlen_fwd.default, (q, k, v, *varlen[:4], *variant, *varlen[4:])


def backward_call(problem: Problem, requires_grad: bool = False) -> tuple:
    op, (q, k, v, *rest) = forward_call(problem)
    with torch.no_grad():
        out, lse = op(q, k, v, *rest)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    saved = tuple(tensor.detach().requires_grad_(requires_grad) for tensor in (dout, q, k, v, out, lse, dlse))
    backward = OPS.bwd.default if op is OPS.fwd.default else OPS.varlen_bwd.default
    return backward, (*saved, *rest, True, True, True)


def merge_call(name: str, requires_grad: bool) -> tuple:
    """The second state of float32; some of its rows have seen no key."""
    dtype, out_shape, lse_shape = STATES[name]
    tensors = (
        *(torch.randn(*out_shape, dtype=dtype), torch.randn(*lse_shape)),
        *(torch.randn(*out_shape), torch.randn(*lse_shape).index_fill_(-1, torch.tensor([0, 3]), -torch.inf)),
    )
    return OPS.merge_states.default, tuple(tensor.requires_grad_(requires_grad) for tensor in tensors)


def combine_call(name: str, requires_grad: bool, out_dtype: torch.dtype | None = None) -> tuple:
    dtype, out_shape, lse_shape = STATES[name]
    tensors = torch.randn(4, *out_shape, dtype=dtype), torch.randn(4, *lse_shape)
    return OPS.combine.default, (*(tensor.requires_grad_(requires_grad) for tensor in tensors), out_dtype)


def check(call: tuple, utilities: tuple[str, ...]) -> None:
    op, args = call
    assert set(opcheck(op, args, test_utils=utilities).values()) == {"SUCCESS"}


class TestForward:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_schema_autograd_and_fake(self, case: Case) -> None:
        check(forward_call(case.make(requires_grad=not case.forward_only)), EVERY_ROW)

    @pytest.mark.parametrize("name", TRACED)
    def test_traces_with_symbolic_sizes(self, name: str) -> None:
        case = BY_NAME[name]
        check(forward_call(case.make(requires_grad=not case.forward_only)), ("test_aot_dispatch_dynamic",))


class TestBackward:
    @pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
    def test_schema_autograd_and_fake(self, case: Case) -> None:
        check(backward_call(case.make()), EVERY_ROW)

    @pytest.mark.parametrize("name", DIFFERENTIABLE_TRACED)
    def test_traces_with_symbolic_sizes(self, name: str) -> None:
        check(backward_call(BY_NAME[name].make()), ("test_aot_dispatch_dynamic",))

    @pytest.mark.parametrize("name", ["plain", "everything", "varlen_everything"])
    def test_double_backward_raises_and_nothing_else_does(self, name: str) -> None:
        op, args = backward_call(BY_NAME[name].make(requires_grad=True), requires_grad=True)
        check((op, args), EVERY_ROW)
        message = rf"{op._schema.name} is not differentiable \(no double backward\)"
        with pytest.raises(OpCheckError, match=f"test_aot_dispatch_dynamic failed with {message}"):
            opcheck(op, args, test_utils=("test_aot_dispatch_dynamic",))


class TestStates:
    @pytest.mark.parametrize("name", STATES)
    def test_schema_autograd_and_fake(self, name: str) -> None:
        check(merge_call(name, requires_grad=True), EVERY_ROW)
        check(combine_call(name, requires_grad=True), EVERY_ROW)
        check(combine_call(name, requires_grad=True, out_dtype=torch.float16), EVERY_ROW)

    def test_traces_with_symbolic_sizes(self) -> None:
        check(merge_call("dense", requires_grad=True), ("test_aot_dispatch_dynamic",))
        check(combine_call("packed", requires_grad=True, out_dtype=torch.float16), ("test_aot_dispatch_dynamic",))


def on_meta(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def significant_strides(tensor: Tensor) -> list[int]:
    """Without those of axes of size 1, which mean nothing: ``contiguous()`` leaves any number there."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def assert_same_metadata(call: tuple) -> None:
    op, args = call
    real, fake = op(*args), op(*map(on_meta, args))
    for result, on_cpu, promised in zip(op._schema.returns, real, fake, strict=True):
        for what in ("shape", "dtype"):
            assert getattr(on_cpu, what) == getattr(promised, what), f"{op}: {what} of {result.name}"
        assert significant_strides(on_cpu) == significant_strides(promised), f"{op}: strides of {result.name}"
        assert promised.is_meta


class TestMetaDevice:
    """The meta device runs the fakes: shapes, dtypes and strides are those of the real results."""

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_forward(self, case: Case) -> None:
        assert_same_metadata(forward_call(case.make()))

    @pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
    def test_backward(self, case: Case) -> None:
        assert_same_metadata(backward_call(case.make()))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("name", ["plain", "causal", "everything", "varlen", "varlen_everything"])
    def test_dtypes(self, name: str, dtype: torch.dtype) -> None:
        problem = BY_NAME[name].make(dtype=dtype)
        assert_same_metadata(forward_call(problem))
        assert_same_metadata(backward_call(problem))

    @pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
    @pytest.mark.parametrize("name", ["plain", "everything", "varlen", "varlen_everything"])
    def test_gradients_that_nobody_needs(self, name: str, needs: tuple[bool, bool, bool]) -> None:
        op, args = backward_call(BY_NAME[name].make())
        assert_same_metadata((op, (*args[:-3], *needs)))

    @pytest.mark.parametrize("name", STATES)
    def test_states(self, name: str) -> None:
        assert_same_metadata(merge_call(name, requires_grad=False))
        assert_same_metadata(combine_call(name, requires_grad=False))
        assert_same_metadata(combine_call(name, requires_grad=False, out_dtype=torch.float64))
