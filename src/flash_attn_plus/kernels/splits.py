"""How the keys of a batch are split among programs: work of about equal size, whatever the lengths are.

A part is a run of one sequence's keys; a slot is what computes one. Lengths are known on the device only, so every
program finds the part of its slot there. Where all sequences have equally many slots (``parts``), slot
``b * parts + i`` computes part i of sequence b. Otherwise (``parts`` is None) slots are numbered through the sequences,
and parts are as short as ``shares`` slots allow, which are more than there are sequences: total / shares keys and some
longer lengths are tried. As ceil(x) < x + 1, parts of total / (shares - batch) keys are long enough for any lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import tiles

_TRIED = tl.constexpr(8)  # lengths, from once to almost twice the shortest one


class Part(NamedTuple):
    index: tl.tensor  # the number of its sequence
    number: tl.tensor  # of the part in it
    count: tl.tensor  # parts of the sequence
    begin: tl.tensor  # its keys, counted from the first one of the sequence
    end: tl.tensor
    exists: tl.tensor


class Shares(NamedTuple):
    """How slots are numbered through the sequences."""

    longest: tl.tensor  # the most blocks of keys of a part
    slots: tl.tensor  # (ENTRIES,): of each sequence


@triton.jit
def _span(index, exist, layout, variant, BLOCK_N: tl.constexpr):
    """The keys that any query of a sequence sees: (first, end). The first is a multiple of BLOCK_N.

    ``index`` is a number, or a block of them.
    """
    _, seqlen_k = tiles.cached_keys(index, layout, exist)
    diagonal = seqlen_k - layout.rows_q
    if variant.diagonal is not None:
        diagonal = variant.diagonal + index * 0
    first, end = index * 0, seqlen_k
    if variant.window_right is not None:
        end = tiles.clamp(diagonal + variant.window_right + layout.rows_q, 0, end)
    if variant.window_left is not None:
        first = tiles.clamp(diagonal - variant.window_left, 0, end) // BLOCK_N * BLOCK_N
    return first, end


@triton.jit
def _blocks(layout, variant, BLOCK_N: tl.constexpr, ENTRIES: tl.constexpr):
    """(blocks of keys that each sequence has, which of the ENTRIES are sequences)."""
    index = tl.arange(0, ENTRIES)
    exist = index < layout.batch
    first, end = _span(index, exist, layout, variant, BLOCK_N)
    return tl.where(exist, tl.cdiv(end - first, BLOCK_N), 0), exist


@triton.jit
def _longest(blocks, exist, batch, shares, SHORTEST: tl.constexpr, BLOCK_N: tl.constexpr):
    """The most blocks of a part, so that all parts find a slot."""
    total = tl.sum(blocks.to(tl.int64), 0)
    least = tl.maximum(tl.cdiv(total, shares).to(tl.int32), SHORTEST // BLOCK_N)
    enough = tl.maximum(tl.cdiv(total, shares - batch).to(tl.int32), least)
    # (_TRIED,), and as many slots as each makes
    tried = least + tl.cdiv(least * tl.arange(0, _TRIED), _TRIED)
    slots = tl.where(exist[None, :], _slots(blocks[None, :], tried[:, None]), 0)
    fits = tl.where(tl.sum(slots.to(tl.int64), 1) <= shares, tried, enough)
    return tl.min(fits, 0)


@triton.jit
def _cut(index, number, slots, layout, variant, BLOCK_N: tl.constexpr):
    """Part ``number`` of a sequence that has so many slots, not all of which must get one."""
    first, end = _span(index, True, layout, variant, BLOCK_N)
    share = tl.maximum(tl.cdiv(tl.cdiv(end - first, BLOCK_N), slots), 1) * BLOCK_N
    count = tl.maximum(tl.cdiv(end - first, share), 1)
    begin = first + number * share
    return Part(index, number, count, begin, tl.minimum(begin + share, end), number < count)


@triton.jit
def _slots(blocks, longest):
    """Of sequences with so many blocks: one at least, which also says so where there are no keys."""
    return tl.maximum(tl.cdiv(blocks, longest), 1)


@triton.jit
def _part_of_sequence(index, number, longest, layout, variant, BLOCK_N: tl.constexpr):
    first, end = _span(index, True, layout, variant, BLOCK_N)
    return _cut(index, number, _slots(tl.cdiv(end - first, BLOCK_N), longest), layout, variant, BLOCK_N)


@triton.jit
def shared_out(
    layout,
    variant,
    shares,
    SHORTEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    blocks, exist = _blocks(layout, variant, BLOCK_N, ENTRIES)
    longest = _longest(blocks, exist, layout.batch, shares, SHORTEST, BLOCK_N)
    return Shares(longest, tl.where(exist, _slots(blocks, longest), 0))


@triton.jit
def part_of(slot, parts, shares, layout, variant, BLOCK_N: tl.constexpr):
    """The part that a slot computes, if any. ``shares``: of ``shared_out``, where sequences have not equally many."""
    if parts is not None:
        return _cut(slot // parts, slot % parts, parts, layout, variant, BLOCK_N)
    else:
        passed = tl.cumsum(shares.slots, 0) <= slot  # those that are no sequences, too, if slot is none
        sequence, start = tl.sum(passed.to(tl.int32), 0), tl.sum(tl.where(passed, shares.slots, 0), 0)
        exists = sequence < layout.batch
        sequence = tl.minimum(sequence, layout.batch - 1)
        part = _part_of_sequence(sequence, slot - start, shares.longest, layout, variant, BLOCK_N)
        return Part(part.index, part.number, part.count, part.begin, part.end, exists & part.exists)


@triton.jit
def parts_of(sequence, shares, layout, variant, BLOCK_N: tl.constexpr):
    """(first slot, parts) of a sequence, where slots are numbered through."""
    earlier = tl.arange(0, shares.slots.shape[0]) < sequence
    first = tl.sum(tl.where(earlier, shares.slots, 0), 0)
    return first, _part_of_sequence(sequence, 0, shares.longest, layout, variant, BLOCK_N).count
