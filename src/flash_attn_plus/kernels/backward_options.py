"""The gradients of options: of the sink, and of the bias.

Both are sums over many rows (and heads, and sequences, where an axis broadcasts). One program adds up in one order, so
reruns are bit-equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import scores, softmax, statistics, tiles


@triton.jit(do_not_specialize=["batch", "rows_q", "rows_k", "diagonal", "window_left", "window_right"])
def sink_gradient_kernel(
    statistics_ptr,
    dsink_ptr,  # (batch, heads)
    batch,
    rows_q,
    rows_k,
    layout,  # the rest of a Layout
    diagonal,
    window_left,
    window_right,
    variant,  # the rest of a Variant
    BLOCK_M: tl.constexpr,
):
    """dsink = -sum over rows of exp(sink - lse) * delta. A program for each head of each sequence."""
    layout = tiles.Layout(batch, rows_q, rows_k, *layout)
    variant = scores.Variant(diagonal, window_left, window_right, *variant)
    index, head = tl.program_id(0) // layout.heads, tl.program_id(0) % layout.heads
    sequence = tiles.sequence_of(index, layout)
    sink = scores.sink_of(sequence, head, variant)
    first = (tl.cast(sequence.batch, tl.int64) * layout.heads + head) * layout.rows_q + sequence.query_start
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, sequence.seqlen_q, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        is_query = rows < sequence.seqlen_q
        shift, delta = statistics.load(statistics_ptr, first + start, is_query, BLOCK_M, True)
        total -= softmax.weight_of_sink(sink, variant.unit, shift) * delta
    tl.store(dsink_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit(
    do_not_specialize=["group", "batch", "rows_q", "rows_k", "diagonal", "window_left", "window_right", "row_tiles"],
)
def bias_gradient_kernel(
    q_ptr,  # as the forward's
    k_ptr,
    v_ptr,
    dout_ptr,  # as out
    statistics_ptr,
    dbias_ptr,  # (strips, batch or 1, heads or 1, rows or 1, columns or 1), contiguous
    strides_q,  # of (batch, row, head); 0 for an axis that is not there
    strides_k,
    strides_v,
    strides_dout,
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
    row_tiles,  # of the longest sequence
    column_tiles,
    strips,  # over which the tiles of summed rows are dealt out
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    SUM_BATCH: tl.constexpr,  # axes along which the bias broadcasts
    SUM_HEADS: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
):
    """dbias = P * (dP - delta), summed along the axes that the bias does not have.

    A program owns one tile of what the bias has; where it has no rows, those of every strips-th tile of rows.
    """
    layout = tiles.Layout(batch, rows_q, rows_k, *layout)
    variant = scores.Variant(diagonal, window_left, window_right, *variant)
    program = tl.program_id(0)
    column_begin, column_end, column_parts = 0, column_tiles, 1
    if not SUM_COLUMNS:
        column_begin, column_parts = program % column_tiles, column_tiles
        column_end = column_begin + 1
    program = program // column_parts
    row_begin, row_end, row_parts = program % strips, row_tiles, strips
    if not SUM_ROWS:
        row_begin, row_parts = program % row_tiles, row_tiles
        row_end = row_begin + 1
    program = program // row_parts
    head_begin, head_end, head_parts = 0, layout.heads, 1
    if not SUM_HEADS:
        head_begin, head_parts = program % layout.heads, layout.heads
        head_end = head_begin + 1
    index_begin, index_end = 0, layout.batch
    if not SUM_BATCH:
        index_begin = program // head_parts
        index_end = index_begin + 1

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in tl.range(index_begin, index_end):
        sequence = tiles.sequence_of(index, layout)
        for head_q in tl.range(head_begin, head_end):
            head = scores.head_of(sequence, head_q, layout.heads, variant, bias)
            q_head = tiles.head_start(q_ptr, sequence.batch, head_q, strides_q)
            k_head = tiles.head_start(k_ptr, sequence.batch, head_q // group, strides_k)
            v_head = tiles.head_start(v_ptr, sequence.batch, head_q // group, strides_v)
            dout_head = tiles.head_start(dout_ptr, sequence.batch, head_q, strides_dout)
            first = (tl.cast(sequence.batch, tl.int64) * layout.heads + head_q) * layout.rows_q
            first += sequence.query_start
            for row_tile in tl.range(row_begin, row_end, row_parts):
                first_row = row_tile * BLOCK_M
                rows = first_row + tl.arange(0, BLOCK_M)
                is_query = rows < sequence.seqlen_q
                row = sequence.query_start + first_row
                q_ptrs = tiles.row_start(q_head, row, strides_q)
                q_ptrs += tiles.tile_offsets(strides_q, BLOCK_M, BLOCK_D, WIDE)
                q = tiles.load(q_ptrs, rows, sequence.seqlen_q, HEAD_DIM, BLOCK_D, True)
                dout_ptrs = tiles.row_start(dout_head, row, strides_dout)
                dout_ptrs += tiles.tile_offsets(strides_dout, BLOCK_M, BLOCK_DV, WIDE)
                dout = tiles.load(dout_ptrs, rows, sequence.seqlen_q, HEAD_DIM_V, BLOCK_DV, True).to(q.dtype)
                shift, delta = statistics.load_rows(statistics_ptr, first + first_row, is_query, BLOCK_M)
                bounds = scores.key_blocks(first_row, sequence, head, variant, BLOCK_M, BLOCK_N)
                begin = tl.maximum(bounds[0] // BLOCK_N, column_begin)
                end = tl.minimum(tl.cdiv(bounds[3], BLOCK_N), column_end)
                for column_tile in tl.range(begin, end):
                    start = column_tile * BLOCK_N
                    columns = start + tl.arange(0, BLOCK_N)
                    k_ptrs = tiles.row_start(k_head, sequence.key_start + start, strides_k)
                    k_ptrs += tiles.tile_offsets(strides_k, BLOCK_N, BLOCK_D, WIDE)
                    v_ptrs = tiles.row_start(v_head, sequence.key_start + start, strides_v)
                    v_ptrs += tiles.tile_offsets(strides_v, BLOCK_N, BLOCK_DV, WIDE)
                    k = tiles.load(k_ptrs, columns, sequence.seqlen_k, HEAD_DIM, BLOCK_D, True)
                    v = tiles.load(v_ptrs, columns, sequence.seqlen_k, HEAD_DIM_V, BLOCK_DV, True)
                    dweights = tl.dot(dout, v.T, input_precision=PRECISION)
                    found = scores.weights_of(
                        tl.dot(q, k.T, input_precision=PRECISION),
                        shift,
                        first_row,
                        start,
                        sequence,
                        head,
                        variant,
                        bias,
                        True,
                        BLOCK_M,
                        BLOCK_N,
                        q.dtype == tl.float32,
                        WIDE,
                    )
                    total += scores.gradient(found, dweights, delta, variant)[0]

    rows, columns = row_begin * BLOCK_M + tl.arange(0, BLOCK_M), column_begin * BLOCK_N + tl.arange(0, BLOCK_N)
    size_rows, size_columns = bias.rows, bias.columns
    part = 0
    if SUM_ROWS:
        total = tl.sum(total, 0, keep_dims=True)
        rows, size_rows, part = tl.arange(0, 1), 1, row_begin
    if SUM_COLUMNS:
        total = tl.sum(total, 1, keep_dims=True)
        columns, size_columns = tl.arange(0, 1), 1
    size_heads = 1 if SUM_HEADS else layout.heads
    size_batch = 1 if SUM_BATCH else layout.batch
    first = (tl.cast(part, tl.int64) * size_batch + index_begin) * size_heads + head_begin
    places = (first * size_rows + rows[:, None]) * size_columns + columns[None, :]
    inside = (rows < size_rows)[:, None] & (columns < size_columns)[None, :]
    tl.store(dbias_ptr + places, total.to(dbias_ptr.dtype.element_ty), mask=inside)
