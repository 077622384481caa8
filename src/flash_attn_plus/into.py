"""Gradients into tensors that the caller gives, on devices whose backward returns tensors of its own: copied there."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor


def copying(backward: Callable) -> Callable:
    """A device's ``backward`` -> its ``backward_into``; dense or packed."""

    @functools.wraps(backward)
    def backward_into(dout, q, k, v, out, lse, dlse, dq, dk, dv, *rest) -> tuple[Tensor, Tensor]:
        *layout_and_variant, need_dbias = rest
        needs = (dq is not None, dk is not None or dv is not None, need_dbias)
        *grads, dsink, dbias = backward(dout, q, k, v, out, lse, dlse, *layout_and_variant, *needs)
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            if given is not None:
                given.copy_(grad)
        return dsink, dbias

    return backward_into
