"""Runs the kernels without a GPU, in Triton's interpreter, and makes that compute bfloat16 as a GPU does.

The interpreter holds bfloat16 as 16-bit integers, and computes on them as if they were numbers. Here operands become
float32, and results are rounded to nearest even. The larger of a number and NaN is the number, as in hardware. It also
lets a one-element array bound a loop, which NumPy 2.4 no longer does by itself for Triton 3.6. And functions that a
kernel calls do not patch all of triton.language again, which took half of the time.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from cases import Problem
from torch import Tensor
from triton.runtime import interpreter

from flash_attn_plus import gpu

_Handle, _Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits: to nearest, ties to even, NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest).astype(np.uint16)


def _as_float32(handle):
    return _Handle(widened(handle.data), tl.float32) if _is_bf16(handle) else handle


def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """out, lse of the kernels, differentiable, by the path that a call on a GPU takes behind the checks."""
    install()
    q, k, v, variant, varlen = problem
    options = [name for name, value in variant._asdict().items() if isinstance(value, Tensor)]
    return _Attention.apply(variant, varlen, options, q, k, v, *(getattr(variant, name) for name in options))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, variant, varlen, options, q, k, v, *tensors):
        # Saved by themselves: what a Variant holds must not require gradients in here.
        variant = variant._replace(**dict(zip(options, (x.detach() for x in tensors), strict=True)))
        layout = () if varlen is None else (varlen,)
        prepare = gpu.prepare_forward if varlen is None else gpu.prepare_varlen_forward
        arguments = (q, k, v, *layout, variant)
        out, lse = prepare(*arguments)(*arguments)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.variant, ctx.options = layout, variant, options
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        need = dict(zip(ctx.options, ctx.needs_input_grad[6:], strict=True))
        needs = (ctx.needs_input_grad[3], any(ctx.needs_input_grad[4:6]), need.get("attn_bias", False))
        dout = torch.zeros_like(out) if dout is None else dout
        arguments = (dout, q, k, v, out, lse, dlse, *ctx.layout, ctx.variant, *needs)
        prepare = gpu.prepare_varlen_backward if ctx.layout else gpu.prepare_backward
        dq, dk, dv, dsink, dbias = prepare(*arguments)(*arguments)
        sink = ctx.variant.sink
        if sink is not None:
            dsink = (dsink if sink.dim() == 2 else dsink.sum(0)).to(sink.dtype)
        of_options = {"sink": dsink, "attn_bias": dbias}
        grads = (of_options[name] if wanted else None for name, wanted in need.items())
        return None, None, None, dq, dk, dv, *grads


@functools.cache
def install() -> None:
    cast, dot = _Builder.cast_impl, _Builder.create_dot
    binary, unary = _Builder.binary_op, _Builder.unary_op
    patch_tensor, patch_lang = interpreter._patch_lang_tensor, interpreter._patch_lang

    def cast_impl(self, source, to_type):
        if to_type.scalar == tl.bfloat16:
            if _is_bf16(source):
                return source
            return _Handle(rounded(source.data.astype(np.float32)), to_type.scalar)
        source = _as_float32(source)
        return source if source.dtype.scalar == to_type.scalar else cast(self, source, to_type)

    def create_dot(self, a, b, accumulator, *rest):
        return dot(self, _as_float32(a), _as_float32(b), accumulator, *rest)

    def binary_op(self, left, right, operation):
        if not _is_bf16(left) or operation in _BITWISE:
            return binary(self, left, right, operation)
        result = operation(widened(left.data), widened(right.data))
        return _Handle(result if result.dtype == bool else rounded(result), tl.bfloat16)

    def unary_op(self, argument, operation):
        if not _is_bf16(argument):
            return unary(self, argument, operation)
        return _Handle(rounded(operation(widened(argument.data))), tl.bfloat16)

    def patch_lang_tensor(tensor, *args, **kwargs):
        patch_tensor(tensor, *args, **kwargs)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    def patch_lang_once(fn):
        langs = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(lang.load) for lang in langs):
            return patch_lang(fn)
        return interpreter._LangPatchScope()  # of nothing: the kernel that calls this function did it

    of_number = functools.cache(interpreter._get_np_dtype)  # it makes a table of all of them each time

    def get_np_dtype(dtype):
        return np.dtype(np.uint64) if isinstance(dtype.scalar, tl.pointer_type) else of_number(dtype.scalar)

    _Builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    _Builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    _Builder.cast_impl, _Builder.create_dot = cast_impl, create_dot
    _Builder.binary_op, _Builder.unary_op = binary_op, unary_op
    interpreter._patch_lang_tensor, interpreter._patch_lang = patch_lang_tensor, patch_lang_once
    interpreter._get_np_dtype = get_np_dtype
