"""How the keys of a batch are split among programs: work of equal size, whatever the lengths are.

A slot is what the programs of one number compute: one for each key head and tile of rows. A part is what a slot has of
one sequence: blocks of keys. Lengths are known on the device only, so every program finds its parts there.

Where all sequences have equally many slots (``parts``), slot ``b * parts + i`` has blocks i, i + parts, i + 2 * parts,
... of sequence b: where the first one lies is known before any length is, unless a window ends on its left.

Otherwise (``parts`` is None) the blocks of keys of all sequences lie behind each other on a line, which is cut into
``shares`` slots of equally many blocks: a slot has the end of one sequence, then whole ones, then the beginning of
another. A sequence without keys has a block, too: something says that there were none. Parts are numbered through:
slot + sequence, which grows by one at every end of either, so that ``most_parts`` rows hold them all. Osama et al.:
"Stream-K: Work-Centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the GPU" (2023).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import tiles


class Part(NamedTuple):
    index: tl.tensor  # the number of its sequence
    number: tl.tensor  # of the part in it
    count: tl.tensor  # parts of the sequence
    begin: tl.tensor  # its keys, counted from the first one of the sequence
    end: tl.tensor
    step: tl.tensor  # keys from one of its blocks to the next


class Line(NamedTuple):
    """The blocks of all sequences, behind each other."""

    blocks: tl.tensor  # (ENTRIES,): of each sequence; 0 for those that are none
    length: tl.tensor  # of all
    share: tl.tensor  # of a slot


def most_parts(batch: int, shares: int) -> int:
    """Of a line."""
    return shares + batch - 1


def most_seen(capacity: int, rows_q: int, diagonal: int | None, left: int | None, right: int | None, block: int) -> int:
    """The most keys that ``_span`` finds in a sequence of any length."""
    if left is None or (diagonal is not None and right is None):
        return capacity
    behind = 0 if diagonal is None else right  # the last query sees no more than the last key
    return min(capacity, left + rows_q + behind + block - 1)


@triton.jit
def _span(index, exist, layout, variant, BLOCK_N: tl.constexpr, CHANGING: tl.constexpr):
    """The keys that any query of a sequence sees: (first, end). The first is a multiple of BLOCK_N.

    ``index`` is a number, or a block of them. CHANGING, here and below: see ``tiles.cached_keys``.
    """
    _, seqlen_k = tiles.cached_keys(index, layout, exist, CHANGING)
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
def _blocks(first, end, BLOCK_N: tl.constexpr):
    """On the line."""
    return tl.maximum(tl.cdiv(end - first, BLOCK_N), 1)


@triton.jit
def equal_part(slot, parts, layout, variant, BLOCK_N: tl.constexpr, CHANGING: tl.constexpr = False):
    """The part of a slot where every sequence has so many, some of which may have no keys."""
    index, number = slot // parts, slot % parts
    first, end = _span(index, True, layout, variant, BLOCK_N, CHANGING)
    return Part(index, number, parts, first + number * BLOCK_N, end, parts * BLOCK_N)


@triton.jit
def line(
    layout,
    variant,
    shares,
    SHORTEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRIES: tl.constexpr,
    read=True,
    CHANGING: tl.constexpr = False,
):
    """``shares``: slots, each of which has SHORTEST keys at least, or none. Unless ``read``, no length is."""
    index = tl.arange(0, ENTRIES)
    exist = (index < layout.batch) & read
    first, end = _span(index, exist, layout, variant, BLOCK_N, CHANGING)
    blocks = tl.where(exist, _blocks(first, end, BLOCK_N), 0)  # fewer than 2**31 altogether: plan.splits
    length = tl.sum(blocks, 0)
    return Line(blocks, length, tl.maximum(tl.cdiv(length, shares), SHORTEST // BLOCK_N))


@triton.jit
def sequences_of(slot, on):
    """(first, behind the last, where the first one starts on the line) of the sequences that a slot has parts of."""
    begin = slot * on.share
    ends = tl.cumsum(on.blocks, 0)
    before = ends <= begin  # those that are none, too, behind the line's end: there is no sequence then
    within = (on.blocks > 0) & (ends - on.blocks < begin + on.share)
    return tl.sum(before.to(tl.int32), 0), tl.sum(within.to(tl.int32), 0), tl.sum(tl.where(before, on.blocks, 0), 0)


@triton.jit
def part_of(slot, index, start, on, layout, variant, BLOCK_N: tl.constexpr, CHANGING: tl.constexpr = False):
    """(part that a slot has of a sequence that starts there on the line, where the next sequence does)."""
    first, end = _span(index, True, layout, variant, BLOCK_N, CHANGING)
    blocks = _blocks(first, end, BLOCK_N)
    first_slot, count = _slots(start, blocks, on)
    skipped = tl.maximum(slot * on.share - start, 0)
    behind = tl.minimum((slot + 1) * on.share - start, blocks)
    part_end = tl.minimum(first + behind * BLOCK_N, end)
    return Part(index, slot - first_slot, count, first + skipped * BLOCK_N, part_end, BLOCK_N), start + blocks


@triton.jit
def first_part(
    slot,
    parts,
    layout,
    variant,
    shares,
    SHORTEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHANGING: tl.constexpr,
):
    """That a slot begins with; one that ends before it begins where there is none."""
    if parts is not None:
        return equal_part(slot, parts, layout, variant, BLOCK_N, CHANGING)
    else:
        on = line(layout, variant, shares, SHORTEST, BLOCK_N, ENTRIES, True, CHANGING)
        first, behind, start = sequences_of(slot, on)
        index = tl.minimum(first, layout.batch - 1)
        part, _ = part_of(slot, index, start, on, layout, variant, BLOCK_N, CHANGING)
        return Part(index, part.number, part.count, part.begin, tl.where(first < behind, part.end, 0), part.step)


@triton.jit
def parts_of(index, on):
    """(number of the first part, parts) of a sequence on the line."""
    sequences = tl.arange(0, on.blocks.shape[0])
    start = tl.sum(tl.where(sequences < index, on.blocks, 0), 0)
    first_slot, count = _slots(start, tl.sum(tl.where(sequences == index, on.blocks, 0), 0), on)
    return first_slot + index, count


@triton.jit
def _slots(start, blocks, on):
    """(the first slot, slots) of what has so many blocks from there on."""
    first = start // on.share
    return first, (start + blocks - 1) // on.share - first + 1
