"""What kernels ask of a tensor's strides. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor


def has_contiguous_rows(tensor: Tensor) -> bool:
    """Kernels want a contiguous last dimension; every other stride may be anything."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def contiguous_rows(tensor: Tensor) -> Tensor:
    """Copies only what lacks them."""
    return tensor if has_contiguous_rows(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def strides_of(tensor: Tensor, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Its strides, 0 along axes of one element: whatever stood there would tell equal problems apart."""
    shape, strides = tensor.shape, tensor.stride()
    return tuple([0 if shape[axis] == 1 else strides[axis] for axis in axes])
