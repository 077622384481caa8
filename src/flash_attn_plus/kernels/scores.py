"""What makes one attention differ from another: scores, masks, dropout. The forward and the backward call the same.

    s = q.k * scale -> softcap * tanh(s / softcap) -> + ALiBi, + bias -> mask -> softmax -> dropout

An option that is absent is None in ``Variant``, and its code is not compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import softmax
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
def query_blocks(first_column, sequence, head, variant, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The query rows that see a tile of keys, as ``key_blocks`` has the keys: all but end are multiples of BLOCK_M."""
    last_column = tl.minimum(first_column + BLOCK_N, sequence.seqlen_k) - 1
    begin, full_begin = 0, 0
    end, full_end = sequence.seqlen_q, sequence.seqlen_q
    if variant.window_right is not None:
        reach = head.diagonal + variant.window_right
        begin = tl.maximum(first_column - reach, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(last_column - reach, 0), BLOCK_M) * BLOCK_M
    if variant.window_left is not None:
        reach = head.diagonal - variant.window_left - 1
        end = tl.minimum(end, last_column - reach)
        full_end = tl.minimum(full_end, first_column - reach)
    holds_keys = first_column < sequence.seqlen_k
    begin, end = tl.where(holds_keys, begin, 0), tl.where(holds_keys, end, 0)
    full_end = tl.maximum(tl.minimum(full_end, end), 0) // BLOCK_M * BLOCK_M
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
def scale_and_cap(products, variant, PRECISE: tl.constexpr):
    """Products q.k -> scores before ALiBi, bias and mask. PRECISE where products are float32 to the end."""
    if variant.softcap is not None:
        return _tanh(products * (variant.scale / variant.softcap), PRECISE) * variant.softcap
    elif variant.scale is not None:
        return products * variant.scale
    else:
        return products


