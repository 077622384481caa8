"""The backward, as the keys see it: dk and dv.

A program owns BLOCK_N keys of one key head, and walks over the rows that see them, of all the query heads that share
it: their gradients are summed here, in one order. Its blocks are transposed, (BLOCK_N, BLOCK_M), so that weights and
gradients of scores go into the next product as they come out of the last one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import scores, statistics, tiles


@triton.jit(
    do_not_specialize=["group", "batch", "rows_q", "rows_k", "diagonal", "window_left", "window_right"],
)
def key_gradient_kernel(
    q_ptr,  # as the forward's
    k_ptr,
    v_ptr,
    dout_ptr,  # as out
    statistics_ptr,
    dk_ptr,  # as k
    dv_ptr,  # as v
    strides_q,  # of (batch, row, head); 0 for an axis that is not there
    strides_k,
    strides_v,
    strides_dout,
    strides_dk,
    strides_dv,
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
    """dv = P'^T dout and dk = scale * dS^T q, or one of them where the other's pointer is None."""
    layout = tiles.Layout(batch, rows_q, rows_k, *layout)
    variant = scores.Variant(diagonal, window_left, window_right, *variant)
    heads_k = layout.heads // group
    sequence, head_k, first_key, end = tiles.key_tile(tl.program_id(0), layout, heads_k, BLOCK_N)
    if first_key >= end:
        return
    keys = first_key + tl.arange(0, BLOCK_N)
    key = sequence.key_start + first_key

    # (BLOCK_N, BLOCK_D), (BLOCK_N, BLOCK_DV)
    k_ptr = tiles.start_of(k_ptr, sequence.batch, head_k, key, strides_k)
    v_ptr = tiles.start_of(v_ptr, sequence.batch, head_k, key, strides_v)
    k_ptrs = k_ptr + tiles.tile_offsets(strides_k, BLOCK_N, BLOCK_D, WIDE)
    v_ptrs = v_ptr + tiles.tile_offsets(strides_v, BLOCK_N, BLOCK_DV, WIDE)
    k = tiles.load(k_ptrs, keys, sequence.seqlen_k, HEAD_DIM, BLOCK_D, True)
    if dk_ptr is not None:
        v = tiles.load(v_ptrs, keys, sequence.seqlen_k, HEAD_DIM_V, BLOCK_DV, True)

    q_offsets = tiles.tile_offsets(strides_q, BLOCK_M, BLOCK_D, WIDE)
    dout_offsets = tiles.tile_offsets(strides_dout, BLOCK_M, BLOCK_DV, WIDE)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first = tl.cast(sequence.batch, tl.int64) * layout.heads
    q_ptr = tiles.start_of(q_ptr, sequence.batch, 0, sequence.query_start, strides_q)
    dout_ptr = tiles.start_of(dout_ptr, sequence.batch, 0, sequence.query_start, strides_dout)
    any_head = scores.head_of(sequence, head_k * group, layout.heads, variant, bias)
    bounds = scores.query_blocks(first_key, sequence, any_head, variant, BLOCK_M, BLOCK_N)
    # Blocks at the right edge of the window, whole blocks, and those at its left edge or the end of the sequence.
    for part in tl.static_range(3):
        if part != 0 or variant.window_right is not None:
            blocks = tl.cdiv(bounds[part + 1] - bounds[part], BLOCK_M)
            # One loop over the blocks of all heads: the accumulators of a loop in a loop would leave the registers.
            head_q, start = head_k * group, bounds[part]
            for _step in tl.range(0, tl.maximum(blocks, 0) * group):
                head = scores.head_of(sequence, head_q, layout.heads, variant, bias)
                rows = start + tl.arange(0, BLOCK_M)
                q_ptrs = tiles.start_of(q_ptr, 0, head_q, start, strides_q) + q_offsets
                dout_ptrs = tiles.start_of(dout_ptr, 0, head_q, start, strides_dout) + dout_offsets
                q = tiles.load(q_ptrs, rows, sequence.seqlen_q, HEAD_DIM, BLOCK_D, part != 1)
                dout = tiles.load(dout_ptrs, rows, sequence.seqlen_q, HEAD_DIM_V, BLOCK_DV, part != 1)
                dout = dout.to(q.dtype)
                row = (first + head_q) * layout.rows_q + sequence.query_start + start
                shift, delta = statistics.load(statistics_ptr, row, rows < sequence.seqlen_q, BLOCK_M, part != 1)
                products = tl.dot(k, q.T, input_precision=PRECISION)
                if dk_ptr is not None:
                    dweights = tl.dot(v, dout.T, input_precision=PRECISION)
                found = scores.weights_of(
                    products,
                    shift,
                    start,
                    first_key,
                    sequence,
                    head,
                    variant,
                    bias,
                    part != 1,
                    BLOCK_M,
                    BLOCK_N,
                    q.dtype == tl.float32,
                    WIDE,
                    TRANSPOSED=True,
                )
                if dv_ptr is not None:
                    dv = tiles.matmul_add(dv, found.met.to(dout.dtype), dout, PRECISION)
                if dk_ptr is not None:
                    dproducts = scores.gradient(found, dweights, delta, variant, TRANSPOSED=True)[1]
                    dk = tiles.matmul_add(dk, dproducts.to(q.dtype), q, PRECISION)
                start += BLOCK_M
                ends = start >= bounds[part + 1]
                head_q += ends.to(tl.int32)
                start = tl.where(ends, bounds[part], start)

    if dk_ptr is not None:
        dk_ptr = tiles.start_of(dk_ptr, sequence.batch, head_k, key, strides_dk)
        dk_ptrs = dk_ptr + tiles.tile_offsets(strides_dk, BLOCK_N, BLOCK_D, WIDE)
        dk = (dk * scores.scale_of(variant)).to(dk_ptr.dtype.element_ty)
        tiles.store(dk_ptrs, dk, keys, end, HEAD_DIM, BLOCK_D)
    if dv_ptr is not None:
        dv_ptr = tiles.start_of(dv_ptr, sequence.batch, head_k, key, strides_dv)
        dv_ptrs = dv_ptr + tiles.tile_offsets(strides_dv, BLOCK_N, BLOCK_DV, WIDE)
        tiles.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), keys, end, HEAD_DIM_V, BLOCK_DV)
