"""The backward, as the queries see it: what the other passes need of each row, and dq.

A program owns BLOCK_M query rows of one head, as in the forward, and walks over the same keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import scores, softmax, statistics, tiles


@triton.jit(
    do_not_specialize=["group", "batch", "rows_q", "rows_k", "diagonal", "window_left", "window_right"],
)
def query_gradient_kernel(
    q_ptr,  # as the forward's
    k_ptr,
    v_ptr,
    dout_ptr,  # as out
    out_ptr,
    lse_ptr,  # contiguous, as dlse
    dlse_ptr,
    statistics_ptr,
    dq_ptr,  # as q
    strides_q,  # of (batch, row, head); 0 for an axis that is not there
    strides_k,
    strides_v,
    strides_dout,
    strides_out,
    strides_dq,
    group,
    batch,
    rows_q,
    rows_k,
    layout,  # the rest of a Layout
    diagonal,
    window_left,
    window_right,
    variant,  # the rest of a Variant
    bias,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse, the shift of softmax.weights, and where dq is wanted dq = scale * dS k."""
    layout = tiles.Layout(batch, rows_q, rows_k, *layout)
    variant = scores.Variant(diagonal, window_left, window_right, *variant)
    sequence, head_q, first_row = tiles.query_tile(
        tl.program_id(0), layout, BLOCK_M, LAST_FIRST=variant.window_right is not None
    )
    if first_row >= sequence.query_rows:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    is_query = rows < sequence.seqlen_q
    row = sequence.query_start + first_row
    first = (tl.cast(sequence.batch, tl.int64) * layout.heads + head_q) * layout.rows_q + row

    # (BLOCK_M, BLOCK_DV)
    dout_ptr = tiles.start_of(dout_ptr, sequence.batch, head_q, row, strides_dout)
    dout_ptrs = dout_ptr + tiles.tile_offsets(strides_dout, BLOCK_M, BLOCK_DV, WIDE)
    dout = tiles.load(dout_ptrs, rows, sequence.seqlen_q, HEAD_DIM_V, BLOCK_DV, True)
    out_ptr = tiles.start_of(out_ptr, sequence.batch, head_q, row, strides_out)
    out_ptrs = out_ptr + tiles.tile_offsets(strides_out, BLOCK_M, BLOCK_DV, WIDE)
    out = tiles.load(out_ptrs, rows, sequence.seqlen_q, HEAD_DIM_V, BLOCK_DV, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + first + tl.arange(0, BLOCK_M), mask=is_query, other=0.0)
    lse = tl.load(lse_ptr + first + tl.arange(0, BLOCK_M), mask=is_query, other=float("-inf"))
    delta = tl.where(lse == float("-inf"), 0.0, delta)  # whatever came with a row that sees nothing
    shift = softmax.shift_of(lse, variant.unit)
    statistics.store(statistics_ptr, first, shift, delta, is_query, BLOCK_M)

    if dq_ptr is not None:
        head = scores.head_of(sequence, head_q, layout.heads, variant, bias)
        # (BLOCK_M, BLOCK_D)
        q_ptr = tiles.start_of(q_ptr, sequence.batch, head_q, row, strides_q)
        q_ptrs = q_ptr + tiles.tile_offsets(strides_q, BLOCK_M, BLOCK_D, WIDE)
        q = tiles.load(q_ptrs, rows, sequence.seqlen_q, HEAD_DIM, BLOCK_D, True)
        dout = dout.to(q.dtype)

        head_k = head_q // group
        k_ptr = tiles.start_of(k_ptr, sequence.batch, head_k, sequence.key_start, strides_k)
        v_ptr = tiles.start_of(v_ptr, sequence.batch, head_k, sequence.key_start, strides_v)
        k_offsets = tiles.tile_offsets(strides_k, BLOCK_N, BLOCK_D, WIDE)
        v_offsets = tiles.tile_offsets(strides_v, BLOCK_N, BLOCK_DV, WIDE)

        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        bounds = scores.key_blocks(first_row, sequence, head, variant, BLOCK_M, BLOCK_N)
        for part in tl.static_range(3):
            if part != 0 or variant.window_left is not None:
                for start in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
                    columns = start + tl.arange(0, BLOCK_N)
                    k_ptrs = tiles.row_start(k_ptr, start, strides_k) + k_offsets
                    v_ptrs = tiles.row_start(v_ptr, start, strides_v) + v_offsets
                    k = tiles.load(k_ptrs, columns, sequence.seqlen_k, HEAD_DIM, BLOCK_D, part != 1)
                    v = tiles.load(v_ptrs, columns, sequence.seqlen_k, HEAD_DIM_V, BLOCK_DV, part != 1)
                    products = tl.dot(q, k.T, input_precision=PRECISION)
                    dweights = tl.dot(dout, v.T, input_precision=PRECISION)
                    found = scores.weights_of(
                        products,
                        shift,
                        first_row,
                        start,
                        sequence,
                        head,
                        variant,
                        bias,
                        part != 1,
                        BLOCK_M,
                        BLOCK_N,
                        q.dtype == tl.float32,
                        WIDE,
                    )
                    dproducts = scores.gradient(found, dweights, delta, variant)[1]
                    dq = tiles.matmul_add(dq, dproducts.to(k.dtype), k, PRECISION)
        dq = tl.where(is_query[:, None], dq * scores.scale_of(variant), 0.0)
        dq_ptr = tiles.start_of(dq_ptr, sequence.batch, head_q, row, strides_dq)
        dq_ptrs = dq_ptr + tiles.tile_offsets(strides_dq, BLOCK_M, BLOCK_D, WIDE)
        dq = dq.to(dq_ptr.dtype.element_ty)
        tiles.store(dq_ptrs, dq, rows, sequence.query_rows, HEAD_DIM, BLOCK_D)
