"""Every argument error of the rotary operators, said once (checks.py has those of attention)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .checks import _expect_shape, _expect_writable, _not_implemented, _type, _value
from .schemas import Rotation

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_POSITIONS = 2**31 - 1  # what 32 bits count


def rotary(x: Tensor, rotation: Rotation) -> None:
    """x (b, s, h, d), or (total, h, d) beside cu_seqlens."""
    cos, sin, _, seqlen_offsets, cu_seqlens, max_seqlen, *_ = rotation
    if cu_seqlens is None:
        _value(
            x.dim() == 4,
            "x: expected 4 dimensions (batch, seqlen, heads, head_dim) without cu_seqlens, got shape {}",
            x,
        )
        batch = x.shape[0]
    else:
        _value(
            x.dim() == 3,
            "x: expected 3 dimensions (total, heads, head_dim) beside cu_seqlens, got shape {}",
            x,
        )
        _value(
            cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1,
            "cu_seqlens: expected shape (batch + 1,) with at least one entry, got {}",
            cu_seqlens,
        )
        _type(cu_seqlens.dtype == torch.int32, "cu_seqlens: expected dtype torch.int32, got {}", cu_seqlens.dtype)
        batch = cu_seqlens.shape[0] - 1
    _type(x.dtype in _DTYPES, "x: expected dtype float16, bfloat16, float32 or float64, got {}", x.dtype)
    _type(x.layout is torch.strided, "x: expected a strided tensor, got layout {}", x.layout)
    _value(cos.dim() == 2, "cos: expected 2 dimensions (seqlen_ro, rotary_dim / 2), got shape {}", cos)
    _expect_shape("sin", sin, "of cos", *cos.shape)
    for name, table in (("cos", cos), ("sin", sin)):
        _type(table.dtype in _DTYPES, "{}: expected a floating dtype of 16, 32 or 64 bits, got {}", name, table.dtype)
    _value(cos.shape[1] >= 1, "cos: expected a rotary_dim of at least 2, got shape {}", cos)
    _value(
        2 * cos.shape[1] <= x.shape[-1],
        "cos: expected a rotary_dim of at most head_dim ({}), got {} (shape {})",
        x.shape[-1],
        2 * cos.shape[1],
        cos,
    )
    _not_implemented(
        cos.shape[0] <= _MOST_POSITIONS, "cos: up to {} positions are implemented, got shape {}", _MOST_POSITIONS, cos
    )
    if seqlen_offsets is not None:
        _type(
            seqlen_offsets.dtype in (torch.int32, torch.int64),
            "seqlen_offsets: expected dtype torch.int32 or torch.int64, got {}",
            seqlen_offsets.dtype,
        )
        _expect_shape("seqlen_offsets", seqlen_offsets, "(batch,)", batch)
    if max_seqlen is not None:
        _value(max_seqlen >= 0, "max_seqlen: expected a length of at least 0, got {}", max_seqlen)
    tensors = (("cos", cos), ("sin", sin), ("seqlen_offsets", seqlen_offsets), ("cu_seqlens", cu_seqlens))
    for name, tensor in tensors:
        if tensor is not None:
            _value(tensor.device == x.device, "{}: expected device {} (x's), got {}", name, x.device, tensor.device)
    offset(x, rotation)


def offset(x: Tensor, rotation: Rotation) -> None:
    """What depends on ``offset``, which changes from call to call while a sequence grows."""
    first = rotation.offset
    if rotation.seqlen_offsets is not None:
        _value(first == 0, "offset: expected 0 beside seqlen_offsets, got {}", first)
        return
    _value(first >= 0, "offset: expected a position of at least 0, got {}", first)
    if rotation.cu_seqlens is None:
        _value(
            first + x.shape[1] <= rotation.cos.shape[0],
            "cos: expected at least {} positions (offset {} + seqlen {}), got shape {}",
            first + x.shape[1],
            first,
            x.shape[1],
            rotation.cos,
        )


def rotary_(x: Tensor, rotation: Rotation) -> None:
    rotary(x, rotation)
    _expect_writable("x", x, "rotate a copy of it")


def values(x: Tensor, rotation: Rotation) -> None:
    """Lengths, where the host can read them."""
    if rotation.cu_seqlens is None:
        return
    starts = rotation.cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    _value(
        starts[0] >= 0 and all(length >= 0 for length in lengths),
        "cu_seqlens: expected offsets that are not negative and never fall, got {}",
        starts,
    )
    _value(
        starts[-1] <= x.shape[0],
        "cu_seqlens: expected to end at or before the {} rows of x, got {}",
        x.shape[0],
        starts[-1],
    )
    longest = max(lengths, default=0)
    _value(
        rotation.max_seqlen is None or longest <= rotation.max_seqlen,
        "max_seqlen: expected at least the longest sequence ({}), got {}",
        longest,
        rotation.max_seqlen,
    )
