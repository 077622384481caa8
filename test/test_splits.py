"""Which keys a slot computes, by the functions that decoding and combining call, for lengths of every kind."""

from __future__ import annotations

import random

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels do not run: Triton is not installed")
import triton.language as tl  # noqa: E402

from flash_attn_plus import plan  # noqa: E402
from flash_attn_plus.kernels import arguments, scores, splits, tiles  # noqa: E402

UNWRITTEN = -7
FIELDS = 7  # slot, sequence, number, count, begin, end, step


@triton.jit
def record(rows_ptr, row, slot, index, part):
    rows_ptr += row * 7
    tl.store(rows_ptr, slot)
    tl.store(rows_ptr + 1, index)
    tl.store(rows_ptr + 2, part.number)
    tl.store(rows_ptr + 3, part.count)
    tl.store(rows_ptr + 4, part.begin)
    tl.store(rows_ptr + 5, part.end)
    tl.store(rows_ptr + 6, part.step)


@triton.jit
def line_kernel(
    rows_ptr,  # (most_parts, FIELDS)
    parts_ptr,  # (batch, 2): parts_of
    lengths_ptr,
    batch,
    capacity,
    shares,
    left,
    SHORTEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    layout = tiles.Layout(
        *(batch, 1, capacity, 1, None, None, None, lengths_ptr, None, None, None, None, None, None, batch, None, 0)
    )
    variant = scores.Variant(None, left, None)
    on = splits.line(layout, variant, shares, SHORTEST, BLOCK_N, ENTRIES)
    slot = tl.program_id(0)
    first, behind, start = splits.sequences_of(slot, on)
    for index in tl.range(first, behind):
        part, start = splits.part_of(slot, index, start, on, layout, variant, BLOCK_N)
        record(rows_ptr, slot + index, slot, index, part)
    if slot == 0:
        for index in tl.range(0, batch):
            number, count = splits.parts_of(index, on)
            tl.store(parts_ptr + index * 2, number)
            tl.store(parts_ptr + index * 2 + 1, count)


@triton.jit
def equal_kernel(rows_ptr, lengths_ptr, batch, capacity, parts, left, BLOCK_N: tl.constexpr):
    layout = tiles.Layout(
        *(batch, 1, capacity, 1, None, None, None, lengths_ptr, None, None, None, None, None, None, batch, None, 0)
    )
    slot = tl.program_id(0)
    part = splits.equal_part(slot, parts, layout, scores.Variant(None, left, None), BLOCK_N)
    record(rows_ptr, slot, slot, part.index, part)


def lengths_of(draw: random.Random, batch: int, capacity: int) -> list[int]:
    kind = draw.randrange(4)
    if kind == 0:
        return [0] * batch
    if kind == 1:  # all but one are short
        long = draw.randrange(batch)
        return [capacity if i == long else min(draw.randrange(3), capacity) for i in range(batch)]
    if kind == 2:
        return [capacity] * batch
    return [draw.randint(0, capacity) for _ in range(batch)]


def seen(length: int, left: int | None, block: int) -> int:
    """The first key that a query behind the last key sees, and those that share its block."""
    return 0 if left is None else min(max(length - 1 - left, 0), length) // block * block


def problems(count: int) -> list[tuple[int, int, list[int], int, int | None]]:
    """(block, shortest part, lengths, slots, window to the left)"""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        batch, block = draw.choice([1, 2, 3, 7, 17, 40]), draw.choice([16, 64])
        capacity = draw.choice([1, block, 5 * block + 3, 40 * block])
        lengths = lengths_of(draw, batch, capacity)
        left = draw.choice([None, None, 0, 2 * block + 5])
        found.append((block, block * draw.choice([1, 3]), lengths, draw.choice([1, 2, 5, 16, 33]), left))
    return found


@pytest.fixture
def runs(device: str) -> str:
    if device == "cpu":
        import interpreter

        interpreter.install()
    return device


def test_a_line_has_every_key_once_in_slots_of_equal_work(runs: str) -> None:
    for block, shortest, lengths, slots, left in problems(40):
        batch, capacity = len(lengths), max([1, *lengths])
        most = splits.most_parts(batch, slots)
        rows = torch.full((most, FIELDS), UNWRITTEN, dtype=torch.int32, device=runs)
        parts = torch.full((batch, 2), UNWRITTEN, dtype=torch.int32, device=runs)
        of_device = torch.tensor(lengths, dtype=torch.int32, device=runs)
        entries = max(16, triton.next_power_of_2(batch))
        line_kernel[(slots,)](rows, parts, of_device, batch, capacity, slots, left, shortest, block, entries)
        what = (block, shortest, lengths, slots, left)

        blocks = [max(1, -(-(length - seen(length, left, block)) // block)) for length in lengths]
        share = max(-(-sum(blocks) // slots), shortest // block)
        work = [0] * slots
        for index, (length, (first, count)) in enumerate(zip(lengths, parts.tolist(), strict=True)):
            end = seen(length, left, block)
            for number in range(count):
                slot, *row, part_end, step = rows[first + number].tolist()
                assert [*row, step] == [index, number, count, end, block], what
                assert part_end > end or (length == 0 and count == 1), what
                work[slot] += max(1, -(-(part_end - end) // block))
                end = part_end
            assert end == length, what
        written = (rows != UNWRITTEN).all(1)
        assert written.sum() == parts[:, 1].sum() and (written == (rows != UNWRITTEN).any(1)).all(), what
        used = [blocks for blocks in work if blocks]
        assert sum(used) == sum(blocks) and max(used) <= share and all(x == share for x in used[:-1]), what


def test_equal_parts_have_every_key_once(runs: str) -> None:
    for block, _, lengths, parts, left in problems(40):
        batch, capacity = len(lengths), max([1, *lengths])
        rows = torch.full((batch * parts, FIELDS), UNWRITTEN, dtype=torch.int32, device=runs)
        of_device = torch.tensor(lengths, dtype=torch.int32, device=runs)
        equal_kernel[(batch * parts,)](rows, of_device, batch, capacity, parts, left, block)
        for index, length in enumerate(lengths):
            starts = []
            for number in range(parts):
                slot, *row, begin, end, step = rows[index * parts + number].tolist()
                assert [slot, *row, end] == [index * parts + number, index, number, parts, length]
                starts += range(begin, end, step)
            assert sorted(starts) == list(range(seen(length, left, block), length, block))


@pytest.mark.parametrize("right", [None, 0, 5, 40])
@pytest.mark.parametrize("left", [None, 0, 9, 70])
@pytest.mark.parametrize("diagonal", [None, -3, 0, 60])
def test_no_sequence_sees_more_keys_than_planned_for(diagonal: int | None, left: int | None, right: int | None) -> None:
    """By the definition of the band: what any of the queries sees, from the start of its first block on."""
    capacity, block = 150, 16
    for rows in (1, 4):
        found, planned = 0, splits.most_seen(capacity, rows, diagonal, left, right, block)
        for length in range(capacity + 1):
            middle = length - rows if diagonal is None else diagonal
            seen = [
                key
                for key in range(length)
                for row in range(rows)
                if (left is None or key >= row + middle - left) and (right is None or key <= row + middle + right)
            ]
            if seen:
                found = max(found, max(seen) + 1 - (0 if left is None else min(seen) // block * block))
        assert found <= planned <= capacity
        if diagonal is None and left is not None:
            assert planned - found < block  # no more than it must be


TILE = plan.DecodePlan(128, 4, 3, 1, 128)


@pytest.mark.parametrize("itemsize, dim, alone", [(2, 64, False), (2, 128, True), (2, 256, True), (4, 128, False)])
def test_programs_that_are_alone_on_a_processor(itemsize: int, dim: int, alone: bool) -> None:
    assert plan.is_alone(plan.decode("sm_90", itemsize, dim).split, 2 * dim * itemsize) is alone


def test_rows_that_can_be_asked_for_ahead() -> None:
    cache = torch.empty(3, 5, 2, 24, dtype=torch.float16)
    assert arguments.all_aligned(cache, cache[:, 1:], cache[..., :1, :], cache.transpose(1, 2), cache[..., 8:16])
    flat = torch.empty(3 * 5 * 2 * 24 + 8, dtype=torch.float16)
    for unaligned in (
        cache[..., 4:],  # begins between
        cache[..., :20],  # ends between
        flat[1 : 1 + cache.numel()].view(cache.shape),
        torch.empty(3, 5, 2, 20, dtype=torch.float16)[..., :16],  # every other row begins between
        torch.empty(3, 5, 24, 2, dtype=torch.float16).transpose(2, 3),
    ):
        assert not arguments.all_aligned(unaligned) and not arguments.all_aligned(cache, unaligned)


@pytest.mark.parametrize(
    "programs, batch, keys, equal, expected",
    [
        (8, 1, 8192, False, (16, 0)),
        (8, 1, 300, False, (3, 0)),
        (8, 8, 8192, True, (2, 0)),
        (8, 8, 8192, False, (None, 16)),
        (8, 8, 128, False, (1, 0)),  # a part has as many keys at least
        (8, 4, 500, False, (4, 0)),
        (8, 3, 900, False, (None, 16)),
        (8, 12, 8192, True, (None, 16)),  # a slot each would leave 36 processors without work
        (8, 15, 8192, True, (1, 0)),
        (8, 20, 8192, True, (None, 16)),
        (8, 63, 8192, False, (None, 16)),
        (8, 64, 8192, False, (1, 0)),
        (8, 64, 131_072, False, (None, 16)),  # one of them may be that long
        (8, 64, 131_072, True, (1, 0)),
        (8, 1024, 131_072, False, (None, 16)),
        (8, 1025, 131_072, False, (1, 0)),
        (8, 8, 2**31, False, (2, 0)),  # more blocks than 32 bits are sure to count
        (8, 10**6, 8192, False, (1, 0)),
        (32, 3, 8192, True, (None, 4)),
        (48, 3, 8192, False, (1, 0)),  # a line would leave 36 processors without work
        (48, 5, 8192, True, (1, 0)),
        (100, 3, 8192, False, (1, 0)),  # a line of one slot is no line
        (128, 3, 8192, False, (1, 0)),
        (200, 1, 8192, False, (1, 0)),
        (200, 3, 8192, True, (1, 0)),
    ],
)
def test_slots_fill_the_processors(programs: int, batch: int, keys: int, equal: bool, expected: tuple) -> None:
    assert plan.splits(plan.DecodeRow(TILE, TILE), 132, programs, batch, keys, 0, equal) == expected
