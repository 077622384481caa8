"""Rotary position embedding: one Triton kernel, dense or packed, halves or interleaved, in place or not.

A program owns BLOCK_M rows of BLOCK_H heads, which share the angles that it loads. It is bound by memory: everything is
read once and written once. Su et al.: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemas import Rotation
from ..strides import strides_of
from . import arguments, tiles
from .launch import Launch, Prepared

# Columns of all rows and heads of a program: 4 warps, each of whose threads holds 16 to 32.
_COLUMNS = 4096
# In place, no element may be held by two threads: one might load it when the other has stored it already. So a tile of
# half of the rotated columns is at least as large as the widest 4 warps.
_THREADS = 256


@triton.jit(do_not_specialize=["batch", "rows", "heads", "positions", "offset"])
def rotary_kernel(
    out_ptr,  # x itself where it is rotated in place
    x_ptr,  # (batch, rows, heads, HEAD_DIM), or (rows, heads, HEAD_DIM) where the batch is packed
    cos_ptr,  # (positions, HALF)
    sin_ptr,
    seqlen_offsets_ptr,  # (batch,)
    cu_seqlens_ptr,  # (batch + 1,) where the batch is packed
    strides_out,  # of (batch, row, head, column); 0 for an axis that is not there
    strides_x,
    strides_cos,  # of (position, column)
    strides_sin,
    batch,
    rows,
    heads,
    positions,
    offset,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # pairs of columns that are rotated
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # columns that are passed on at a time; 0 in place, or where all are rotated
    WIDE: tl.constexpr,  # a tile spans more than 2**31 elements
):
    program = tl.program_id(0)
    head_blocks = tl.cdiv(heads, BLOCK_H)
    first_head = (program % head_blocks) * BLOCK_H
    tile = program // head_blocks
    if cu_seqlens_ptr is None:
        row_tiles = tl.cdiv(rows, BLOCK_M)
        index = tile // row_tiles
        on_axis = index
        first_row = (tile % row_tiles) * BLOCK_M
        start = index * 0
        count = rows
        exists = index >= 0
    else:
        index, exists, start, count, first_row = tiles.packed_tile(tile, cu_seqlens_ptr, batch, rows, BLOCK_M)
        on_axis = index * 0
    if first_row >= count:
        return

    # (BLOCK_M,)
    tile_rows = first_row + tl.arange(0, BLOCK_M)
    position = tile_rows.to(tl.int64) + offset
    if seqlen_offsets_ptr is not None:
        position += tl.load(seqlen_offsets_ptr + index, mask=exists, other=0).to(tl.int64)
    rotated = exists & (position >= 0) & (position < positions)
    cos, sin = angles(
        *(cos_ptr, sin_ptr, position, rotated, strides_cos, strides_sin, HALF, BLOCK_HALF, CONJUGATE),
    )

    # (BLOCK_M, BLOCK_H, 1)
    tile_heads = first_head + tl.arange(0, BLOCK_H)
    owned = ((tile_rows < count)[:, None] & (tile_heads < heads)[None, :])[:, :, None]
    first_row += start
    x_ptrs = tiles.start_of(x_ptr, on_axis, first_head, first_row, strides_x)
    x_ptrs += _tile_offsets(strides_x, BLOCK_M, BLOCK_H, WIDE)
    out_ptrs = tiles.start_of(out_ptr, on_axis, first_head, first_row, strides_out)
    out_ptrs += _tile_offsets(strides_out, BLOCK_M, BLOCK_H, WIDE)

    rotate(
        *(x_ptrs, out_ptrs, strides_x, strides_out, cos, sin, rotated[:, None, None], owned),
        *(BLOCK_M, BLOCK_H, HALF, BLOCK_HALF, INTERLEAVED, WIDE),
    )
    if BLOCK_REST > 0:
        pass_on(x_ptrs, out_ptrs, strides_x, strides_out, owned, 2 * HALF, HEAD_DIM, BLOCK_REST, WIDE)


@triton.jit
def angles(
    cos_ptr,
    sin_ptr,
    position,  # (BLOCK_M,)
    rotated,  # (BLOCK_M,): which of them the tables have
    strides_cos,
    strides_sin,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    CONJUGATE: tl.constexpr,
):
    """cos and sin (BLOCK_M, 1, BLOCK_HALF) of the angles of each row, float32."""
    pairs = tl.arange(0, BLOCK_HALF)
    known = rotated[:, None] & (pairs < HALF)[None, :]
    cos = tl.load(cos_ptr + _table_offsets(position, pairs, strides_cos), mask=known, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + _table_offsets(position, pairs, strides_sin), mask=known, other=0.0).to(tl.float32)
    if CONJUGATE:
        sin = -sin
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def rotate(
    x_ptrs,  # (BLOCK_M, BLOCK_H, 1): column 0
    out_ptrs,
    strides_x,  # of (batch, row, head, column)
    strides_out,
    cos,  # (BLOCK_M, 1, BLOCK_HALF)
    sin,
    rotated,  # (BLOCK_M, 1, 1)
    owned,  # (BLOCK_M, BLOCK_H, 1)
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Turn the first 2 * HALF columns of each row."""
    pairs = tl.arange(0, BLOCK_HALF)
    # (BLOCK_M, BLOCK_H, BLOCK_HALF), or twice as many columns where a and b lie side by side
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_HALF)
        mask = owned & (columns < 2 * HALF)[None, None, :]
        x = tl.load(x_ptrs + _column_offsets(columns, strides_x, WIDE), mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [BLOCK_M, BLOCK_H, BLOCK_HALF, 2]))
    else:
        mask = owned & (pairs < HALF)[None, None, :]
        a = tl.load(x_ptrs + _column_offsets(pairs, strides_x, WIDE), mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptrs + _column_offsets(pairs + HALF, strides_x, WIDE), mask=mask, other=0.0).to(tl.float32)
    # Chosen, not multiplied by 1 and 0: what is passed on may hold anything.
    new_a = tl.where(rotated, a * cos - b * sin, a)
    new_b = tl.where(rotated, a * sin + b * cos, b)
    dtype = out_ptrs.dtype.element_ty
    if INTERLEAVED:
        value = tl.reshape(tl.join(new_a, new_b), [BLOCK_M, BLOCK_H, 2 * BLOCK_HALF])
        tl.store(out_ptrs + _column_offsets(columns, strides_out, WIDE), value.to(dtype), mask=mask)
    else:
        tl.store(out_ptrs + _column_offsets(pairs, strides_out, WIDE), new_a.to(dtype), mask=mask)
        tl.store(out_ptrs + _column_offsets(pairs + HALF, strides_out, WIDE), new_b.to(dtype), mask=mask)


