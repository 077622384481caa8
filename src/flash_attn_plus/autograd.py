"""Gradients of the operators, registered by hand on the Autograd key.

``torch.library.register_autograd`` costs twice the time per call, breaks ``torch.func.grad`` and jacrev, and
silently drops forward-mode tangents; the classes below are what it would build, without these faults.
Every operator has a kernel on this key, if only one that raises: without one the gradients of the ATen
operations inside a device kernel would leak out, and double backward would be silently wrong.

The private names of PyTorch that this needs stand in one block; test/test_autograd.py fails when one goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import states
from .library import LIBRARY, bind, flatten, has_bias_gradient, overload, parse, written_arguments
from .schemas import SCHEMAS, Rotation, Variant

_SingleLevelFunction = torch.autograd.function._SingleLevelFunction
_below_autograd = torch._C._AutoDispatchBelowAutograd
_below_in_place = torch._C._AutoDispatchBelowADInplaceOrView
_after_in_place = torch._C._after_ADInplaceOrView_keyset
_any_requires_grad = torch._C._any_requires_grad
_transforms_active = torch._C._are_functorch_transforms_active
_forward_mode = forward_ad._set_fwd_grad_enabled
_creation_of_view, _IS_PLAIN_VIEW = torch._C._autograd._get_creation_meta, torch._C._autograd.CreationMeta.DEFAULT
from torch._functorch.utils import enable_single_level_autograd_function as _single_level  # noqa: E402


class _Function(_SingleLevelFunction):
    """What classes below have in common with ``torch.autograd.Function``: compiled autograd asks for it."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


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


class Way(NamedTuple):
    """What runs backward: the operators themselves, or what goes past the dispatcher in their place (eager.py). All
    take structured arguments (library.parse).
    """

    backward: Callable
    # For joint inputs: what writes into given tensors, and whether it may, by the tensors that it takes.
    backward_into: Callable | None = None
    may_write: Callable[[Sequence[Tensor | None]], bool] | None = None


class Attention(NamedTuple):
    """The autograd classes of a pair of operators, applied by ``apply``."""

    # Applied to: what runs forward, a Way, structured arguments, their skeleton, their tensors.
    separate: type
    # The same where q, k and v (or k and v) are views of one tensor, which stands in their place among the tensors. Its
    # gradient is one tensor too: the backward writes into views of it.
    joint: type


Joint = tuple[Tensor, Tensor | None]  # (qkv, None) or (q, kv)
Skeleton = tuple[tuple[NamedTuple, tuple[str, ...]], ...]  # what has names; which of these are tensors, left out


def apply(
    classes: Attention,
    run_forward: Callable,
    way: Way,
    structured: tuple,
    joint: Joint | None = None,
) -> tuple[Tensor, Tensor]:
    """out, lse of ``run_forward(*structured)``, on the tape."""
    skeleton, options = _take_apart(structured[3:])
    if joint is None:
        return classes.separate.apply(run_forward, way, structured, skeleton, *structured[:3], *options)
    inputs = joint[:1] if joint[1] is None else joint
    return classes.joint.apply(run_forward, way, structured, skeleton, *inputs, *options)


def _take_apart(named: tuple) -> tuple[Skeleton, list[Tensor]]:
    """Tensors go on the tape one by one, options too, so that in-place changes of them are noticed."""
    skeleton, tensors = [], []
    for part in named:
        names = tuple([name for name, x in zip(part._fields, part, strict=True) if isinstance(x, Tensor)])
        if names:
            tensors += [getattr(part, name) for name in names]
            part = part._replace(**dict.fromkeys(names))
        skeleton.append((part, names))
    return tuple(skeleton), tensors


def _put_together(skeleton: Skeleton, tensors: Sequence[Tensor]) -> list[NamedTuple]:
    if not tensors:
        return [part for part, _ in skeleton]
    named, rest = [], iter(tensors)
    for part, names in skeleton:
        named.append(part._replace(**{name: next(rest) for name in names}) if names else part)
    return named


