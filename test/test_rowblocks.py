"""What is special to the row blocks: how a problem is cut up, and that no cut shows. All options are tested by
test_cpu.py through the operators; here they run through tiles so small that every axis is cut.
"""

from __future__ import annotations

import math

import assertions
import pytest
import torch
from assertions import check_case, random_gradients
from cases import BY_NAME, Case, Problem
from cases import EVERYTHING as ALL_OPTIONS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_attn_plus import rowblocks, rowblocks_scores
from flash_attn_plus.schemas import Variant

NAMES = ("dq", "dk", "dv", "dsink", "dbias")


@pytest.fixture
def small_tiles(monkeypatch):
    """Seven rows, and less than one block of them within the budget: every axis is cut, odd rests included."""
    monkeypatch.setattr(rowblocks_scores, "BLOCK_ROWS", 7)
    monkeypatch.setattr(rowblocks_scores, "BUDGET_BYTES", 2048)


def run_forward(problem: Problem):
    q, k, v, variant, varlen = problem
    with torch.no_grad():
        if varlen is None:
            return rowblocks.forward(q, k, v, variant)
        return rowblocks.varlen_forward(q, k, v, varlen, variant)


def run_backward(problem: Problem, dout, out, lse, dlse, **needs) -> dict:
    q, k, v, variant, varlen = problem
    saved = (dout, q, k, v, out, lse, dlse)
    with torch.no_grad():
        if varlen is None:
            grads = rowblocks.backward(*saved, variant, **needs)
        else:
            grads = rowblocks.varlen_backward(*saved, varlen, variant, **needs)
    return dict(zip(NAMES, grads, strict=True))


class _RowBlocks(torch.autograd.Function):
    """The row blocks as one differentiable function, in the place of the operator."""

    @staticmethod
    def forward(ctx, problem, q, k, v, sink, bias):
        ctx.problem, results = problem, run_forward(problem)
        ctx.save_for_backward(*results)
        return results

    @staticmethod
    def backward(ctx, dout, dlse):
        variant = ctx.problem.variant
        grads = run_backward(ctx.problem, dout, *ctx.saved_tensors, dlse)
        assert all(grad.is_contiguous() for grad in grads.values())
        if variant.sink is not None and variant.sink.ndim == 1:
            grads["dsink"] = grads["dsink"].sum(0)
        return None, *(
            grad if need else None for grad, need in zip(grads.values(), ctx.needs_input_grad[1:], strict=True)
        )


@pytest.fixture(autouse=True)
def row_blocks_as_operator(monkeypatch):
    def run(problem: Problem):
        q, k, v, variant, _ = problem
        return _RowBlocks.apply(problem, q, k, v, variant.sink, variant.attn_bias)

    monkeypatch.setattr(assertions, "run_op", run)


EVERYTHING = {**ALL_OPTIONS, "dim": 4, "dim_v": 6, "window": (9, -1)}
RAGGED = ((19, 23), (1, 18), (0, 4), (15, 6))

CUT = [
    Case("cut_plain", batch=3, seqlen_q=17, seqlen_k=23, heads=3, heads_k=3, dim=8, dim_v=12),
    Case("cut_gqa", seqlen_q=9, seqlen_k=150, heads=10, heads_k=2, dim=4, causal=True, sink="bh", bias="1h1k"),
    Case("cut_mqa_one_query", seqlen_q=1, seqlen_k=700, heads=5, heads_k=1, dim=2, alibi="bh"),
    Case("cut_window", seqlen_q=40, seqlen_k=31, heads_k=1, dim=4, window=(5, 3), bias="bhqk", bias_values="-inf"),
    Case("cut_window_inside_block", seqlen_q=30, seqlen_k=30, dim=4, window=(1, 0), softcap=2.0),
    Case("cut_diagonal_outside", seqlen_q=20, seqlen_k=30, dim=4, window=(3, 2), diagonal=24, sink="h"),
    Case("cut_bias_sums", batch=3, seqlen_q=15, seqlen_k=20, dim=4, bias="11q1", dropout_p=0.3),
    Case("cut_short_sequences", batch=50, seqlen_q=3, seqlen_k=2, heads_k=1, dim=4, causal=True, dropout_p=0.5),
    Case("cut_equal_lengths", lengths=((9, 11),) * 4 + ((5, 2),) * 3, dim=4, alibi="bh", bias="bhqk", dropout_p=0.1),
    Case("cut_varlen", lengths=RAGGED, padding=(2, 3), unused_q=(2, 0, 0, 1), unused_k=(1, 2, 0, 0), **EVERYTHING),
    Case("cut_paged", lengths=RAGGED, page_size=3, **{**EVERYTHING, "layout": "contiguous"}),
]