@triton.jit
def pass_on(
    x_ptrs,  # (BLOCK_M, BLOCK_H, 1): column 0
    out_ptrs,
    strides_x,
    strides_out,
    owned,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Copy columns FIRST to END of each row, BLOCK at a time."""
    for first in range(FIRST, END, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = owned & (columns < END)[None, None, :]
        value = tl.load(x_ptrs + _column_offsets(columns, strides_x, WIDE), mask=mask)
        tl.store(out_ptrs + _column_offsets(columns, strides_out, WIDE), value, mask=mask)


@triton.jit
def _table_offsets(position, pairs, strides):
    return position[:, None] * strides[0] + pairs[None, :] * strides[1]


@triton.jit
def _tile_offsets(strides, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, WIDE: tl.constexpr):
    """(BLOCK_M, BLOCK_H, 1) offsets of rows and heads from the first of them."""
    rows = tl.arange(0, BLOCK_M)
    heads = tl.arange(0, BLOCK_H)
    if WIDE:
        rows = rows.to(tl.int64)
        heads = heads.to(tl.int64)
    return (rows[:, None] * strides[1] + heads[None, :] * strides[2])[:, :, None]


@triton.jit
def _column_offsets(columns, strides, WIDE: tl.constexpr):
    """(1, 1, columns)"""
    if WIDE:
        columns = columns.to(tl.int64)
    return (columns * strides[3])[None, None, :]


class Rotary(Prepared):
    """Rotations of arguments of one signature, whatever the offset is: all that follows from it, decided once.

    Calling it with checked arguments of that signature returns the result; nothing where ``in_place``.
    """

    def __init__(self, x: Tensor, rotation: Rotation, in_place: bool) -> None:
        super().__init__(x.device)
        cos, sin, _, _, cu_seqlens, _, interleaved, conjugate = rotation
        packed = cu_seqlens is not None
        batch, rows = (cu_seqlens.shape[0] - 1, x.shape[0]) if packed else x.shape[:2]
        heads, head_dim = x.shape[-2:]
        half = cos.shape[1]
        self.out = None if in_place else arguments.Result(x.shape, x.dtype, x.device)
        self.empty = x.numel() == 0
        if self.empty:
            return
        strides_x = _strides(x)
        strides_out = strides_x if in_place else _strides(torch.empty(x.shape, dtype=x.dtype, device="meta"))
        # All that stands behind the tensors, but for the offset.
        self.rest = (strides_out, strides_x, strides_of(cos, (0, 1)), strides_of(sin, (0, 1)))
        self.rest += (batch, rows, heads, cos.shape[0])

        block_half = triton.next_power_of_2(half)
        both = max(_COLUMNS // triton.next_power_of_2(head_dim), -(-_THREADS // block_half))  # rows times heads
        block_h = min(triton.next_power_of_2(heads), 4, both)
        block_m = both // block_h
        left = 0 if in_place else head_dim - 2 * half
        row_tiles = tiles.packed_tiles(rows, batch, block_m) if packed else batch * -(-rows // block_m)
        self.launch = Launch(
            rotary_kernel,
            row_tiles * -(-heads // block_h),
            constants={
                "HEAD_DIM": head_dim,
                "HALF": half,
                "INTERLEAVED": interleaved,
                "CONJUGATE": conjugate,
                "BLOCK_M": block_m,
                "BLOCK_H": block_h,
                "BLOCK_HALF": block_half,
                "BLOCK_REST": min(triton.next_power_of_2(left), max(_COLUMNS // both, 1)) if left else 0,
                "WIDE": any(
                    _span(strides, block_m, block_h, head_dim) >= 2**31 for strides in (strides_x, strides_out)
                ),
            },
            options={"num_warps": 4, "num_stages": 1},
        )

    def __call__(self, x: Tensor, rotation: Rotation) -> Tensor | None:
        if self.current_index() != self.index:
            return self.elsewhere(x, rotation)
        out = None if self.out is None else arguments.empty(self.out)[0]
        if self.empty:
            return out
        cos, sin, offset, seqlen_offsets, cu_seqlens, *_ = rotation
        lists = map(arguments.contiguous, (seqlen_offsets, cu_seqlens))
        tensors = (x if out is None else out, x, cos, sin, *lists)
        # Past the table is past the table, and 32 bits hold it. Always in a new tuple: Launch keeps what it made of the
        # last one, and another thread may rotate by another offset meanwhile.
        self.launch(tensors, (*self.rest, min(offset, cos.shape[0])))
        return out


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Of (batch, row, head, column); a packed tensor has no batch."""
    return strides_of(x, (0, 1, 2, 3)) if x.dim() == 4 else (0, *strides_of(x, (0, 1, 2)))


def _span(strides: tuple[int, ...], rows: int, heads: int, columns: int) -> int:
    return sum(stride * size for stride, size in zip(strides[1:], (rows, heads, columns), strict=True))
