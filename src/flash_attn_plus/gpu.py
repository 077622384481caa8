"""The operators on a GPU, and on any device that Triton compiles for: Triton kernels where there is one.

Row blocks (rowblocks.py) compute what no kernel does. The choice depends on the dtype and on what is installed, never
on values; ``explain`` prints it, with the plan that a kernel runs with.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from . import cache, device, into, log, plan, rotate, rowblocks, states
from .schemas import Cache, New, Rotation, Variant, Varlen

merge_states = states.merge_states


_MOST_COLUMNS = 1024  # of what the kernel of ``combine`` holds at once


def why_row_blocks(q: Tensor) -> str | None:
    """Why the forward and the backward are not Triton kernels, or None where they are."""
    if q.dtype == torch.float64:
        return "the kernels have no float64"
    return why_no_kernels(q.device)


def why_no_kernels(on: torch.device) -> str | None:
    return device.why_no_triton() or device.why_no_driver(on)


def say(kernel: str, *structured) -> None:
    """Log that no Triton kernel runs (library.py calls it when a signature is new)."""
    q = structured[1] if "backward" in kernel else structured[0]
    if reason := why_row_blocks(q):
        # float64 is the caller's choice; a GPU without Triton costs most of the speed, and can be helped.
        level = logging.INFO if q.dtype == torch.float64 else logging.WARNING
        log.once("%s: row blocks in plain PyTorch: %s", q.device.type, reason, level=level)


# Each takes the arguments of an operator, and returns what computes it for arguments of their signature.


def prepare_forward(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> Callable:
    if why_row_blocks(q):
        return rowblocks.forward
    from .kernels.forward import Forward

    return Forward(q, k, v, variant)


def prepare_varlen_forward(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, variant: Variant) -> Callable:
    if why_row_blocks(q):
        return rowblocks.varlen_forward
    from .kernels.forward import Forward

    run = Forward(q, k, v, variant, layout)
    return lambda q, k, v, layout, variant: run(q, k, v, variant, layout)


def prepare_backward(dout, q, k, v, out, lse, dlse, variant: Variant, *needs: bool) -> Callable:
    if why_row_blocks(q):
        return rowblocks.backward
    from .kernels.backward import Backward

    return Backward(dout, q, k, v, out, lse, dlse, variant, *needs)


def prepare_varlen_backward(dout, q, k, v, out, lse, dlse, layout: Varlen, variant: Variant, *needs: bool) -> Callable:
    if why_row_blocks(q):
        return rowblocks.varlen_backward
    from .kernels.backward import Backward

    run = Backward(dout, q, k, v, out, lse, dlse, variant, *needs, layout)
    return lambda dout, q, k, v, out, lse, dlse, layout, variant, *needs: run(
        dout, q, k, v, out, lse, dlse, variant, *needs, layout
    )


def prepare_backward_into(dout, q, k, v, out, lse, dlse, dq, dk, dv, variant: Variant, need_dbias: bool) -> Callable:
    if why_row_blocks(q):
        return into.copying(rowblocks.backward)
    from .kernels.backward import BackwardInto

    return BackwardInto(dout, q, k, v, out, lse, dlse, dq, dk, dv, variant, need_dbias)


def prepare_varlen_backward_into(*structured) -> Callable:
    *tensors, layout, variant, need_dbias = structured
    if why_row_blocks(tensors[1]):
        return into.copying(rowblocks.varlen_backward)
    from .kernels.backward import BackwardInto

    run = BackwardInto(*tensors, variant, need_dbias, layout)

    def call(*structured):
        *tensors, layout, variant, need_dbias = structured
        return run(*tensors, variant, need_dbias, layout)

    return call


def prepare_rotary(x: Tensor, rotation: Rotation) -> Callable:
    if why_row_blocks(x):
        return rotate.rotary
    from .kernels.rotary import Rotary

    return Rotary(x, rotation, in_place=False)


def prepare_rotary_(x: Tensor, rotation: Rotation) -> Callable:
    if why_row_blocks(x):
        return rotate.rotary_
    from .kernels.rotary import Rotary

    return Rotary(x, rotation, in_place=True)


def prepare_append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, new: New) -> Callable:
    if why_row_blocks(k):
        return cache.append_kv
    from .kernels.append import Append

    return Append(k_cache, v_cache, k, v, new)


def prepare_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, where: Cache, variant: Variant, num_splits: int
) -> Callable:
    if why_row_blocks(q):
        return functools.partial(cache.decode, forward=rowblocks.forward)
    from .kernels.decode import prepare

    return prepare(q, k_cache, v_cache, where, variant, num_splits)


def prepare_combine(out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None) -> Callable:
    wide = torch.float64 in (out_partial.dtype, lse_partial.dtype, out_dtype)
    if wide or why_no_kernels(out_partial.device) or not 1 <= out_partial.shape[-1] <= _MOST_COLUMNS:
        return states.combine
    from .kernels.combine import Combine

    return Combine(out_partial, lse_partial, out_dtype)


def explain(q: Tensor, k: Tensor, v: Tensor, variant: Variant, layout: Varlen | None = None) -> str:
    if reason := why_row_blocks(q):
        forward = backward = f"row blocks in plain PyTorch: {reason}"
    else:
        from .kernels.arguments import problem

        on, of_call = f"Triton on {device.architecture(q.device)}", problem(q, v, variant, layout)
        forward, passes = f"{on}: {plan.forward(of_call)}", plan.backward(of_call)
        backward = f"{on}: dq {passes.queries}, "
        backward += f"dk {passes.keys}, dv {passes.values}" if passes.values else f"dk and dv {passes.keys}"
        if variant.attn_bias is not None and variant.attn_bias.is_floating_point():
            backward += f", dbias {passes.bias}"
    if layout is not None and layout.block_table is not None:
        backward = "none: the backward of paged keys is not implemented"
    return f"forward:  {forward}\nbackward: {backward}"
