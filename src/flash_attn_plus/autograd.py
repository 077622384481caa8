"""Gradients of the operators, registered by hand on the Autograd key.

``torch.library.register_autograd`` costs twice the time per call, breaks ``torch.func.grad`` and jacrev, and
silently drops forward-mode tangents; the classes below are what it would build, without these faults.
Every operator has a kernel on this key, if only one that raises: without one the gradients of the ATen
operations inside a device kernel would leak out, and double backward would be silently wrong.

The private names of PyTorch that this needs stand in one block; test/test_autograd.py fails when one goes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import states
from .library import argument_names, bind, has_bias_gradient, overload
from .schemas import SCHEMAS

_Function = torch.autograd.function._SingleLevelFunction
_below_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_transforms_active = torch._C._are_functorch_transforms_active
_forward_mode = forward_ad._set_fwd_grad_enabled
from torch._functorch.utils import enable_single_level_autograd_function as _single_level  # noqa: E402


def _call_below(op: Callable, args: tuple):
    """Run ``op`` beneath this key. Function.forward switches gradients off; an outer functorch level records on."""
    if _transforms_active():
        with torch.enable_grad(), _forward_mode(True), _below_autograd():
            return op(*args)
    with _below_autograd():
        return op(*args)


def _no_forward_mode(name: str) -> Callable:
    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(f"flash_attn_plus::{name} has no forward-mode gradient (jvp, jacfwd, hessian)")

    return jvp


def _attention(forward_name: str, backward_name: str) -> type:
    """The autograd class of a pair of operators. The backward takes the forward's arguments, under the same names."""
    forward_op, backward_op = overload(forward_name), overload(backward_name)
    names, backward_names = argument_names(forward_name), argument_names(backward_name)
    slopes_at, bias_at, sink_at = (names.index(name) for name in ("alibi_slopes", "attn_bias", "sink"))

    class Attention(_Function):
        @staticmethod
        def forward(ctx, *args):
            if ctx.needs_input_grad[slopes_at]:
                raise NotImplementedError(
                    "alibi_slopes: expected a tensor that does not require a gradient, got requires_grad=True; "
                    "use attn_bias for a learned bias"
                )
            out, lse = _call_below(forward_op, args)
            # Every tensor goes through save_for_backward, options too: in-place changes are noticed.
            ctx.tensors_at = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
            ctx.args = [None if isinstance(arg, Tensor) else arg for arg in args]
            ctx.save_for_backward(*(args[i] for i in ctx.tensors_at), out, lse)
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            grads = [None] * len(ctx.args)
            if dout is None and dlse is None:
                return tuple(grads)
            *tensors, out, lse = ctx.saved_tensors
            args = list(ctx.args)
            for i, tensor in zip(ctx.tensors_at, tensors, strict=True):
                args[i] = tensor
            bias, sink = args[bias_at], args[sink_at]
            need = ctx.needs_input_grad
            need_dq, need_dkv = need[0], need[1] or need[2]
            need_dbias = need[bias_at] and has_bias_gradient(bias)
            if dout is None:  # a loss of the log-sum-exp alone
                dout = torch.zeros_like(out)
            given = dict(zip(names, args, strict=True), dout=dout, out=out, lse=lse, dlse=dlse)
            given.update(need_dq=need_dq, need_dkv=need_dkv, need_dbias=need_dbias)
            dq, dk, dv, dsink, dbias = backward_op(*(given[name] for name in backward_names))
            if need_dq:
                grads[0] = dq
            if need_dkv:
                grads[1], grads[2] = dk, dv
            if need_dbias:
                grads[bias_at] = dbias
            if need[sink_at]:
                # The operator returns (batch, heads): a sum in there would also sum over what vmap folds in.
                grads[sink_at] = (dsink if sink.dim() == 2 else dsink.sum(0)).to(sink.dtype)
            return tuple(grads)

        jvp = _no_forward_mode(forward_name)

    Attention.__name__ = Attention.__qualname__ = f"FlashAttnPlus_{forward_name}"
    return Attention


class _MergeStates(_Function):
    @staticmethod
    def forward(ctx, out1, lse1, out2, lse2):
        out, lse = _call_below(overload("merge_states"), (out1, lse1, out2, lse2))
        ctx.save_for_backward(out1, lse1, out2, lse2, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        out1, lse1, out2, lse2, out, lse = ctx.saved_tensors
        return (
            *states.part_gradients(dout, dlse, out1, lse1, out, lse),
            *states.part_gradients(dout, dlse, out2, lse2, out, lse),
        )

    jvp = _no_forward_mode("merge_states")


class _Combine(_Function):
    @staticmethod
    def forward(ctx, out_partial, lse_partial, out_dtype):
        out, lse = _call_below(overload("combine"), (out_partial, lse_partial, out_dtype))
        ctx.save_for_backward(out_partial, lse_partial, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        return *states.part_gradients(dout, dlse, *ctx.saved_tensors), None

    jvp = _no_forward_mode("combine")


def _not_differentiable(name: str) -> type:
    class NotDifferentiable(_Function):
        @staticmethod
        def forward(ctx, *args):
            return _call_below(overload(name), args)

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError(f"flash_attn_plus::{name} is not differentiable (no double backward)")

        jvp = _no_forward_mode(name)

    NotDifferentiable.__name__ = NotDifferentiable.__qualname__ = f"FlashAttnPlus_{name}"
    return NotDifferentiable


def _autograd_kernel(name: str, function: type) -> Callable:
    op, apply = overload(name), function.apply

    def kernel(*args):
        records = torch.is_grad_enabled() and _any_requires_grad(*args)
        if not records and forward_ad._current_level < 0:
            with _below_autograd():
                return op(*args)
        args = bind(name, args)
        if _transforms_active():
            with _single_level():
                return apply(*args)
        return apply(*args)

    return kernel


def register(library: torch.library.Library) -> None:
    functions = {
        "fwd": _attention("fwd", "bwd"),
        "varlen_fwd": _attention("varlen_fwd", "varlen_bwd"),
        "merge_states": _MergeStates,
        "combine": _Combine,
    }
    for name in SCHEMAS:
        function = functions.get(name) or _not_differentiable(name)
        library.impl(name, _autograd_kernel(name, function), "Autograd")
