"""The online softmax: one pass over the keys with a running row maximum and row sum.

Milakov, Gimelshein: "Online normalizer calculation for softmax" (2018). Weights come from exp2, which is what hardware
computes. Where nothing lies between products and softmax, ``unit`` = softmax scale * log2(e) brings products to base 2
in one multiply-add, and the maximum is kept in base 2. Otherwise ``unit`` is None, scores and maximum are natural, and
differences are brought to base 2: a bias of -3e38 would overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _as_kept(x, unit):
    """A natural logit as maximum and log-sum-exp are kept."""
    if unit is not None:
        return x * LOG2_E
    else:
        return x


@triton.jit
def start(sink, unit, HAS_SINK: tl.constexpr, BLOCK_M: tl.constexpr):
    """(maximum, sum) of rows that have seen no key. A sink is a logit that every row has seen: it has no value."""
    if HAS_SINK:
        return tl.zeros([BLOCK_M], tl.float32) + _as_kept(sink, unit), tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        return tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def update(scores, unit, maximum, SAFE: tl.constexpr):
    """Take in a block of scores (BLOCK_M, BLOCK_N): its weights, the factor of what was summed before, the new maximum.

    SAFE where a row's scores may all be -inf: then 0 stands for the maximum, and the weights are 0 instead of NaN.
    """
    block_maximum = tl.max(scores, 1)
    if unit is not None:
        block_maximum = block_maximum * unit
    new_maximum = tl.maximum(maximum, block_maximum)
    shift = new_maximum
    if SAFE:
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    if unit is not None:
        exponents = scores * unit - shift[:, None]
        difference = maximum - shift
    else:
        exponents = (scores - shift[:, None]) * LOG2_E
        difference = (maximum - shift) * LOG2_E
    return tl.math.exp2(exponents), tl.math.exp2(difference), new_maximum


@triton.jit
def in_sums(total, SUMS: tl.constexpr):
    """A row's sum as SUMS of them, which are added up at the end alone: where threads add up different ones, they need
    not meet before. (BLOCK_M, SUMS) where there are several.
    """
    if SUMS == 1:
        return total
    else:
        return tl.where(tl.arange(0, SUMS)[None, :] == 0, total[:, None], 0.0)


@triton.jit
def add(sums, factor, weights, SUMS: tl.constexpr = 1):
    """A block's ``weights`` to what was summed before, which takes their ``factor`` now."""
    if SUMS == 1:
        return sums * factor + tl.sum(weights, 1)
    else:
        groups: tl.constexpr = weights.shape[1] // SUMS
        return sums * factor[:, None] + tl.sum(tl.reshape(weights, [weights.shape[0], groups, SUMS]), 1)


@triton.jit
def total_of(sums, SUMS: tl.constexpr):
    if SUMS == 1:
        return sums
    else:
        return tl.sum(sums, 1)


@triton.jit
def finish(maximum, total, unit):
    """(factor that normalises the sum of values, log-sum-exp): lse is -inf for rows that have seen nothing."""
    nothing = total == 0.0
    divisor = tl.where(nothing, 1.0, total)
    if unit is not None:
        lse = (maximum + tl.math.log2(divisor)) * LN_2
    else:
        lse = maximum + tl.math.log2(divisor) * LN_2
    return 1.0 / divisor, tl.where(nothing, float("-inf"), lse)


@triton.jit
def shift_of(lse, unit):
    """What ``weights`` subtracts: +inf for rows that see nothing, so that their weights are exactly 0."""
    return _as_kept(tl.where(lse == float("-inf"), float("inf"), lse), unit)


@triton.jit
def weights(scores, unit, shift):
    """The weights again, from their scores and what ``shift_of`` makes of the log-sum-exp."""
    if unit is not None:
        return tl.math.exp2(scores * unit - shift)
    else:
        return tl.math.exp2((scores - shift) * LOG2_E)


@triton.jit
def weight_of_sink(sink, unit, shift):
    """Its share of the softmax of a row."""
    difference = _as_kept(sink, unit) - shift
    return tl.math.exp2(difference if unit is not None else difference * LOG2_E)