@triton.jit
def _aranges(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Rows and columns of a block (BLOCK_M, BLOCK_N), or of its transpose, to be broadcast against it."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        return rows[None, :], columns[:, None]
    else:
        return rows[:, None], columns[None, :]


@triton.jit
def scores(
    s,
    first_row,
    first_column,
    sequence,
    head,
    variant,
    bias,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
    GROUP: tl.constexpr = 1,
):
    """What ``scale_and_cap`` returns (BLOCK_M, BLOCK_N) -> scores before the softmax, -inf where a query sees no key.

    MASK where the block crosses the edge of a window or of the sequence; TRANSPOSED where it is (BLOCK_N, BLOCK_M).
    GROUP rows next to each other are heads of one query.
    """
    rows, columns = _aranges(BLOCK_M, BLOCK_N, TRANSPOSED)
    rows, columns = first_row + rows, first_column + columns
    if GROUP > 1:
        rows = rows // GROUP
    if variant.slopes_ptr is not None:
        distance = tl.abs(rows + head.diagonal - columns)
        s = s - head.slope * distance.to(tl.float32)
    if bias is not None:
        s = _with_bias(s, first_row, first_column, head, bias, BLOCK_M, BLOCK_N, WIDE, TRANSPOSED)
    if MASK:
        seen = columns < sequence.seqlen_k
        if variant.window_right is not None:
            seen = seen & (columns <= rows + (head.diagonal + variant.window_right))
        if variant.window_left is not None:
            seen = seen & (columns >= rows + (head.diagonal - variant.window_left))
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _with_bias(
    s,
    first_row,
    first_column,
    head,
    bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    rows, columns = _aranges(BLOCK_M, BLOCK_N, TRANSPOSED)
    inside = (rows < bias.rows - first_row) & (columns < bias.columns - first_column)
    if WIDE:
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    first = tl.cast(first_row, tl.int64) * bias.stride_row + tl.cast(first_column, tl.int64) * bias.stride_column
    ptrs = head.bias_ptr + first + (rows * bias.stride_row + columns * bias.stride_column)
    value = tl.load(ptrs, mask=inside, other=0)
    if bias.ptr.dtype.element_ty == tl.int1:
        return tl.where(value, s, float("-inf"))
    else:
        return s + value.to(tl.float32)


@triton.jit
def keep(
    first_row,
    first_column,
    head,
    variant,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """Which scores of a block (BLOCK_M, BLOCK_N) survive dropout. ``first_column`` is a multiple of 4.

    Score (i, j) takes word j % 4 of Philox4x32-10 with key = seed and counter (j // 4, i, head, offset): the pattern
    depends on the score's place alone, and a block draws each word once. Salmon et al. (SC 2011).
    """
    rows, quads = _aranges(BLOCK_M, BLOCK_N // 4, TRANSPOSED)
    quads = first_column // 4 + quads + rows * 0
    rows = first_row + rows + quads * 0
    words = tl.philox(head.seed, quads, rows, head.number + quads * 0, head.offset.to(tl.int32) + quads * 0)
    threshold = variant.dropout_threshold.to(tl.uint32)
    # Joined as bytes, not as words: the change of layout moves a quarter of the data.
    even = tl.join((words[0] >= threshold).to(tl.int8), (words[2] >= threshold).to(tl.int8))
    odd = tl.join((words[1] >= threshold).to(tl.int8), (words[3] >= threshold).to(tl.int8))
    kept = tl.join(even, odd)
    if TRANSPOSED:
        return tl.reshape(tl.permute(kept, (0, 2, 3, 1)), [BLOCK_N, BLOCK_M]) != 0
    else:
        return tl.reshape(kept, [BLOCK_M, BLOCK_N]) != 0


@triton.jit
def scale_of(variant):
    """The softmax scale: what a gradient of products is multiplied by."""
    if variant.scale is not None:
        return variant.scale
    else:
        return variant.unit * softmax.LN_2


class Weights(NamedTuple):
    """Of a block, computed again from its scores and the log-sum-exp."""

    weights: tl.tensor
    met: tl.tensor  # those that met the values: dropped and rescaled
    kept: tl.tensor  # by dropout; 0 where there is none
    capped: tl.tensor  # scores before ALiBi, bias and mask


@triton.jit
def _per_row(x, TRANSPOSED: tl.constexpr):
    """A number for each row, to be broadcast against a block."""
    if TRANSPOSED:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def weights_of(
    products,
    shift,
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
    TRANSPOSED: tl.constexpr = False,
):
    """Weights (BLOCK_M, BLOCK_N) from the products q.k and ``shift`` (BLOCK_M,), from softmax.shift_of."""
    capped = scale_and_cap(products, variant, PRECISE)
    s = scores(capped, first_row, first_column, sequence, head, variant, bias, MASK, BLOCK_M, BLOCK_N, WIDE, TRANSPOSED)
    weights = softmax.weights(s, variant.unit, _per_row(shift, TRANSPOSED))
    met, kept = weights, 0
    if variant.dropout_threshold is not None:
        kept = keep(first_row, first_column, head, variant, BLOCK_M, BLOCK_N, TRANSPOSED)
        met = tl.where(kept, weights * variant.dropout_scale, 0.0)
    return Weights(weights, met, kept, capped)


@triton.jit
def gradient(found, dweights, delta, variant, TRANSPOSED: tl.constexpr = False):
    """(gradient of the bias, gradient of products * scale), from ``Weights`` and ``dweights`` = dout.v, the gradient of
    those that met the values. ``delta`` (BLOCK_M,) is finite.
    """
    if variant.dropout_threshold is not None:
        dweights = tl.where(found.kept, dweights * variant.dropout_scale, 0.0)
    dbias = found.weights * (dweights - _per_row(delta, TRANSPOSED))
    if variant.softcap is not None:
        ratio = found.capped / variant.softcap
        return dbias, dbias * (1.0 - ratio * ratio)
    else:
        return dbias, dbias
