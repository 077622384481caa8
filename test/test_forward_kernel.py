"""The Triton forward against the oracle: in the interpreter without a GPU, through the operators on one."""

from __future__ import annotations

import zlib

import pytest
import torch
from assertions import check_case, check_problem, run_op
from cases import BY_NAME, CASES, Case, Problem
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_properties import bounded, dense_cases, varlen_cases

from flash_attn_plus import plan
from flash_attn_plus.plan import Plan

pytest.importorskip("triton", reason="the kernels do not run: Triton is not installed")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# What the interpreter runs with: blocks smaller than the problems, of every order of rows and columns.
TILES = [Plan(32, 32, 4, 1), Plan(32, 64, 4, 1), Plan(64, 32, 4, 1), Plan(64, 64, 4, 1)]


def run(problem: Problem):
    if problem.q.is_cuda:
        return run_op(problem)
    import interpreter

    return interpreter.attention(problem)


@pytest.fixture
def tiles(monkeypatch, device):
    """Sets the interpreter's tiles; a GPU keeps its plans."""

    def choose(chosen: Plan) -> None:
        if device == "cpu":
            monkeypatch.setattr(plan, "forward", lambda problem: chosen)

    return choose


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_oracle(case, dtype, device, tiles):
    tiles(TILES[zlib.crc32(f"{case} {dtype}".encode()) % len(TILES)])
    check_case(case, device, dtype, loss="", run=run)


drawn = settings(bounded, max_examples=40)


@drawn
@given(case=dense_cases(), dtype=st.sampled_from(DTYPES), chosen=st.sampled_from(TILES))
def test_any_dense_problem(case, dtype, chosen, device, tiles):
    tiles(chosen)
    check_case(case, device, dtype, loss="", run=run)


@drawn
@given(case=varlen_cases(), dtype=st.sampled_from(DTYPES), chosen=st.sampled_from(TILES))
def test_any_packed_problem(case, dtype, chosen, device, tiles):
    tiles(chosen)
    check_case(case, device, dtype, loss="", run=run)


def check(device, dtype=torch.float32, name="", **options):
    """The oracle rule for one small dense problem with options of the operator."""
    case = Case(name or "odd", seqlen_q=40, seqlen_k=50)
    problem = case.make(device, dtype)
    check_problem(problem._replace(variant=problem.variant._replace(**options)), case.name, loss="", run=run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_of_the_least_number_is_not_minus_infinity(dtype, device):
    """Masks are often made of it. Where a whole row has it, the row still sees its keys, all alike."""
    bias = torch.zeros(1, 1, 40, 50, device=device)
    bias[..., 3, :] = bias[..., 7, 10:] = torch.finfo(dtype).min
    check(device, dtype, attn_bias=bias.to(dtype))


@pytest.mark.parametrize("scale", [1e-46, 1e-38, -1e-46, 1e4], ids=str)
def test_a_scale_that_vanishes_or_overwhelms(scale, device):
    check(device, softmax_scale=scale, causal=True)


@pytest.mark.parametrize(
    "diagonal, left, right",
    [(2**30, 2**30 + 2, -1), (-(2**30), -1, 2**30 + 2), (2**40, 2**40, 2**41), (-(2**40), 3, 2), (None, 2**40, 2**40)],
)
def test_windows_and_diagonals_beyond_32_bits(diagonal, left, right, device):
    check(device, diagonal=diagonal, window_left=left, window_right=right)


@pytest.mark.no_poison
@pytest.mark.parametrize("name", ["causal", "varlen", "paged", "sink", "no_keys", "varlen_no_sequences"])
def test_results_come_from_the_quick_allocator_too(name, device):
    """Poisoned memory takes PyTorch's own; programs take the other."""
    check_case(BY_NAME[name], device, torch.float32, loss="", run=run)


@pytest.mark.gpu
def test_the_second_launch_is_the_first(device):
    """A remembered launch passes addresses instead of tensors. (Interpreted launches are all first ones.)"""
    problem = BY_NAME["varlen_everything"].make(device, torch.bfloat16)
    first = run(problem)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(problem), first, strict=True))
