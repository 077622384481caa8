"""Which rows of a packed batch a tile owns: the arithmetic of tiles.py, in plain Python."""

from __future__ import annotations

import random

import pytest

tiles = pytest.importorskip("flash_attn_plus.kernels.tiles", reason="needs Triton", exc_type=ImportError)

first_tile = tiles._first_tile.fn  # a function of numbers, for the compiler and for Python alike


def clamp(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


def owned(rows: int, starts: list[int], block: int) -> list[list[tuple[int, int]]]:
    """(first, end) of the rows that each tile owns, by segment; ``starts`` are cu_seqlens.

    Segment 0 are the rows before the first sequence, and the last one those behind the last sequence.
    """
    batch = len(starts) - 1
    starts = [clamp(start, 0, rows) for start in starts]
    bounds = [0, *starts, rows]
    segments: list[list[tuple[int, int]]] = [[] for _ in range(batch + 2)]
    for tile in range(tiles.packed_tiles(rows, batch, block)):
        segment = sum(first_tile(start, entry + 1, block) <= tile for entry, start in enumerate(starts))
        start, end = bounds[segment], bounds[segment + 1]
        first = start + (tile - first_tile(start, segment, block)) * block
        if first < end:
            segments[segment].append((first, min(first + block, end)))
    return segments


def ragged_batches() -> list[tuple[int, list[int], int]]:
    """(rows, offsets, block)"""
    draw = random.Random(0)
    batches = []
    for block in (16, 32, 128):
        batches += [(rows, [0], block) for rows in (0, 1, block, 5 * block + 1)]  # no sequence at all
        for longest in (1, block - 1, block, block + 1, 5 * block):
            for _ in range(40):
                start, offsets = draw.choice([0, 0, 1, block, draw.randrange(3 * block)]), []
                offsets.append(start)
                for _ in range(draw.randrange(12)):
                    empty = draw.random() < 0.3
                    offsets.append(offsets[-1] + (0 if empty else draw.randint(0, longest)))
                batches.append((offsets[-1] + draw.choice([0, 0, 1, block, 3 * block + 5]), offsets, block))
    return batches


def test_every_row_has_one_tile_and_every_tile_one_segment():
    for rows, starts, block in ragged_batches():
        segments = owned(rows, starts, block)
        bounds = [0, *starts, rows]
        for segment, parts in enumerate(segments):
            covered = [row for first, end in parts for row in range(first, end)]
            assert covered == list(range(bounds[segment], bounds[segment + 1])), (rows, starts, block, segment)


def test_a_tile_begins_where_its_segment_does_or_a_whole_number_of_tiles_later():
    """Results of a sequence do not depend on what lies before it in the batch."""
    for rows, starts, block in ragged_batches():
        bounds = [0, *starts, rows]
        for segment, parts in enumerate(owned(rows, starts, block)):
            assert all((first - bounds[segment]) % block == 0 for first, _ in parts)


def test_offsets_past_the_end_stop_there():
    assert owned(100, [0, 40, 10**9], 32) == owned(100, [0, 40, 100], 32)
    assert owned(100, [-7, 40, 100], 32) == owned(100, [0, 40, 100], 32)


def test_falling_offsets_leave_every_tile_inside_the_tensor():
    """They are an error that nobody is told: whatever is computed, it is computed of rows that exist."""
    draw = random.Random(1)
    for _ in range(500):
        rows, block = draw.randrange(1, 700), draw.choice([16, 64, 128])
        starts = [draw.randint(-50, rows + 50) for _ in range(draw.randrange(1, 8))]
        for first, end in (part for parts in owned(rows, starts, block) for part in parts):
            assert 0 <= first < end <= rows


@pytest.mark.parametrize(
    "lengths",
    [[8192] + [32] * 255, [32] * 255 + [8192], [1] * 1000, [128] * 64, [127] * 64, [0] * 300 + [5000]],
    ids=["long_first", "long_last", "ones", "whole_tiles", "almost_whole_tiles", "empty"],
)
@pytest.mark.parametrize("block", [64, 128])
def test_a_grid_holds_one_tile_more_than_needed_for_each_sequence_and_two(lengths, block):
    """However uneven: its size has nothing to do with the longest sequence."""
    needed = sum(-(-length // block) for length in lengths)
    launched = tiles.packed_tiles(sum(lengths), len(lengths), block)
    assert needed <= launched <= needed + len(lengths) + 2


def test_the_grid_of_a_batch_is_what_the_first_tile_behind_it_says():
    """The kernel and the launch count tiles by different expressions."""
    for rows, starts, block in ragged_batches():
        batch = len(starts) - 1
        assert tiles.packed_tiles(rows, batch, block) == first_tile(rows, batch + 2, block)