def _attention(forward_name: str) -> Attention:
    def save(ctx, way: Way, skeleton: Skeleton, tensors: tuple, out: Tensor, lse: Tensor) -> None:
        ctx.save_for_backward(*tensors, out, lse)
        ctx.set_materialize_grads(False)
        ctx.way, ctx.skeleton = way, skeleton

    def of_options(ctx, count: int) -> dict[str, bool]:
        """Which of the tensors behind the first ``count`` need a gradient."""
        names = [name for _, names in ctx.skeleton for name in names]
        return dict(zip(names, ctx.needs_input_grad[4 + count :], strict=True))

    def check_slopes(ctx, count: int) -> None:
        if of_options(ctx, count).get("alibi_slopes"):
            raise NotImplementedError(
                "alibi_slopes: expected a tensor that does not require a gradient, got requires_grad=True; "
                "use attn_bias for a learned bias"
            )

    def gradients(needs: dict[str, bool], variant: Variant, dsink: Tensor | None, dbias: Tensor | None) -> list:
        """Of all options, in the order of ``needs``."""
        grads = dict.fromkeys(needs)
        if needs.get("attn_bias"):
            grads["attn_bias"] = dbias
        if needs.get("sink"):
            sink = variant.sink
            # The operator returns (batch, heads): a sum in there would also sum over what vmap folds in.
            grads["sink"] = (dsink if sink.dim() == 2 else dsink.sum(0)).to(sink.dtype)
        return list(grads.values())

    class Separate(_Function):
        @staticmethod
        def forward(ctx, run_forward, way, structured, skeleton, *tensors):
            out, lse = run_forward(*structured)
            save(ctx, way, skeleton, tensors, out, lse)
            if len(tensors) > 3:
                check_slopes(ctx, 3)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            if dout is None and dlse is None:
                return (None,) * len(ctx.needs_input_grad)
            q, k, v, *options, out, lse = ctx.saved_tensors
            if dout is None:  # a loss of the log-sum-exp alone
                dout = torch.zeros_like(out)
            named = _put_together(ctx.skeleton, options)
            _, _, _, _, need_q, need_k, need_v, *_ = ctx.needs_input_grad
            needs = of_options(ctx, 3) if options else {}
            need_dbias = needs.get("attn_bias", False) and has_bias_gradient(named[-1].attn_bias)
            dq, dk, dv, dsink, dbias = ctx.way.backward(
                dout, q, k, v, out, lse, dlse, *named, need_q, need_k or need_v, need_dbias
            )
            grads = (dq if need_q else None, dk if need_k else None, dv if need_v else None)
            of_variant = gradients(needs, named[-1], dsink, dbias if need_dbias else None) if options else ()
            return None, None, None, None, *grads, *of_variant

        jvp = _no_forward_mode(forward_name)

    class JointInputs(_Function):
        @staticmethod
        def forward(ctx, run_forward, way, structured, skeleton, *tensors):
            out, lse = run_forward(*structured)
            save(ctx, way, skeleton, tensors, out, lse)
            ctx.count = len(tensors) - sum(len(names) for _, names in skeleton)
            if len(tensors) > ctx.count:
                check_slopes(ctx, ctx.count)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            if dout is None and dlse is None:
                return (None,) * len(ctx.needs_input_grad)
            count, (*tensors, out, lse) = ctx.count, ctx.saved_tensors
            if dout is None:
                dout = torch.zeros_like(out)
            joint, named = tensors[:count], _put_together(ctx.skeleton, tensors[count:])
            need, needs = ctx.needs_input_grad[4 : 4 + count], of_options(ctx, count)
            need_dbias = needs.get("attn_bias", False) and has_bias_gradient(named[-1].attn_bias)
            saved = (dout, *split(joint), out, lse, dlse)
            if ctx.way.may_write((dout, dlse, *tensors)):
                grads = [x.new_empty(x.shape) if wanted else None for x, wanted in zip(joint, need, strict=True)]
                dsink, dbias = ctx.way.backward_into(*saved, *split(grads), *named, need_dbias)
            else:
                *separate, dsink, dbias = ctx.way.backward(*saved, *named, True, True, need_dbias)
                grads = join(separate, count)
            grads = (grad if wanted else None for grad, wanted in zip(grads, need, strict=True))
            of_variant = gradients(needs, named[-1], dsink, dbias if need_dbias else None)
            return None, None, None, None, *grads, *of_variant

        jvp = _no_forward_mode(forward_name)

    return Attention(_named(Separate, forward_name), _named(JointInputs, forward_name))