@pytest.mark.parametrize("case", CUT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_cut_shows(case, dtype, device, small_tiles):
    check_case(case, device, dtype)


@pytest.mark.parametrize("case", CUT, ids=str)
def test_whole_tiles(case, device):
    check_case(case, device, torch.float32)


@pytest.mark.parametrize(
    "name", ["no_queries", "no_keys", "no_keys_sink_bias", "no_queries_no_keys", "batch_0", "one_by_one", "everything"]
)
def test_shapes_without_elements(name, device):
    check_case(BY_NAME[name], device, torch.float32)


class _Allocations(TorchDispatchMode):
    """Every tensor that an operation makes; holding them keeps freed memory from being taken for another's."""

    def __init__(self) -> None:
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.made += [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result

    def largest_temporary(self, known) -> int:
        owned = {x.untyped_storage().data_ptr() for x in known if isinstance(x, torch.Tensor)}
        sizes = [x.untyped_storage().nbytes() for x in self.made if x.untyped_storage().data_ptr() not in owned]
        return max(sizes, default=0)


BUDGET_SHAPES = [
    Case("many_heads_one_query", batch=4, seqlen_q=1, seqlen_k=600, heads=20, heads_k=20, dim=4),
    Case("many_heads_per_group", batch=1, seqlen_q=3, seqlen_k=512, heads=64, heads_k=1, dim=4),
    Case("many_sequences", batch=256, seqlen_q=16, seqlen_k=16, dim=4, causal=True),
    Case("long_causal", batch=1, seqlen_q=300, seqlen_k=300, dim=4, causal=True, alibi="h", softcap=2.0),
    Case("long_window", batch=1, seqlen_q=600, seqlen_k=600, dim=4, window=(20, 9), dropout_p=0.1, sink="h"),
    Case("short_keys_wide_head", seqlen_q=128, seqlen_k=3, heads=4, heads_k=4, dim=128),
    # In fp32, where the gradient of the bias is accumulated in the result itself.
    Case("long_bias", batch=2, seqlen_q=200, seqlen_k=200, dim=4, bias="11qk"),
]


@pytest.mark.parametrize("case", BUDGET_SHAPES, ids=str)
def test_temporaries_stay_within_the_budget(case, device, monkeypatch):
    budget = 1 << 15
    monkeypatch.setattr(rowblocks_scores, "BUDGET_BYTES", budget)
    problem = case.make(device, torch.float32 if case.bias else torch.float16)
    with _Allocations() as allocations:
        out, lse = run_forward(problem)
    known = [*problem[:3], *problem.variant, out, lse, *random_gradients(out, lse)]
    with allocations:
        known += run_backward(problem, known[-2], out, lse, known[-1]).values()
    one_head = 4 * case.seqlen_k * max(case.dim, case.dim_v or 0)
    assert 0 < allocations.largest_temporary(known) <= max(budget, one_head)


def test_a_ring_of_two_gives_the_gradients_of_the_whole(device, small_tiles):
    """Each half of the keys sees the global out and lse; the sink goes to one half."""
    problem = Case("ring", seqlen_q=40, seqlen_k=50, heads=4, dim=8, causal=True, sink="h", softcap=3.0).make(
        device, torch.float64
    )
    k, v, variant = problem.k, problem.v, problem.variant
    out, lse = run_forward(problem)
    dout, dlse = random_gradients(out, lse)
    whole = run_backward(problem, dout, out, lse, dlse)

    cut, diagonal = 23, 10
    halves = [
        problem._replace(k=k[:, :cut], v=v[:, :cut], variant=variant._replace(diagonal=diagonal)),
        problem._replace(k=k[:, cut:], v=v[:, cut:], variant=variant._replace(diagonal=diagonal - cut, sink=None)),
    ]
    (out1, lse1), (out2, lse2) = map(run_forward, halves)
    torch.testing.assert_close(torch.logaddexp(lse1, lse2), lse)
    weights = [(part - lse).exp().transpose(1, 2)[..., None] for part in (lse1, lse2)]
    torch.testing.assert_close(weights[0] * out1 + weights[1] * out2, out)

    first, second = (run_backward(half, dout, out, lse, dlse) for half in halves)
    torch.testing.assert_close(first["dq"] + second["dq"], whole["dq"])
    for name in ("dk", "dv"):
        torch.testing.assert_close(torch.cat([first[name], second[name]], dim=1), whole[name])
    torch.testing.assert_close(first["dsink"], whole["dsink"])


@pytest.mark.parametrize("no_key", [-math.inf, math.inf])
def test_rows_without_a_key_have_gradients_of_exactly_zero(no_key, device):
    """Also where the gradient of their lse is NaN (a logsumexp of -inf gives that), and under either sign of lse."""
    problem = Case("no_key", batch=1, seqlen_q=30, seqlen_k=10, dim=8, causal=True).make(device)
    out, lse = run_forward(problem)
    assert (lse[..., :20] == -math.inf).all() and not out[:, :20].any()
    dout, dlse = random_gradients(out, lse)
    lse[..., :20], dlse[..., :20] = no_key, math.nan
    grads = run_backward(problem, dout, out, lse, dlse)
    assert not grads["dq"][:, :20].any()
    short = problem._replace(q=problem.q[:, 20:])
    expected = run_backward(short, dout[:, 20:], out[:, 20:], lse[..., 20:].contiguous(), dlse[..., 20:].contiguous())
    for name in ("dk", "dv"):
        torch.testing.assert_close(grads[name], expected[name])


def test_a_row_without_a_key_hands_its_lse_gradient_to_the_sink(device):
    problem = Case("sink_only", seqlen_q=5, seqlen_k=0, sink="h").make(device)
    out, lse = run_forward(problem)
    assert lse.equal(problem.variant.sink[None, :, None].expand_as(lse))
    _, dlse = random_gradients(out, lse)
    grads = run_backward(problem, torch.ones_like(out), out, lse, dlse)
    torch.testing.assert_close(grads["dsink"], dlse.sum(-1))


def test_a_hidden_key_that_is_nan_is_not_seen(device):
    problem = Case("hidden_nan", seqlen_q=40, seqlen_k=40, window=(5, 4), dim=8).make(device)
    expected = run_forward(problem)
    problem.k[:, 20] = math.nan
    actual = run_forward(problem)
    unseen = [i for i in range(40) if not -5 <= 20 - i <= 4]
    for rows, seen in ((actual[0], expected[0]), (actual[1].mT, expected[1].mT)):
        assert rows[:, unseen].equal(seen[:, unseen])
    assert actual[0][:, 20].isnan().all()


def test_what_is_not_needed_is_empty_and_changes_nothing_else(device):
    problem = Case("needs", seqlen_q=20, seqlen_k=20, dim=8, bias="11qk", sink="bh").make(device)
    out, lse = run_forward(problem)
    dout, _ = random_gradients(out, lse)
    everything = run_backward(problem, dout, out, lse, None)
    for missing, names in (("need_dq", {"dq"}), ("need_dkv", {"dk", "dv"}), ("need_dbias", {"dbias"})):
        grads = run_backward(problem, dout, out, lse, None, **{missing: False})
        for name, grad in grads.items():
            expected = problem.q.new_empty(0) if name in names else everything[name]
            assert grad.equal(expected), (missing, name)


def test_bias_gradient_has_the_shape_and_dtype_of_the_bias(device):
    """An expanded bias is a full one; a bool one and none at all have no gradient."""
    problem = Case("expanded", seqlen_q=12, seqlen_k=9, dim=8).make(device, torch.float16)
    full = (2, 2, 12, 9)
    for bias, shape in (
        (torch.randn(1, 1, 1, 9, device=device, dtype=torch.float16).expand(full), full),
        (torch.randn(2, 1, 12, 1, device=device), (2, 1, 12, 1)),
        (torch.rand(full, device=device) < 0.5, (0,)),
        (None, (0,)),
    ):
        biased = problem._replace(variant=Variant(attn_bias=bias))
        out, lse = run_forward(biased)
        dbias = run_backward(biased, torch.ones_like(out), out, lse, None)["dbias"]
        assert dbias.shape == shape
        if shape != (0,):
            assert dbias.dtype == bias.dtype and dbias.is_contiguous()


def test_reruns_are_bit_equal(device):
    problem = BY_NAME["everything"].make(device, torch.float16)
    results = []
    for _ in range(5):
        out, lse = run_forward(problem)
        results.append((out, lse, *run_backward(problem, torch.ones_like(out), out, lse, None).values()))
    for rerun in results[1:]:
        assert all(x.equal(y) for x, y in zip(rerun, results[0], strict=True))


def test_neighbours_of_equal_lengths_run_as_one_dense_batch(device, monkeypatch):
    calls = []
    original = rowblocks._forward
    monkeypatch.setattr(rowblocks, "_forward", lambda *args: calls.append(args) or original(*args))
    packed = Case("equal", lengths=((16, 16),) * 256 + ((3, 5),) + ((2, 2),) * 3, dim=8, causal=True).make(device)
    out, lse = run_forward(packed)
    assert [call[0].first for call in calls] == [0, 256, 257]
    q, k, v = (x[: 256 * 16].unflatten(0, (256, 16)) for x in packed[:3])
    dense_out, dense_lse = run_forward(Problem(q, k, v, packed.variant, None))
    assert out[: 256 * 16].equal(dense_out.flatten(0, 1))
    assert lse[:, : 256 * 16].equal(dense_lse.transpose(0, 1).flatten(1))
