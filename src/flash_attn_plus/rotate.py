"""Rotary position embedding in plain PyTorch, on any device, in any dtype, without reading anything on the host.

A pair of columns (a, b) of a row at position p, number j of rotary_dim / 2, is a complex number that is turned by the
angle of (p, j): a' = a cos - b sin, b' = a sin + b cos. Su et al.: "RoFormer: Enhanced Transformer with Rotary Position
Embedding" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schemas import Rotation


def rotary(x: Tensor, rotation: Rotation) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rotary_dim = 2 * rotation.cos.shape[1]
    out[..., rotary_dim:] = x[..., rotary_dim:]
    _rotate(out, x, rotation)
    return out


def rotary_(x: Tensor, rotation: Rotation) -> None:
    _rotate(x, x, rotation)


def _rotate(out: Tensor, x: Tensor, rotation: Rotation) -> None:
    """Write the first rotary_dim columns of ``out``, which may be ``x``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    a, b = _pairs(x, rotation)
    cos, sin, inside = _angles(x, rotation)
    cos, sin = cos.to(wide), sin.to(wide)
    if rotation.conjugate:
        sin = -sin
    wide_a, wide_b = a.to(wide), b.to(wide)
    rotated = wide_a * cos - wide_b * sin, wide_a * sin + wide_b * cos
    for target, source, value in zip(_pairs(out, rotation), (a, b), rotated, strict=True):
        # Chosen, not multiplied by 1 and 0: what is passed on may hold anything.
        target.copy_(value if inside is None else torch.where(inside, value.to(x.dtype), source))


def _pairs(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Views of the first and the second number of each pair: (..., rotary_dim / 2)."""
    half = rotation.cos.shape[1]
    if rotation.interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def _angles(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor | None]:
    """(cos, sin, which rows are rotated), each (..., rows, 1, columns or 1) as the rows of ``x`` lie; None: all are."""
    cos, sin = rotation.cos, rotation.sin
    rows, positions = x.shape[-3], cos.shape[0]
    if rotation.seqlen_offsets is None and rotation.cu_seqlens is None:
        at = slice(rotation.offset, rotation.offset + rows)  # checked: they are there
        return cos[at, None], sin[at, None], None
    position, exists = _positions(x, rotation)
    inside = exists & (position >= 0) & (position < positions)
    if positions == 0:
        cos, sin = (table.new_ones((1, table.shape[1])) for table in (cos, sin))
    position = position.clamp(0, max(positions - 1, 0))
    return cos[position].unsqueeze(-2), sin[position].unsqueeze(-2), inside[..., None, None]


def _positions(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """(position, whether it belongs to a sequence) of each row: (rows,), or (batch, rows)."""
    offsets, starts = rotation.seqlen_offsets, rotation.cu_seqlens
    row = torch.arange(x.shape[-3], device=x.device)
    if starts is None:
        return row + offsets[:, None].long(), torch.ones_like(row, dtype=torch.bool)
    batch = starts.shape[0] - 1
    # Sequences begin where offsets do; of those that begin at one row all but the last are empty.
    index = torch.searchsorted(starts.contiguous(), row.to(starts.dtype), right=True) - 1
    exists = (index >= 0) & (index < batch)
    index = index.clamp(0, batch)
    position = row - starts[index]
    if offsets is None:
        return position + rotation.offset, exists
    if batch:
        position = position + offsets[index.clamp(max=batch - 1)].long()
    return position, exists
