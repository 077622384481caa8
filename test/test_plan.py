"""plan.py: every problem has a plan, and a table's row serves what it says."""

from __future__ import annotations

import itertools

import pytest

from flash_attn_plus import plan
from flash_attn_plus.plan import Plan, Problem

DIMS = (1, 16, 59, 64, 65, 96, 128, 129, 192, 256)


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize(
    "arch", [*plan.FORWARD, "sm_75", "sm_89", "sm_103", "gfx90a", "gfx950", "gfx1201", "cpu", "xpu"]
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_problem_has_a_plan_that_triton_takes(arch, itemsize):
    for dim in DIMS:
        for seqlen_q in (1, 64, 65, 100_000):
            for options in (False, True):
                chosen = plan.forward(Problem(arch, itemsize, dim, seqlen_q, options))
                assert all(map(power_of_two, chosen[:3])) and chosen.num_stages >= 1
                assert chosen.BLOCK_M >= 16 and chosen.BLOCK_N >= 16  # the least that a matrix product takes
                assert chosen.BLOCK_M <= plan.MOST_ROWS and chosen.BLOCK_N <= plan.MOST_ROWS
                assert chosen.BLOCK_N % 4 == 0  # dropout draws four columns at a time


def test_block_dim_is_the_power_of_two_that_holds_the_head_dimension():
    assert [plan.block_dim(d) for d in (1, 16, 17, 32, 33, 64, 80, 128, 129, 256)] == [
        *(16, 16, 32, 32, 64, 64, 128, 128, 256, 256),
    ]


def test_tiles_of_k_and_v_are_swizzled_alike():
    for dim in DIMS:
        for dim_v in DIMS:
            columns, columns_v = plan.block_dims(dim, dim_v)
            assert columns >= dim and columns_v >= dim_v
            assert min(columns, 64) == min(columns_v, 64)


@pytest.mark.parametrize(
    "arch, rows",
    [
        ("sm_90", "sm_90"),
        ("sm_89", "sm_86"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("gfx90a", "gfx90a"),
        ("gfx950", "gfx942"),
        ("gfx1201", "gfx1100"),
        ("sm_75", None),
        ("xpu", None),
    ],
)
def test_an_unknown_architecture_takes_the_rows_of_the_nearest_older_one(arch, rows):
    assert plan.row_arch(arch) == rows


def test_a_row_has_a_plan_for_options_and_one_for_short_sequences():
    row = plan.FORWARD["sm_90"][2, 128]
    assert plan.forward(Problem("sm_90", 2, 128, 4096, False)) == row.plain
    assert plan.forward(Problem("sm_90", 2, 100, 4096, True)) == row.options
    assert plan.forward(Problem("sm_90", 2, 65, plan.SHORT, False)) == row.short


def test_rows_of_one_architecture_cover_all_problems():
    for arch, rows in plan.FORWARD.items():
        assert set(rows) == {(size, dim) for size in (2, 4) for dim in (64, 128, 256)}, arch
        assert all(isinstance(tiles, Plan) for row in rows.values() for tiles in row)


def test_the_backward_has_rows_for_what_the_forward_has():
    assert set(plan.BACKWARD) == set(plan.FORWARD)
    for arch, rows in plan.BACKWARD.items():
        assert set(rows) == set(plan.FORWARD[arch]), arch
        assert all(isinstance(row, plan.BackwardRow) for both in rows.values() for row in both), arch


@pytest.mark.parametrize("arch", [*plan.FORWARD, "sm_75", "sm_103", "gfx1201", "xpu"])
def test_every_backward_has_tiles_that_triton_takes(arch):
    for size, dim, options in itertools.product((2, 4), DIMS, (False, True)):
        row = plan.backward(Problem(arch, size, dim, 4096, options))
        for tiles in row:
            assert tiles is not None or row.values is None
            if tiles is not None:
                assert all(map(power_of_two, tiles[:3])) and tiles.num_stages >= 1
                assert min(tiles[:2]) >= 16 and max(tiles[:2]) <= plan.MOST_ROWS
