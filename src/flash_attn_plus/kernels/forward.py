"""The forward: one Triton kernel for dense, packed and paged attention, on every device that Triton compiles for.

A program owns BLOCK_M query rows of one head and walks over the keys that they see, block by block, with an online
softmax. Dao: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import plan
from ..schemas import Cache, Variant, Varlen
from ..strides import contiguous_rows, has_contiguous_rows
from . import arguments, scores, softmax, tiles
from .launch import Launch, Prepared


# Lengths and windows vary from call to call: a kernel for each of their divisors would gain nothing. Triton obeys for
# arguments only, not for what is in a tuple.
@triton.jit(
    do_not_specialize=["group", "batch", "rows_q", "rows_k", "diagonal", "window_left", "window_right"],
)
def forward_kernel(
    q_ptr,  # (batch, rows, heads, HEAD_DIM), or (rows, heads, HEAD_DIM) and so on where the batch is packed
    k_ptr,  # (pages, page_size, heads_k, HEAD_DIM) where the keys are in pages, (caches, capacity, ...) in a cache
    v_ptr,
    out_ptr,  # contiguous
    lse_ptr,  # float32, contiguous
    strides_q,  # of (batch, row, head); 0 for an axis that is not there
    strides_k,
    strides_v,
    group,  # query heads that share a key head
    batch,
    rows_q,
    rows_k,
    layout,  # the rest of a Layout
    diagonal,
    window_left,
    window_right,
    variant,  # the rest of a Variant
    bias,
    PAGE_SIZE: tl.constexpr,  # None: not in pages
    FAR: tl.constexpr,  # see tiles.block_ptrs
    PAIRS: tl.constexpr,  # see tiles.table_entries
    ALIKE: tl.constexpr,  # k and v have the same strides
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "ieee" or "tf32"
    WIDE: tl.constexpr,  # a tile spans more than 2**31 elements
):
    if ALIKE:  # offsets are then computed once
        strides_v = strides_k
    layout = tiles.Layout(batch, rows_q, rows_k, *layout)
    variant = scores.Variant(diagonal, window_left, window_right, *variant)
    sequence, head_q, first_row = tiles.query_tile(
        tl.program_id(0), layout, BLOCK_M, LAST_FIRST=variant.window_right is not None
    )
    if first_row >= sequence.query_rows:
        return
    head = scores.head_of(sequence, head_q, layout.heads, variant, bias)
    rows = first_row + tl.arange(0, BLOCK_M)

    # (BLOCK_M, BLOCK_D)
    q_ptr = tiles.start_of(q_ptr, sequence.batch, head_q, sequence.query_start + first_row, strides_q)
    q_ptrs = q_ptr + tiles.tile_offsets(strides_q, BLOCK_M, BLOCK_D, WIDE)
    q = tiles.load(q_ptrs, rows, sequence.seqlen_q, HEAD_DIM, BLOCK_D, True)

    head_k = head_q // group
    k_ptr = tiles.start_of(k_ptr, sequence.key_batch, head_k, sequence.key_start, strides_k)
    v_ptr = tiles.start_of(v_ptr, sequence.key_batch, head_k, sequence.key_start, strides_v)

    maximum, total = softmax.start(
        scores.sink_of(sequence, head_q, variant), variant.unit, variant.sink_ptr is not None, BLOCK_M
    )
    values = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    k_offsets = tiles.tile_offsets(strides_k, BLOCK_N, BLOCK_D, WIDE)
    v_offsets = tiles.tile_offsets(strides_v, BLOCK_N, BLOCK_DV, WIDE)
    bounds = scores.key_blocks(first_row, sequence, head, variant, BLOCK_M, BLOCK_N)
    pages = 0
    if PAGE_SIZE is not None:
        pages = tiles.table_entries(bounds[0], bounds[3], sequence, layout, PAGE_SIZE, PAIRS, BLOCK_N)
        pages = tiles.pages_of(pages, layout)
    # Blocks at the left edge of the window, whole blocks, and those at the right edge or the end of the sequence: only
    # the whole ones (part 1) need no mask.
    for part in tl.static_range(3):
        if part != 0 or variant.window_left is not None:
            for start in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
                columns = start + tl.arange(0, BLOCK_N)
                k_ptrs = tiles.block_ptrs(k_ptr, pages, start, strides_k, k_offsets, PAGE_SIZE, FAR, BLOCK_N)
                v_ptrs = tiles.block_ptrs(v_ptr, pages, start, strides_v, v_offsets, PAGE_SIZE, FAR, BLOCK_N)
                if PAGE_SIZE is not None:
                    pages = tiles.table_entries(start + BLOCK_N, bounds[3], sequence, layout, PAGE_SIZE, PAIRS, BLOCK_N)
                    pages = tiles.pages_of(pages, layout)
                # (BLOCK_N, BLOCK_D)
                k = tiles.load(k_ptrs, columns, sequence.seqlen_k, HEAD_DIM, BLOCK_D, part != 1)
                # (BLOCK_M, BLOCK_N)
                products = tl.dot(q, k.T, input_precision=PRECISION)
                s = scores.scale_and_cap(products, variant, q.dtype == tl.float32)
                s = scores.scores(s, first_row, start, sequence, head, variant, bias, part != 1, BLOCK_M, BLOCK_N, WIDE)
                weights, factor, maximum = softmax.update(s, variant.unit, maximum, part != 1 or bias is not None)
                total = softmax.add(total, factor, weights)
                if variant.dropout_threshold is not None:
                    weights = tl.where(scores.keep(first_row, start, head, variant, BLOCK_M, BLOCK_N), weights, 0.0)
                # (BLOCK_N, BLOCK_DV)
                v = tiles.load(v_ptrs, columns, sequence.seqlen_k, HEAD_DIM_V, BLOCK_DV, part != 1)
                if q.dtype == tl.float32 and PRECISION == "ieee":
                    # Each block is summed by itself: one chain of roundings through all keys errs twice as much at
                    # 16k. Not written as a sum, which Triton would fold back into the product's accumulator.
                    block = tl.dot(weights, v, input_precision=PRECISION)
                    values = tl.fma(values, tl.broadcast_to(factor[:, None], [BLOCK_M, BLOCK_DV]), block)
                else:
                    values = tl.dot(weights.to(v.dtype), v, values * factor[:, None], input_precision=PRECISION)
    factor, lse = softmax.finish(maximum, total, variant.unit)
    if variant.dropout_threshold is not None:
        factor *= variant.dropout_scale
    # Not a product with 0: rows that are no queries hold anything.
    is_query = rows < sequence.seqlen_q
    values = tl.where(is_query[:, None], values * factor[:, None], 0.0)
    lse = tl.where(is_query, lse, float("-inf"))

    first = tl.cast(sequence.batch, tl.int64) * layout.rows_q + sequence.query_start + first_row
    out_ptrs = out_ptr + (first * layout.heads + head_q) * HEAD_DIM_V
    out_ptrs += tiles.tile_offsets((0, layout.heads * HEAD_DIM_V, 0), BLOCK_M, BLOCK_DV, WIDE)
    tiles.store(out_ptrs, values.to(out_ptr.dtype.element_ty), rows, sequence.query_rows, HEAD_DIM_V, BLOCK_DV)
    first = (tl.cast(sequence.batch, tl.int64) * layout.heads + head_q) * layout.rows_q
    first += sequence.query_start + first_row
    tl.store(lse_ptr + first + tl.arange(0, BLOCK_M), lse, mask=rows < sequence.query_rows)


class Forward(Prepared):
    """The forward of arguments of one signature: all that follows from it, decided once. Dense where varlen is None;
    k and v are caches where there is ``cache``.

    Calling it with checked arguments of that signature returns out and lse.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        variant: Variant,
        varlen: Varlen | None = None,
        cache: Cache | None = None,
    ) -> None:
        heads, head_dim, head_dim_v = q.shape[-2], q.shape[-1], v.shape[-1]
        super().__init__(q.device)
        self.out = arguments.Result((*q.shape[:-1], head_dim_v), q.dtype, q.device)
        lse_shape = (q.shape[0], heads, q.shape[1]) if varlen is None else (heads, q.shape[0])
        self.lse = arguments.Result(lse_shape, torch.float32, q.device)
        self.empty = 0 in lse_shape
        self.no_sequences = varlen is not None and varlen.cu_seqlens_q.shape[0] == 1
        self.copies = not all(map(has_contiguous_rows, (q, k, v)))
        self.strides = tuple(arguments.strides(x) for x in (q, k, v))
        self.common = arguments.Common(q, k, variant, varlen, cache)
        self.rest = self.common.after(self.strides)

        chosen = plan.forward(arguments.problem(q, v, variant, varlen))
        table = (varlen or cache).block_table if varlen or cache else None
        block_d, block_dv = plan.block_dims(head_dim, head_dim_v)
        if varlen is None:
            row_tiles = q.shape[0] * -(-q.shape[1] // chosen.BLOCK_M)
        else:
            row_tiles = tiles.packed_tiles(q.shape[0], varlen.cu_seqlens_q.shape[0] - 1, chosen.BLOCK_M)
        self.launch = Launch(
            forward_kernel,
            row_tiles * heads,
            constants={
                **arguments.paging(k, v, table, chosen.BLOCK_N),
                "ALIKE": table is not None and self.strides[1] == self.strides[2],
                "HEAD_DIM": head_dim,
                "HEAD_DIM_V": head_dim_v,
                "BLOCK_M": chosen.BLOCK_M,
                "BLOCK_N": chosen.BLOCK_N,
                "BLOCK_D": block_d,
                "BLOCK_DV": block_dv,
                "PRECISION": arguments.precision(q),
                "WIDE": arguments.is_wide(variant, heads * head_dim_v, *self.strides),
            },
            options={"num_warps": chosen.num_warps, "num_stages": chosen.num_stages},
        )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        variant: Variant,
        varlen: Varlen | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.current_index() != self.index:
            return self.elsewhere(q, k, v, variant, varlen, cache)
        out, lse = arguments.empty(self.out, self.lse)
        if self.empty:
            return out, lse
        if self.no_sequences:
            return out.zero_(), lse.fill_(-torch.inf)
        if self.copies:
            q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
        self.launch((q, k, v, out, lse), self.rest or (*self.strides, *self.common(q, k, variant, varlen, cache)))
        return out, lse