def split(joint: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """(qkv,) or (q, kv) -> views q, k, v, or None of None. The axis of the parts is the one before the heads."""
    *whole, last = joint
    parts = 3 - len(whole)
    return *whole, *((None,) * parts if last is None else last.unbind(-3))


def join(separate: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """Three tensors -> (qkv,) or (q, kv)."""
    return *separate[: count - 1], torch.stack(separate[count - 1 :], -3)


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


def _rotation_class(name: str) -> type:
    """Of a rotation, which is linear: its gradient is the rotation back, its tangent the same rotation."""
    op, in_place = overload(name), name.endswith("_")

    def save(ctx, rotation: Rotation) -> None:
        for i, table in enumerate(("cos", "sin"), 1):
            if ctx.needs_input_grad[i]:
                raise NotImplementedError(
                    f"{table}: expected a tensor that does not require a gradient, got requires_grad=True"
                )
        names = [field for field, value in rotation._asdict().items() if isinstance(value, Tensor)]
        tensors = [getattr(rotation, field) for field in names]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.rotation, ctx.names = rotation._replace(**dict.fromkeys(names)), names

    def saved(ctx) -> Rotation:
        return ctx.rotation._replace(**dict(zip(ctx.names, ctx.saved_tensors, strict=True)))

    class Rotate(_Function):
        @staticmethod
        def forward(ctx, x, *rotation):
            save(ctx, Rotation._make(rotation))
            out = _call_below(op, (x, *rotation))
            if not in_place:
                return out
            ctx.mark_dirty(x)
            return x

        @staticmethod
        def backward(ctx, dout):
            if dout is None:
                return (None,) * len(ctx.needs_input_grad)
            rotation = saved(ctx)
            back = rotation._replace(conjugate=not rotation.conjugate)
            return overload("rotary")(dout, *back), *(None,) * len(rotation)

        @staticmethod
        def jvp(ctx, dx, *drotation):
            if any(isinstance(tangent, Tensor) for tangent in drotation):
                raise NotImplementedError(f"flash_attn_plus::{name}: cos and sin have no forward-mode gradient")
            if dx is None:
                return None
            rotation = saved(ctx)
            with torch.enable_grad(), _forward_mode(True):  # an outer level records on
                if not in_place:
                    return op(dx, *rotation)
                op(dx, *rotation)
                return dx

    return _named(Rotate, name)


def _in_place_kernel(name: str) -> Callable:
    """Of an operator that changes its first argument and is differentiable in it."""
    record = _autograd_kernel(name, _rotation_class(name).apply)

    def kernel(x, *args):
        if torch.is_grad_enabled() and x.requires_grad:
            view = x._is_view()
            if x.is_leaf or (view and (x._base.is_leaf or _creation_of_view(x) != _IS_PLAIN_VIEW)):
                x.mul_(1)  # PyTorch says what must not be changed in place, before anything is
        record(x, *args)

    return kernel


def _not_differentiable(name: str) -> type:
    class NotDifferentiable(_Function):
        @staticmethod
        def forward(ctx, *args):
            return _call_below(overload(name), args)

        @staticmethod
        def backward(ctx, *grads):
            why = " (no double backward)" if "bwd" in name else ""
            if name.startswith("flag_gems_"):
                why = ": flag_gems has no backward for it; select no backend where a gradient is needed"
            raise NotImplementedError(f"flash_attn_plus::{name} is not differentiable{why}")

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
        tensors = [args[i] for i in written if args[i] is not None]
        if any(x.is_inference() for x in tensors) and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"flash_attn_plus::{name}: an inference tensor is written into outside InferenceMode")
        torch.autograd.graph.increment_version(tensors)
        with _below_in_place():
            return op.redispatch(keys & _after_in_place, *args)

    return kernel


DENSE, VARLEN = _attention("fwd"), _attention("varlen_fwd")


def _attention_kernel(name: str, classes: Attention, backward_name: str) -> Callable:
    def operator_of(name: str, call: Callable) -> Callable:
        op = overload(name)
        return lambda *structured: call(op, flatten(name, structured))

    run_forward = operator_of(name, _call_below)
    way = Way(operator_of(backward_name, lambda op, args: op(*args)))
    return lambda *args: apply(classes, run_forward, way, parse(name, args))


def _register() -> None:
    applies = {
        "fwd": _attention_kernel("fwd", DENSE, "bwd"),
        "varlen_fwd": _attention_kernel("varlen_fwd", VARLEN, "varlen_bwd"),
        "merge_states": _MergeStates.apply,
        "combine": _Combine.apply,
        "rotary": _rotation_class("rotary").apply,
    }
    for name in SCHEMAS:
        if written_arguments(name):
            kernel = _in_place_kernel(name) if name == "rotary_" else _writing_kernel(name)
            LIBRARY.impl(name, kernel, "Autograd")
            LIBRARY.impl(name, _version_kernel(name), "ADInplaceOrView", with_keyset=True)
        else:
            LIBRARY.impl(name, _autograd_kernel(name, applies.get(name) or _not_differentiable(name).apply), "Autograd")


_register()
