"""New keys and values into a cache, in place: one Triton kernel, contiguous or in pages, rotating the keys on the way.

A program owns BLOCK_M new rows of BLOCK_H heads. Rows that would lie outside of the cache are dropped: lengths, numbers
of caches and of pages are known on the device only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..schemas import New
from ..strides import strides_of
from . import arguments, early, rotary
from .launch import Launch, Prepared


@triton.jit(do_not_specialize=["rows", "capacity", "count", "positions"])
def append_kernel(
    k_cache_ptr,  # (count, capacity, heads, HEAD_DIM), or (count, PAGE_SIZE, heads, HEAD_DIM)
    v_cache_ptr,
    k_ptr,  # (batch, rows, heads, HEAD_DIM)
    v_ptr,
    cache_seqlens_ptr,  # (batch,)
    cache_batch_ptr,
    block_table_ptr,
    cos_ptr,  # (positions, HALF)
    sin_ptr,
    strides_k_cache,  # of (cache or page, row, head, column)
    strides_v_cache,
    strides_k,  # of (batch, row, head, column)
    strides_v,
    strides_cos,  # of (position, column)
    strides_sin,
    stride_table,  # elements of a row of the table
    rows,
    heads,
    capacity,
    count,
    positions,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HALF: tl.constexpr,  # pairs of columns that are rotated
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,  # columns of k that are passed on at a time; 0: all are rotated
    BLOCK_V: tl.constexpr,  # columns of v at a time
    WIDE: tl.constexpr,  # columns of a row lie more than 2**31 elements apart
    EARLY: tl.constexpr,  # see early.py
):
    early.let_next_start(EARLY)
    program = tl.program_id(0)
    head_blocks = tl.cdiv(heads, BLOCK_H)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    first_head = program % head_blocks * BLOCK_H
    first_row = program // head_blocks % row_tiles * BLOCK_M
    index = program // head_blocks // row_tiles

    early.wait(index, EARLY)
    # (BLOCK_M,)
    tile_rows = first_row + tl.arange(0, BLOCK_M)
    place = tl.load(cache_seqlens_ptr + index).to(tl.int64) + tile_rows
    fits = (tile_rows < rows) & (place >= 0) & (place < capacity)
    if block_table_ptr is not None:
        table_ptr = block_table_ptr + tl.cast(index, tl.int64) * stride_table
        cache = tl.load(table_ptr + place // PAGE_SIZE, mask=fits, other=-1).to(tl.int64)
        row = place % PAGE_SIZE
    elif cache_batch_ptr is not None:
        cache = tl.load(cache_batch_ptr + index).to(tl.int64) + place * 0
        row = place
    else:
        cache = index.to(tl.int64) + place * 0
        row = place
    fits = fits & (cache >= 0) & (cache < count)

    # (BLOCK_M, BLOCK_H, 1)
    tile_heads = first_head + tl.arange(0, BLOCK_H)
    owned = (fits[:, None] & (tile_heads < heads)[None, :])[:, :, None]
    k_ptrs = k_ptr + _offsets(index.to(tl.int64) + place * 0, tile_rows.to(tl.int64), tile_heads, strides_k)
    v_ptrs = v_ptr + _offsets(index.to(tl.int64) + place * 0, tile_rows.to(tl.int64), tile_heads, strides_v)
    to_k_ptrs = k_cache_ptr + _offsets(cache, row, tile_heads, strides_k_cache)
    to_v_ptrs = v_cache_ptr + _offsets(cache, row, tile_heads, strides_v_cache)
    if HALF > 0:
        rotated = fits & (place < positions)
        cos, sin = rotary.angles(
            cos_ptr, sin_ptr, place, rotated, strides_cos, strides_sin, HALF, BLOCK_HALF, CONJUGATE=False
        )
        rotary.rotate(
            *(k_ptrs, to_k_ptrs, strides_k, strides_k_cache, cos, sin, rotated[:, None, None], owned),
            *(BLOCK_M, BLOCK_H, HALF, BLOCK_HALF, INTERLEAVED, WIDE),
        )
    if BLOCK_REST > 0:
        rotary.pass_on(k_ptrs, to_k_ptrs, strides_k, strides_k_cache, owned, 2 * HALF, HEAD_DIM, BLOCK_REST, WIDE)
    rotary.pass_on(v_ptrs, to_v_ptrs, strides_v, strides_v_cache, owned, 0, HEAD_DIM_V, BLOCK_V, WIDE)


@triton.jit
def _offsets(first, row, head, strides):
    """(BLOCK_M, BLOCK_H, 1) offsets of the heads of rows."""
    of_rows = first * strides[0] + row * strides[1]
    return (of_rows[:, None] + head.to(tl.int64)[None, :] * strides[2])[:, :, None]


# Columns of all rows and heads of a program.
_COLUMNS = 2048


class Append(Prepared):
    """The operator ``append_kv``, of arguments of one signature."""

    def __init__(self, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, new: New) -> None:
        super().__init__(k_cache.device)
        batch, rows, heads, head_dim = k.shape
        head_dim_v, table, cos = v.shape[3], new.block_table, new.rotary_cos
        self.empty = 0 in (batch, rows, heads, *k_cache.shape[:2]) or (table is not None and table.shape[1] == 0)
        if self.empty:
            return
        page_size = None if table is None else k_cache.shape[1]
        max_pages = None if table is None else table.shape[1]
        half = 0 if cos is None else cos.shape[1]
        block_half = triton.next_power_of_2(half) if half else 1
        both = max(1, _COLUMNS // triton.next_power_of_2(max(head_dim, head_dim_v)))  # rows times heads
        block_h = min(triton.next_power_of_2(heads), 8, both)
        block_m = min(triton.next_power_of_2(rows), both // block_h)
        left = head_dim - 2 * half
        strides = tuple(strides_of(x, (0, 1, 2, 3)) for x in (k_cache, v_cache, k, v))
        tables = ((None, None), (None, None)) if cos is None else tuple(strides_of(x, (0, 1)) for x in new[3:5])
        self.gathers = not arguments.all_contiguous(*new[:3])
        self.only_launches = not self.gathers
        self.rest = (
            *(*strides, *tables, max_pages, rows, heads),
            *(k_cache.shape[1] * (max_pages or 1), k_cache.shape[0], 0 if cos is None else cos.shape[0]),
        )
        self.launch = Launch(
            append_kernel,
            batch * -(-rows // block_m) * -(-heads // block_h),
            constants={
                "PAGE_SIZE": page_size,
                "HEAD_DIM": head_dim,
                "HEAD_DIM_V": head_dim_v,
                "HALF": half,
                "INTERLEAVED": new.rotary_interleaved,
                "BLOCK_M": block_m,
                "BLOCK_H": block_h,
                "BLOCK_HALF": block_half,
                "BLOCK_REST": triton.next_power_of_2(left) if left else 0,
                "BLOCK_V": triton.next_power_of_2(head_dim_v),
                "WIDE": any(of_column * 2 * max(head_dim, head_dim_v) >= 2**31 for *_, of_column in strides),
                "EARLY": early.allowed(self.device),
            },
            options={"num_warps": 4, "num_stages": 1, **early.options(self.device)},
        )

    def __call__(self, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, new: New) -> None:
        if self.current_index() != self.index:
            return self.elsewhere(k_cache, v_cache, k, v, new)
        if self.empty:
            return None
        if self.gathers:
            new = New(*map(arguments.contiguous, new[:3]), *new[3:])
        for launch, tensors, rest in self.launches(k_cache, v_cache, k, v, new):
            launch(tensors, rest)
        return None

    def launches(self, k_cache, v_cache, k, v, new: New) -> list[tuple[Launch, tuple, tuple]]:
        """Each with its tensors, or what stands for them, and its other arguments."""
        seqlens, batch_idx, table, cos, sin, _ = new
        return [(self.launch, (k_cache, v_cache, k, v, seqlens, batch_idx, table, cos, sin), self.rest)]
