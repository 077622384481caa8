"""The Triton backward against the oracle: in the interpreter without a GPU, through the operators on one."""

from __future__ import annotations

import zlib

import pytest
import torch
from assertions import check_case
from cases import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_properties import bounded, dense_cases, varlen_cases
from test_forward_kernel import DTYPES, run

from flash_attn_plus import gpu, plan
from flash_attn_plus.kernels import backward
from flash_attn_plus.plan import BackwardRow, Plan

DIFFERENTIABLE = [case for case in CASES if not case.forward_only]

TILES = [
    BackwardRow(Plan(32, 64, 4, 1), Plan(32, 64, 4, 1), None, Plan(32, 32, 4, 1)),
    BackwardRow(Plan(64, 32, 4, 1), Plan(64, 32, 4, 1), Plan(32, 64, 4, 1), Plan(32, 64, 4, 1)),
    BackwardRow(Plan(64, 64, 4, 1), Plan(32, 32, 4, 1), None, Plan(64, 32, 4, 1)),
]


@pytest.fixture
def tiles(monkeypatch, device):
    """Sets the interpreter's tiles; a GPU keeps its plans."""

    def choose(chosen: BackwardRow) -> None:
        if device == "cpu":
            monkeypatch.setattr(plan, "backward", lambda problem: chosen)

    return choose


def dtypes(case: Case, device: str) -> list[torch.dtype]:
    """All on a GPU. The interpreter takes seconds for each, so it runs one: which, depends on the case."""
    return DTYPES if device == "cuda" else [DTYPES[zlib.crc32(case.name.encode()) % len(DTYPES)]]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_agrees_with_the_oracle(case, device, tiles):
    tiles(TILES[zlib.crc32(case.name.encode()) // 3 % len(TILES)])
    for dtype in dtypes(case, device):
        check_case(case, device, dtype, run=run)


drawn = settings(bounded, max_examples=10)


@drawn
@given(case=dense_cases(), dtype=st.sampled_from(DTYPES), chosen=st.sampled_from(TILES))
def test_any_dense_problem(case, dtype, chosen, device, tiles):
    tiles(chosen)
    check_case(case, device, dtype, run=run)


@drawn
@given(case=varlen_cases(), dtype=st.sampled_from(DTYPES), chosen=st.sampled_from(TILES))
def test_any_packed_problem(case, dtype, chosen, device, tiles):
    tiles(chosen)
    check_case(case, device, dtype, run=run)


def prepared(case: Case, device: str, *needs: bool) -> tuple[torch.Tensor, ...]:
    """The kernels' gradients of a dense case, by the path that a call on a GPU takes behind the checks."""
    q, k, v, variant, _ = case.make(device, torch.float32)
    run(Case("first").make(device))  # which mends the interpreter, where it is one
    out, lse = gpu.prepare_forward(q, k, v, variant)(q, k, v, variant)
    arguments = (torch.ones_like(out), q, k, v, out, lse, None, variant, *needs)
    return gpu.prepare_backward(*arguments)(*arguments)


def test_what_is_not_needed_is_absent_and_the_rest_as_it_was(device, tiles):
    tiles(TILES[2])
    case = Case("needs", 1, 40, 40, heads_k=1, bias="1h1k", sink="h", causal=True)
    whole = prepared(case, device, True, True, True)
    assert all(grad.numel() for grad in whole)
    for needs in [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]:
        wanted = (needs[0], needs[1], needs[1], True, needs[2])  # dsink always comes
        for grad, expected, needed in zip(prepared(case, device, *needs), whole, wanted, strict=True):
            assert torch.equal(grad, expected) if needed else grad is None


def test_the_rows_of_a_bias_are_dealt_out_to_programs(device, tiles):
    """The sums of the parts are the gradient, whatever their number."""
    tiles(TILES[0])
    case = Case("strips", batch=1, seqlen_q=100, bias="111k", dim=16)
    results = []
    for programs in (1, 2, 512):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backward, "_BIAS_PROGRAMS", programs)
            results.append(prepared(case, device, False, False, True)[4])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def given_views(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Of x's shape and full of NaN, as a caller may want a gradient to lie."""
    if kind == "packed":
        return x.new_full((*x.shape[:-2], 3, *x.shape[-2:]), torch.nan).select(-3, 1)
    if kind == "heads first":
        return x.new_full((*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1]), torch.nan).transpose(-3, -2)
    return x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., ::2]


@pytest.mark.parametrize(
    "kind, varlen, needed",
    [
        ("packed", False, [(0, 1, 2), (1,), (2,)]),
        ("packed", True, [(0, 1, 2), (0,), (1,), (2,)]),
        ("heads first", False, [(0, 1, 2)]),
        ("columns apart", True, [(0, 1, 2), (2,)]),
    ],
)
def test_into_given_tensors(kind, varlen, needed, device, tiles):
    """The same bits as in tensors of its own, wherever they go, and all of them or one alone."""
    tiles(TILES[varlen])  # dk and dv in one pass, and in two
    packing = dict(lengths=((17, 30), (0, 5), (3, 0)), unused_k=(4, 0, 0)) if varlen else dict(batch=1, seqlen_k=30)
    case = Case("into", seqlen_q=35, heads_k=1, dim=20, dim_v=12, sink="h", causal=True, **packing)
    q, k, v, variant, layout = case.make(device, torch.float32)
    layout = () if layout is None else (layout,)
    run(Case("first").make(device))  # which mends the interpreter, where it is one
    prefix = "varlen_" if varlen else ""
    forward, backward, into = (
        getattr(gpu, f"prepare_{prefix}{name}") for name in ("forward", "backward", "backward_into")
    )
    out, lse = forward(q, k, v, *layout, variant)(q, k, v, *layout, variant)
    saved = (torch.ones_like(out), q, k, v, out, lse, None)
    arguments = (*saved, *layout, variant, True, True, False)
    *expected, dsink, _ = backward(*arguments)(*arguments)
    for places in needed:
        given = [given_views(x, kind) if i in places else None for i, x in enumerate((q, k, v))]
        arguments = (*saved, *given, *layout, variant, False)
        of_sink, _ = into(*arguments)(*arguments)
        assert torch.equal(of_sink, dsink)
        for x, like in zip(given, expected, strict=True):
            assert x is None or torch.equal(x, like)


def test_into_given_tensors_without_sequences(device, tiles):
    tiles(TILES[0])
    case = Case("none", lengths=(), padding=(3, 2))
    q, k, v, variant, layout = case.make(device, torch.float32)
    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
    given = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    arguments = (out, q, k, v, out, lse, None, *given, layout, variant, False)
    gpu.prepare_varlen_backward_into(*arguments)(*arguments)
    assert all((x == 0).all() for x in given)
