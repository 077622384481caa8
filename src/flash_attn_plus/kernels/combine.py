"""Parts of attention over different keys -> attention over all of them: one Triton kernel.

With the log-sum-exp l of each part: out = sum of exp(l - lse) * part, lse = log of the sum of exp(l). In the order of
the parts, so that the result is always the same. Dao et al.: "Flash-Decoding for long-context inference" (2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import plan
from ..strides import contiguous_rows, has_contiguous_rows, strides_of
from . import arguments, early, softmax, splits, tiles
from .launch import Launch, Prepared
from .scores import Variant


@triton.jit(do_not_specialize=["batch", "seqlen", "heads", "count"])
def combine_kernel(
    out_ptr,  # (batch, seqlen, heads, DIM), contiguous
    lse_ptr,  # (batch, heads, seqlen), contiguous
    parts_ptr,
    lse_parts_ptr,  # None: parts are rows as below
    cache_seqlens_ptr,
    leftpad_ptr,
    strides,  # of parts: (part, batch, row, head), of rows as below in rows
    strides_lse,  # of lse_parts: (part, batch, head, row); None: they are in the rows of parts
    batch,
    seqlen,
    heads,
    count,  # parts of every sequence; None: splits.py tells, and parts are numbered through all sequences
    keys,  # (capacity, seqlen_new, shares), for splits.py
    band,  # (diagonal, window_left, window_right)
    UNIT: tl.constexpr,  # None: log-sum-exps and maxima are natural; 1.0: in base 2
    SHORTEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRIES: tl.constexpr,
    FIRST: tl.constexpr,  # the kernel behind may be placed before the one in front has ended
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # columns of a program
    BLOCK_H: tl.constexpr,  # heads of a program, one after the other
    BLOCK_P: tl.constexpr,  # parts at a time
    EARLY: tl.constexpr,  # see early.py
):
    if FIRST:
        early.let_next_start(EARLY)
    program = tl.program_id(0)
    head_blocks = tl.cdiv(heads, BLOCK_H)
    first_dim = program % tl.cdiv(DIM, BLOCK_D) * BLOCK_D
    program = program // tl.cdiv(DIM, BLOCK_D)
    first_head = program % head_blocks * BLOCK_H
    query = program // head_blocks % seqlen
    index = program // head_blocks // seqlen
    dims = first_dim + tl.arange(0, BLOCK_D)
    for turn in tl.range(0, early.turns(EARLY)):
        now = early.turn(turn, EARLY)
        if now and not FIRST:
            early.let_next_start(EARLY)
        first, parts = index * 0, count
        if count is None:
            layout = tiles.Layout(
                *(batch, seqlen, keys[0], heads, None, None, None, cache_seqlens_ptr, leftpad_ptr, None, None, None),
                *(None, None, batch, None, keys[1]),
            )
            on = splits.line(layout, Variant(*band), keys[2], SHORTEST, BLOCK_N, ENTRIES, now)
            first, parts = splits.parts_of(index, on)
            parts = tl.maximum(parts, 1)  # no length is known in a turn that only prepares
        if count is not None or parts > 1 or not now:  # else written already
            for head in range(first_head, tl.minimum(first_head + BLOCK_H, heads)):
                of_parts = _place(index, query, head, first, strides)
                if lse_parts_ptr is None:
                    row_ptr = parts_ptr + of_parts * row_of_part(DIM)
                    values, lse = _combined(
                        *(row_ptr, row_ptr + maximum_of_part(DIM), row_ptr + sum_of_part(DIM), dims, parts, now),
                        *(strides[0] * row_of_part(DIM), strides[0] * row_of_part(DIM), UNIT, DIM, BLOCK_P),
                    )
                else:
                    lse_parts = lse_parts_ptr + _place(index, head, query, first, strides_lse)
                    values, lse = _combined(
                        *(parts_ptr + of_parts, lse_parts, None, dims, parts, now),
                        *(strides[0], strides_lse[0], UNIT, DIM, BLOCK_P),
                    )
                out_ptrs = out_ptr + ((tl.cast(index, tl.int64) * seqlen + query) * heads + head) * DIM + dims
                tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=now & (dims < DIM))
                lse_ptrs = lse_ptr + ((tl.cast(index, tl.int64) * heads + head) * seqlen + query) + tl.arange(0, 1)
                tl.store(lse_ptrs, lse, mask=now & (first_dim + tl.arange(0, 1) == 0))


@triton.jit
def _place(index, second, third, part, strides):
    """Of the first part of a row: strides of (part, batch, second, third)."""
    place = tl.cast(part, tl.int64) * strides[0] + tl.cast(index, tl.int64) * strides[1]
    return place + tl.cast(second, tl.int64) * strides[2] + tl.cast(third, tl.int64) * strides[3]


@triton.jit
def _combined(
    parts_ptr,
    lse_parts_ptr,  # or their maxima
    sums_ptr,  # of what was summed with these maxima subtracted; None: 1
    dims,  # (BLOCK_D,)
    count,
    now,
    stride,
    stride_lse,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out (BLOCK_D,) and lse (1,) of one row."""
    maximum, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    values = tl.zeros(dims.shape, tl.float32)
    for start in range(0, count, BLOCK_P):
        numbers = start + tl.arange(0, BLOCK_P)
        exist = now & (numbers < count)
        numbers = numbers.to(tl.int64)
        # All are on their way before any is waited for.
        lse = tl.load(lse_parts_ptr + numbers * stride_lse, mask=exist, other=float("-inf")).to(tl.float32)
        mask = exist[:, None] & (dims < DIM)[None, :]
        part = tl.load(parts_ptr + numbers[:, None] * stride + dims[None, :], mask=mask, other=0.0)
        if sums_ptr is not None:
            sums = tl.load(sums_ptr + numbers * stride_lse, mask=exist, other=0.0)
        # (1, BLOCK_P): scores of one query, whose values are the parts
        weights, factor, maximum = softmax.update(lse[None, :], UNIT, maximum, True)
        if sums_ptr is None:
            total = softmax.add(total, factor, weights)
        weights = tl.reshape(weights, [BLOCK_P])
        # A part that saw nothing may hold anything. One whose weight only rounds to 0 counts: 0 * NaN is NaN.
        seen = lse != float("-inf")
        if sums_ptr is not None:
            total = total * factor + tl.sum(tl.where(seen, weights * sums, 0.0), 0)
        summed = tl.sum(tl.where(seen[:, None], weights[:, None] * part.to(tl.float32), 0.0), 0)
        values = values * tl.sum(factor, 0) + summed
    factor, lse = softmax.finish(maximum, total, UNIT)
    return values * tl.sum(factor, 0), lse


