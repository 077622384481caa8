"""The operators on a GPU, and on any device that Triton compiles for: Triton kernels where there is one.

Row blocks (rowblocks.py) compute what no kernel does. The choice depends on the dtype and on what is installed, never
on values; ``explain`` prints it, with the plan that a kernel runs with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import device, rowblocks, states
from .schemas import Variant, Varlen

backward = rowblocks.backward
varlen_backward = rowblocks.varlen_backward
combine = states.combine
merge_states = states.merge_states


def why_row_blocks(q: Tensor) -> str | None:
    """Why the forward is not a Triton kernel, or None where it is."""
    if q.dtype == torch.float64:
        return "the kernels have no float64"
    return device.why_no_triton()


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


def explain(q: Tensor, k: Tensor, v: Tensor, variant: Variant, layout: Varlen | None = None) -> str:
    if reason := why_row_blocks(q):
        chosen = f"row blocks in plain PyTorch: {reason}"
    else:
        from .kernels.arguments import plan_of

        chosen = f"Triton on {device.architecture(q.device)}: {plan_of(q, k, v, variant, layout)}"
    return f"forward:  {chosen}\nbackward: row blocks in plain PyTorch: there is no kernel yet"
