"""Gradients of the operators, registered by hand on the Autograd key.

``torch.library.register_autograd`` costs twice the time per call, breaks ``torch.func.grad`` and jacrev, and
silently drops forward-mode tangents; the classes below are what it would build, without these faults.
Every operator has a kernel on this key, if only one that raises: without one the gradients of the ATen
operations inside a device kernel would leak out, and double backward would be silently wrong.

The private names of PyTorch that this needs stand in one block; test/test_autograd.py fails when one goes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import states
from .library import LIBRARY, argument_names, bind, has_bias_gradient, overload, written_arguments
from .schemas import SCHEMAS

_Function = torch.autograd.function._SingleLevelFunction
_below_autograd = torch._C._AutoDispatchBelowAutograd
_below_in_place = torch._C._AutoDispatchBelowADInplaceOrView
_after_in_place = torch._C._after_ADInplaceOrView_keyset
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


def _named(function: type, name: str) -> type:
    """Under the name that ``grad_fn`` and error messages show."""
    return type(function)(f"FlashAttnPlus_{name}", (function,), {})


class Attention(NamedTuple):
    """The autograd classes of a pair of operators.

    Both are applied to (what runs forward, what runs backward, *arguments of the forward operator): the operators
    themselves, or what goes past the dispatcher in their place (eager.py).
    """

    separate: type
    # Where q, k and v (or k and v) are views of one tensor: that stands in the place of the first of them and None in
    # that of the last. Its gradient is one tensor too, that the backward operator of given tensors writes into.
    packed: type


def unpack(first: Tensor | None, second: Tensor | None, in_one: bool) -> tuple[Tensor | None, ...]:
    """qkv alone, or q and kv -> views q, k, v (None of None). The axis of the parts is the one before the heads."""

    def parts(packed: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
        return (None,) * count if packed is None else packed.unbind(-3)

    return parts(first, 3) if in_one else (first, *parts(second, 2))


def pack(q: Tensor, k: Tensor, v: Tensor, in_one: bool) -> tuple[Tensor, Tensor | None]:
    return (torch.stack((q, k, v), -3), None) if in_one else (q, torch.stack((k, v), -3))


def _attention(forward_name: str, backward_name: str) -> Attention:
    """The backward takes the forward's arguments, under the same names."""
    names, backward_names = argument_names(forward_name), argument_names(backward_name)
    into_names = argument_names(f"{backward_name}_into")
    slopes_at, bias_at, sink_at = (names.index(name) for name in ("alibi_slopes", "attn_bias", "sink"))

    def save(ctx, run_backward: Callable, args: tuple, out: Tensor, lse: Tensor) -> None:
        if ctx.needs_input_grad[2 + slopes_at]:
            raise NotImplementedError(
                "alibi_slopes: expected a tensor that does not require a gradient, got requires_grad=True; "
                "use attn_bias for a learned bias"
            )
        # Every tensor goes through save_for_backward, options too: in-place changes are noticed.
        ctx.tensors_at = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        ctx.args = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.save_for_backward(*(args[i] for i in ctx.tensors_at), out, lse)
        ctx.set_materialize_grads(False)
        ctx.run_backward = run_backward

    def restore(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple[tuple, dict]:
        """Which arguments need a gradient; the backward's arguments by name, those it shares with the forward."""
        *tensors, out, lse = ctx.saved_tensors
        args = list(ctx.args)
        for i, tensor in zip(ctx.tensors_at, tensors, strict=True):
            args[i] = tensor
        need = ctx.needs_input_grad[2:]
        if dout is None:  # a loss of the log-sum-exp alone
            dout = torch.zeros_like(out)
        given = dict(zip(names, args, strict=True), dout=dout, out=out, lse=lse, dlse=dlse)
        given["need_dbias"] = need[bias_at] and has_bias_gradient(args[bias_at])
        return need, given

    def gradients(need: tuple, given: dict, of_qkv: Sequence, dsink: Tensor, dbias: Tensor) -> tuple:
        grads: list = [None] * len(names)
        grads[: len(of_qkv)] = (grad if wanted else None for grad, wanted in zip(of_qkv, need, strict=False))
        if given["need_dbias"]:
            grads[bias_at] = dbias
        if need[sink_at]:
            sink = given["sink"]
            # The operator returns (batch, heads): a sum in there would also sum over what vmap folds in.
            grads[sink_at] = (dsink if sink.dim() == 2 else dsink.sum(0)).to(sink.dtype)
        return None, None, *grads

    class Separate(_Function):
        @staticmethod
        def forward(ctx, run_forward, run_backward, *args):
            out, lse = run_forward(*args)
            save(ctx, run_backward, args, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            if dout is None and dlse is None:
                return (None,) * len(ctx.needs_input_grad)
            need, given = restore(ctx, dout, dlse)
            given.update(need_dq=need[0], need_dkv=need[1] or need[2])
            *of_qkv, dsink, dbias = ctx.run_backward(*(given[name] for name in backward_names))
            return gradients(need, given, of_qkv, dsink, dbias)

        jvp = _no_forward_mode(forward_name)

    class Packed(_Function):
        @staticmethod
        def forward(ctx, run_forward, run_backward, *args):
            out, lse = run_forward(*unpack(*args[:2], in_one=args[1] is None), *args[3:])
            save(ctx, run_backward, args, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            if dout is None and dlse is None:
                return (None,) * len(ctx.needs_input_grad)
            need, given = restore(ctx, dout, dlse)
            packed, in_one = (given["q"], given["k"]), given["k"] is None
            given.update(zip("qkv", unpack(*packed, in_one), strict=True))
            if torch.is_grad_enabled():  # create_graph: only what an operator returns has a history
                given.update(need_dq=True, need_dkv=True)
                *of_qkv, dsink, dbias = overload(backward_name)(*(given[name] for name in backward_names))
                of_packed = pack(*of_qkv, in_one)
            else:
                of_packed = [x.new_empty(x.shape) if wanted else None for x, wanted in zip(packed, need, strict=False)]
                given.update(zip(("dq", "dk", "dv"), unpack(*of_packed, in_one), strict=True))
                dsink, dbias = ctx.run_backward(*(given[name] for name in into_names))
            return gradients(need, given, of_packed, dsink, dbias)

        jvp = _no_forward_mode(forward_name)

    return Attention(_named(Separate, forward_name), _named(Packed, forward_name))


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

    return _named(NotDifferentiable, name)


def _autograd_kernel(name: str, apply: Callable) -> Callable:
    op = overload(name)

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


def _writing_kernel(name: str) -> Callable:
    """What is written into given tensors has no history: nothing may ask for one."""
    op = overload(name)

    def kernel(*args):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        tangents = forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(x).tangent is not None for x in tensors
        )
        if tangents or (torch.is_grad_enabled() and _any_requires_grad(*args)):
            raise NotImplementedError(
                f"flash_attn_plus::{name} writes into its arguments and is not differentiable: call it under "
                "torch.no_grad()"
            )
        with _below_autograd():
            return op(*args)

    return kernel


def _version_kernel(name: str) -> Callable:
    """Notes that tensors were written into: one that was saved for some backward is noticed there."""
    op, written = overload(name), written_arguments(name)

    def kernel(keys, *args):
        torch.autograd.graph.increment_version([args[i] for i in written if args[i] is not None])
        with _below_in_place():
            return op.redispatch(keys & _after_in_place, *args)

    return kernel


DENSE, VARLEN = _attention("fwd", "bwd"), _attention("varlen_fwd", "varlen_bwd")


def _below(name: str) -> Callable:
    return lambda *args: _call_below(overload(name), args)


def _register() -> None:
    def apply_attention(kinds: Attention, forward_name: str, backward_name: str) -> Callable:
        return functools.partial(kinds.separate.apply, _below(forward_name), overload(backward_name))

    applies = {
        "fwd": apply_attention(DENSE, "fwd", "bwd"),
        "varlen_fwd": apply_attention(VARLEN, "varlen_fwd", "varlen_bwd"),
        "merge_states": _MergeStates.apply,
        "combine": _Combine.apply,
    }
    for name in SCHEMAS:
        if written_arguments(name):
            LIBRARY.impl(name, _writing_kernel(name), "Autograd")
            LIBRARY.impl(name, _version_kernel(name), "ADInplaceOrView", with_keyset=True)
        else:
            LIBRARY.impl(name, _autograd_kernel(name, applies.get(name) or _not_differentiable(name).apply), "Autograd")


_register()
