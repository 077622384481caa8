"""The Triton backward against the oracle: in the interpreter without a GPU, through the operators on one."""

from __future__ import annotations

import zlib

import pytest
from assertions import check_case
from cases import CASES
from test_forward_kernel import DTYPES, run

from flash_attn_plus import plan
from flash_attn_plus.plan import BackwardRow, Plan

pytest.importorskip("triton", reason="the kernels do not run: Triton is not installed")

DIFFERENTIABLE = [case for case in CASES if not case.forward_only]

TILES = [
    BackwardRow(Plan(32, 64, 4, 1), Plan(32, 64, 4, 1), Plan(32, 32, 4, 1)),
    BackwardRow(Plan(64, 32, 4, 1), Plan(64, 32, 4, 1), Plan(32, 64, 4, 1)),
    BackwardRow(Plan(64, 64, 4, 1), Plan(32, 32, 4, 1), Plan(64, 32, 4, 1)),
]


@pytest.fixture
def tiles(monkeypatch, device):
    """Sets the interpreter's tiles; a GPU keeps its plans."""

    def choose(chosen: BackwardRow) -> None:
        if device == "cpu":
            monkeypatch.setattr(plan, "backward", lambda problem: chosen)

    return choose


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_agrees_with_the_oracle(case, dtype, device, tiles):
    tiles(TILES[zlib.crc32(f"{case} {dtype}".encode()) % len(TILES)])
    check_case(case, device, dtype, run=run)
