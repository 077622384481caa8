"""What makes one attention differ from another: scores, masks, dropout. The forward and the backward call the same.

    s = q.k * scale -> softcap * tanh(s / softcap) -> + ALiBi, + bias -> mask -> softmax -> dropout

An option that is absent is None in ``Variant``, and its code is not compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .softmax import LOG2_E


class Variant(NamedTuple):
    """The options of a call, as it is launched.

    The softmax scale is in ``unit`` where nothing lies between the products and the softmax, and else in ``scale``.
    The first three vary from call to call.
    """

    diagonal: tl.tensor | None  # query i meets key i + diagonal; None: seqlen_k - seqlen_q
    window_left: tl.tensor | None  # None: unlimited
    window_right: tl.tensor | None
    unit: tl.tensor | None = None  # what brings products to base 2: see softmax.py
    scale: tl.tensor | None = None
    softcap: tl.tensor | None = None
    slopes_ptr: tl.tensor | None = None  # ALiBi
    stride_slopes_batch: tl.tensor | None = None
    sink_ptr: tl.tensor | None = None
    stride_sink_batch: tl.tensor | None = None
    rng_state_ptr: tl.tensor | None = None  # int64 (seed, offset)
    dropout_threshold: tl.tensor | None = None  # a score is dropped where its random word is below
    dropout_scale: tl.tensor | None = None  # 1 / (1 - p)


class Bias(NamedTuple):
    """attn_bias; of bool: True keeps. Strides are 0 where it broadcasts; nothing at or past rows, columns is read."""

    ptr: tl.tensor
    stride_batch: tl.tensor
    stride_head: tl.tensor
    stride_row: tl.tensor
    stride_column: tl.tensor
    rows: tl.tensor
    columns: tl.tensor


class Head(NamedTuple):
    """What the options come to in one head of one sequence; 0 for what is absent."""

    diagonal: tl.tensor
    slope: tl.tensor
    bias_ptr: tl.tensor  # row 0, column 0
    seed: tl.tensor
    offset: tl.tensor
    number: tl.tensor  # sequence * heads + head: dropout's counter


@triton.jit
def head_of(sequence, head, heads, variant, bias):
    diagonal = sequence.seqlen_k - sequence.seqlen_q
    if variant.diagonal is not None:
        diagonal = variant.diagonal
    slope = 0.0
    if variant.slopes_ptr is not None:
        slope = tl.load(variant.slopes_ptr + sequence.index * variant.stride_slopes_batch + head)
    bias_ptr = 0
    if bias is not None:
        bias_ptr = bias.ptr + tl.cast(sequence.index, tl.int64) * bias.stride_batch
        bias_ptr += tl.cast(head, tl.int64) * bias.stride_head
    seed, offset = 0, 0
    if variant.dropout_threshold is not None:
        seed, offset = tl.load(variant.rng_state_ptr), tl.load(variant.rng_state_ptr + 1)
    return Head(diagonal, slope, bias_ptr, seed, offset, sequence.index * heads + head)


@triton.jit
def sink_of(sequence, head, variant):
    """The head's sink logit; 0 where there is none."""
    if variant.sink_ptr is None:
        return 0.0
    else:
        return tl.load(variant.sink_ptr + sequence.index * variant.stride_sink_batch + head).to(tl.float32)