# A row of a part whose softmax is not finished (float32): its sum of values, its maximum, its sum of weights; padded
# to 16 bytes.


@triton.constexpr_function
def row_of_part(dim: int) -> int:
    return maximum_of_part(dim) + 4


@triton.constexpr_function
def maximum_of_part(dim: int) -> int:
    return -(-dim // 4) * 4


@triton.constexpr_function
def sum_of_part(dim: int) -> int:
    return maximum_of_part(dim) + 1


_PROGRAMS = 1024  # enough to fill a device: more take several heads each, fewer share a head's columns
_COLUMNS = 32  # of a program, at least
_MOST_PARTS = 4096  # elements at a time
_PARTS_OF_A_WARP = 1024  # of these


def launch(on: torch.device, rows: int, heads: int, dim: int, parts: int, **constants: int) -> Launch:
    """The kernel for that many rows of all heads, and at most that many parts of each."""
    block_h = min(heads, max(1, triton.next_power_of_2(rows * heads // _PROGRAMS)))
    block_d = plan.block_dim(dim)
    columns = block_d
    while columns > _COLUMNS and rows * heads * (block_d // columns) * 2 <= _PROGRAMS:
        columns //= 2
    block_d = columns
    block_p = max(2, min(triton.next_power_of_2(parts), _MOST_PARTS // block_d))
    # Of few elements each thread reads several: that is sooner than to add up through shared memory.
    num_warps = 4 if block_h > 1 else max(1, min(4, block_p * block_d // _PARTS_OF_A_WARP))
    return Launch(
        combine_kernel,
        rows * -(-heads // block_h) * -(-dim // block_d),
        constants={
            **constants,
            "DIM": dim,
            "BLOCK_D": block_d,
            "BLOCK_H": block_h,
            "BLOCK_P": block_p,
            "EARLY": early.allowed(on),
        },
        options={"num_warps": num_warps, "num_stages": 1, **early.options(on)},
    )


class Combine(Prepared):
    """The operator ``combine``, of arguments of one signature."""

    def __init__(self, out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None) -> None:
        super().__init__(out_partial.device)
        shape, dim = out_partial.shape[1:], out_partial.shape[-1]
        self.out = arguments.Result(shape, out_dtype or out_partial.dtype, out_partial.device)
        self.lse = arguments.Result(lse_partial.shape[1:], lse_partial.dtype, out_partial.device)
        rows = shape[:-1].numel()
        self.empty = rows == 0
        if self.empty:
            return
        self.copies = not has_contiguous_rows(out_partial)
        parts = out_partial.new_empty(out_partial.shape, device="meta") if self.copies else out_partial
        if out_partial.dim() == 5:  # (parts, batch, seqlen, heads, dim), and (parts, batch, heads, seqlen)
            batch, seqlen, heads = shape[:3]
            strides = strides_of(parts, (0, 1, 2, 3))
            strides_lse = strides_of(lse_partial, (0, 1, 2, 3))
        else:  # without a batch
            (seqlen, heads), batch = shape[:2], 1
            part, row, head = strides_of(parts, (0, 1, 2))
            strides = (part, 0, row, head)
            part, head, row = strides_of(lse_partial, (0, 1, 2))
            strides_lse = (part, 0, head, row)
        nowhere = (None, None, None)
        self.rest = (strides, strides_lse, batch, seqlen, heads, out_partial.shape[0], nowhere, nowhere)
        self.launch = launch(
            *(self.device, batch * seqlen, heads, dim, out_partial.shape[0]),
            UNIT=None,
            SHORTEST=0,
            BLOCK_N=1,
            ENTRIES=1,
            FIRST=False,
        )

    def __call__(self, out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None):
        if self.current_index() != self.index:
            return self.elsewhere(out_partial, lse_partial, out_dtype)
        out, lse = arguments.empty(self.out, self.lse)
        if self.empty:
            return out, lse
        if self.copies:
            out_partial = contiguous_rows(out_partial)
        self.launch((out, lse, out_partial, lse_partial, None, None), self.rest)
        return out, lse