@triton.jit
def key_blocks(first_row, sequence, head, variant, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that a tile of query rows sees: (begin, full_begin, full_end, end).

    Blocks from begin to end are visited; those from full_begin to full_end are seen whole by every row and need no
    mask. All but end are multiples of BLOCK_N. Rows that are no queries see nothing.
    """
    last_row = tl.minimum(first_row + BLOCK_M, sequence.seqlen_q) - 1
    begin, full_begin = 0, 0
    end, full_end = sequence.seqlen_k, sequence.seqlen_k
    if variant.window_right is not None:
        reach = head.diagonal + variant.window_right + 1
        end = tl.minimum(end, last_row + reach)
        full_end = tl.minimum(full_end, first_row + reach)
    if variant.window_left is not None:
        reach = head.diagonal - variant.window_left
        begin = tl.maximum(first_row + reach, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last_row + reach, 0), BLOCK_N) * BLOCK_N
    holds_queries = first_row < sequence.seqlen_q
    begin, end = tl.where(holds_queries, begin, 0), tl.where(holds_queries, end, 0)
    full_end = tl.maximum(tl.minimum(full_end, end), 0) // BLOCK_N * BLOCK_N
    full_end = tl.maximum(full_end, begin)
    full_begin = tl.minimum(full_begin, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    """tanh from exp2, which every target has. Near 0 that is off by half a unit of 1.0; PRECISE takes a polynomial."""
    result = 1.0 - 2.0 / (tl.math.exp2(x * (2 * LOG2_E)) + 1.0)
    if PRECISE:
        # Least relative error on |x| < 0.5: 3.6e-10.
        y = x * x
        series = -0.0066474815 * y + 0.0212979873
        series = series * y - 0.0538991897
        series = series * y + 0.1333296425
        series = series * y - 0.3333332688
        result = tl.where(tl.abs(x) < 0.5, x + x * (y * series), result)
    return result


@triton.jit
def scores(
    products,
    first_row,
    first_column,
    sequence,
    head,
    variant,
    bias,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Products q.k (BLOCK_M, BLOCK_N) -> scores before the softmax, -inf where a query does not see a key.

    MASK where the block crosses the edge of a window or of the sequence; PRECISE where products are float32 to the end.
    """
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    s = products
    if variant.softcap is not None:
        s = _tanh(s * (variant.scale / variant.softcap), PRECISE) * variant.softcap
    elif variant.scale is not None:
        s = s * variant.scale
    if variant.slopes_ptr is not None:
        distance = tl.abs(rows[:, None] + head.diagonal - columns[None, :])
        s = s - head.slope * distance.to(tl.float32)
    if bias is not None:
        s = _with_bias(s, first_row, first_column, head, bias, BLOCK_M, BLOCK_N, WIDE)
    if MASK:
        seen = columns[None, :] < sequence.seqlen_k
        if variant.window_right is not None:
            seen = seen & (columns[None, :] <= rows[:, None] + (head.diagonal + variant.window_right))
        if variant.window_left is not None:
            seen = seen & (columns[None, :] >= rows[:, None] + (head.diagonal - variant.window_left))
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _with_bias(
    s, first_row, first_column, head, bias, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr
):
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (rows < bias.rows - first_row)[:, None] & (columns < bias.columns - first_column)[None, :]
    if WIDE:
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    first = tl.cast(first_row, tl.int64) * bias.stride_row + tl.cast(first_column, tl.int64) * bias.stride_column
    ptrs = head.bias_ptr + first + (rows[:, None] * bias.stride_row + columns[None, :] * bias.stride_column)
    value = tl.load(ptrs, mask=inside, other=0)
    if bias.ptr.dtype.element_ty == tl.int1:
        return tl.where(value, s, float("-inf"))
    else:
        return s + value.to(tl.float32)


@triton.jit
def keep(first_row, first_column, head, variant, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which scores of a block (BLOCK_M, BLOCK_N) survive dropout. ``first_column`` is a multiple of 4.

    Score (i, j) takes word j % 4 of Philox4x32-10 with key = seed and counter (j // 4, i, head, offset): the pattern
    depends on the score's place alone, and a block draws each word once. Salmon et al. (SC 2011).
    """
    zeros = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    quads = (first_column // 4 + tl.arange(0, BLOCK_N // 4))[None, :] + zeros
    rows = (first_row + tl.arange(0, BLOCK_M))[:, None] + zeros
    words = tl.philox(head.seed, quads, rows, head.number + zeros, head.offset.to(tl.int32) + zeros)
    threshold = variant.dropout_threshold.to(tl.uint32)
    # Joined as bytes, not as words: the change of layout moves a quarter of the data.
    even = tl.join((words[0] >= threshold).to(tl.int8), (words[2] >= threshold).to(tl.int8))
    odd = tl.join((words[1] >= threshold).to(tl.int8), (words[3] >= threshold).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_N]) != 0
