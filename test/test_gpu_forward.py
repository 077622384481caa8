"""The forward on a GPU: sizes at which narrow arithmetic overflows, streams, graphs, memory, and offsets that lie.

Values at small sizes are in test_forward_kernel.py. Problems too large to compare whole are compared on samples
(sampled.py). Tests that hold more than 8 GB share the xdist group "memory" (run with ``--dist loadgroup``), so that no
two of them run at a time; they hold up to 10 GB.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from assertions import (
    assert_close_to_oracle,
    check_problem,
    oracle_results,
    run_op,
    same_dtype_results,
)
from cases import BY_NAME, EVERYTHING, RAGGED, Case, Problem
from sampled import check_samples
from torch import Tensor

import flash_attn_plus as fap
from flash_attn_plus.schemas import Variant, Varlen

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """The workers share one device: none keeps what a test has cached."""
    yield
    torch.cuda.empty_cache()


def large(name: str, seqlen: int = 16384, **options) -> Case:
    """Scores with a deviation of 4: a few keys have most of the weight, so that losing one block of many shows."""
    dim = options.get("dim", 64)
    defaults = {"batch": 1, "seqlen_q": seqlen, "seqlen_k": seqlen, "dim": dim, "softmax_scale": 4.0 * dim**-0.5}
    return Case(f"large_{name}", **defaults | options)


LONG = ((4096, 4096), (1, 16384), (8192, 300), (0, 0), (0, 70), (777, 9001))
LONG_PAGED = ((300, 5000), (1, 4001), (2000, 2000), (5, 0))
UNEVEN = ((8192, 8192), *[(32, 32)] * 255)

LARGE_DENSE = [
    large("plain"),
    large("causal_gqa", heads=4, heads_k=1, dim=128, causal=True),
    large("more_keys", seqlen_q=1000, causal=True),
    large("more_queries", seqlen_k=1000, causal=True),
    large("window_both", seqlen_q=8192, seqlen_k=9000, window=(900, 300)),
    large("window_left", window=(3000, -1)),
    large("window_right", window=(-1, 500)),
    large("diagonal", causal=True, diagonal=-3000),
    large("diagonal_window", window=(2000, 1000), diagonal=4000, seqlen_q=8192),
    large("softcap", softcap=20.0, causal=True),
    large("alibi", 8192, batch=2, alibi="bh", causal=True),
    large("alibi_diagonal", 8192, alibi="h", diagonal=700),
    large("bias_over_queries", batch=2, bias="bh1k"),
    large("bias_over_keys", bias="1hq1", causal=True),
    large("bias_full", 4096, bias="bhqk"),
    large("bias_minus_inf", 4096, bias="11qk", bias_values="-inf", batch=2),
    large("bias_bool_full", 4096, bias="bhqk", bias_values="bool"),
    large("bias_bool_over_queries", batch=2, bias="b11k", bias_values="bool", causal=True),
    large("sink_window", heads=8, heads_k=1, sink="h", causal=True, window=(127, -1)),
    large("dropout", 2048, batch=2, dropout_p=0.2, causal=True),
    large("wider_v", 8192, dim_v=128),
    large("narrower_v", 8192, dim=192, dim_v=128, causal=True),
    large("sliced", 8192, layout="sliced", dim=72, causal=True),
    large("everything", 2048, **{**EVERYTHING, "window": (900, -1)}),
]
LARGE_PACKED = [
    large("varlen", lengths=LONG, causal=True),
    large("varlen_gqa", lengths=LONG, heads=4, heads_k=2, dim=128),
    large("varlen_window", lengths=LONG, window=(500, 200)),
    large("varlen_padding", lengths=LONG, padding=(300, 1000), sink="h"),
    large("varlen_window_padding", lengths=LONG, padding=(9000, 0), window=(500, 200), unused_q=(0, 0, 8192, 0, 0, 0)),
    large("varlen_seqused", lengths=LONG, unused_q=(300, 0, 8000, 0, 0, 1), unused_k=(5, 9000, 300, 0, 70, 4000)),
    large("varlen_leftpad", lengths=LONG, leftpad_k=(100, 16000, 300, 0, 3, 0), causal=True),
    large("varlen_softcap_alibi", lengths=LONG, softcap=20.0, alibi="bh", causal=True),
    large("varlen_bias", lengths=LONG, bias="bh1k"),
    large("varlen_dropout", lengths=((1500, 2048), (1, 2000), (0, 5), (2048, 700)), dropout_p=0.2),
]
LARGE_PAGED = [
    large(f"paged_{size}", lengths=LONG_PAGED, page_size=size, causal=True, heads=4, unused_k=(0, 1, 200, 0))
    for size in (1, 7, 16, 256)
]
LARGE = {case.name.removeprefix("large_"): case for case in (*LARGE_DENSE, *LARGE_PACKED, *LARGE_PAGED)}


def named(names: str) -> list[Case]:
    return [LARGE[name] for name in names.split()]


class TestLargeShapes:
    @pytest.mark.parametrize("case", LARGE.values(), ids=str)
    def test_bfloat16(self, case, device):
        check_samples(case.make(device, BF16), case.name)

    @pytest.mark.parametrize("case", named("causal_gqa softcap varlen paged_16"), ids=str)
    def test_float16(self, case, device):
        check_samples(case.make(device, torch.float16), case.name)

    @pytest.mark.parametrize("case", named("plain varlen paged_7"), ids=str)
    def test_float32(self, case, device):
        check_samples(case.make(device, torch.float32), case.name)

    @pytest.mark.parametrize("options", [{"seqlen_q": 128}, {"causal": True}], ids=["few_queries", "causal"])
    def test_256k_keys(self, options, device):
        case = large("256k", 1 << 18, heads=1, heads_k=1, **options)
        check_samples(case.make(device, BF16), case.name, count=32)

    def test_one_long_sequence_among_many_short_ones(self, device):
        case = large("uneven", lengths=UNEVEN, causal=True)
        problem = case.make(device, BF16)
        check_samples(problem, case.name)
        # Each of the short ones too: by themselves they are a dense batch.
        first, batch, seqlen = 8192, 255, 32
        short = [x[first:].unflatten(0, (batch, seqlen)) for x in problem[:3]]
        dense = Problem(*short, problem.variant, None)
        expected = oracle_results(dense, None)
        plain = same_dtype_results(dense, None, expected)
        out, lse = run_op(problem)
        actual = {
            "out": out[first:].unflatten(0, (batch, seqlen)),
            "lse": lse[:, first:].unflatten(1, (batch, seqlen)).transpose(0, 1),
        }
        for name, value in actual.items():
            assert_close_to_oracle(value, expected[name], plain[name], name=f"short sequences: {name}")

    # A choice: every one of them is a kernel to compile.
    @pytest.mark.parametrize("dim", [1, 8, 24, 40, 59, 72, 96, 111, 136, 160, 192, 224, 255, 256])
    def test_head_dim(self, dim, device):
        case = Case(f"head_dim_{dim}", seqlen_q=200, seqlen_k=200, dim=dim, causal=True)
        check_problem(case.make(device, BF16), case.name, loss="")

    def test_more_heads_than_a_grid_has_rows(self, device):
        """Only the first axis of a grid goes beyond 65,535."""
        problem = dense(device, (4096, 16, 32, 16), (4096, 16, 32, 16), causal=True)
        check_samples(problem, "batch * heads = 131072", count=16)


def dense(device: str, shape_q: tuple[int, ...], shape_k: tuple[int, ...], **options) -> Problem:
    """Drawn on the device, where they are large."""
    q, k, v = (torch.randn(shape, dtype=BF16, device=device) for shape in (shape_q, shape_k, shape_k))
    return Problem(q, k, v, Variant(softmax_scale=4.0 * shape_q[-1] ** -0.5, **options), None)


@pytest.mark.xdist_group("memory")
class TestManyElements:
    """Offsets beyond 2**31 elements, one way at a time: each product of a stride must leave 32 bits by itself."""

    def check(self, problem: Problem, name: str) -> None:
        assert sum((n - 1) * stride for n, stride in zip(problem.q.shape, problem.q.stride(), strict=True)) > 2**31
        check_samples(problem, name)

    def test_rows(self, device):
        # A window: otherwise this takes a second.
        problem = dense(device, (1, 16500, 1024, 128), (1, 16500, 1, 128), causal=True, window_left=1000)
        self.check(problem, "rows")

    def test_rows_of_packed_sequences(self, device):
        q, k, v, variant, _ = dense(device, (1, 16500, 1024, 128), (1, 16500, 1, 128), causal=True, window_left=1000)
        offsets = torch.tensor([0, 100, 100, 16490], dtype=torch.int32, device=device)
        self.check(Problem(q[0], k[0], v[0], variant, Varlen(offsets, offsets, 16390, 16390)), "packed rows")

    def test_batches(self, device):
        self.check(dense(device, (16500, 128, 8, 128), (16500, 128, 1, 128)), "batches")

    def test_heads(self, device):
        problem = dense(device, (1, 16500, 1024, 128), (1, 1024, 1, 128))
        self.check(problem._replace(q=problem.q.transpose(1, 2)), "heads")

    def test_one_tile_of_queries_and_output(self, device):
        """128 rows of q and out span more than 2**31 elements."""
        self.check(dense(device, (1, 129, 133120, 128), (1, 129, 1, 128)), "row stride of out")

    @pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
    def test_one_tile_of_keys_and_bias(self, biased, device):
        """64 rows of q, k, v and of the bias span more than 2**31 elements: views of one buffer."""
        rows, heads, dim, stride = 130, 2, 64, 36 << 20
        width = heads * dim
        buffer = torch.empty((rows - 1) * stride + 3 * width + rows, dtype=BF16, device=device)

        def view(shape: tuple[int, ...], strides: tuple[int, ...], column: int) -> Tensor:
            values = torch.randn(shape, dtype=BF16, device=device)
            return buffer.as_strided(shape, strides, column).copy_(values)

        q, k, v = (view((1, rows, heads, dim), (1, stride, dim, 1), n * width) for n in range(3))
        bias = view((1, 1, rows, rows), (1, 1, stride, 1), 3 * width) if biased else None
        variant = Variant(softmax_scale=4.0 * dim**-0.5, causal=True, attn_bias=bias)
        self.check(Problem(q, k, v, variant, None), "row stride of k")


def same_bits(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(
    "case",
    named("causal_gqa bias_full sink_window dropout everything varlen varlen_leftpad varlen_dropout paged_7 paged_256"),
    ids=str,
)
def test_50_reruns_are_bit_equal(case, device):
    problem = case.make(device, BF16)
    first = run_op(problem)
    for n in range(50):
        assert same_bits(run_op(problem), first), f"run {n}"


VARLEN_LENGTHS = {"max_seqlen": (90, 90), "heads": 4, "heads_k": 2}
SAME_SIGNATURE = {
    "dense": (BY_NAME["everything"],) * 2,
    "varlen": (
        Case("one", lengths=RAGGED, unused_k=(1, 2, 0, 9), **VARLEN_LENGTHS),
        Case("two", lengths=RAGGED[::-1], unused_k=(0, 3, 1, 9), **VARLEN_LENGTHS),
    ),
    "paged": (BY_NAME["paged_everything"],) * 2,
}


@pytest.mark.parametrize("one, two", SAME_SIGNATURE.values(), ids=SAME_SIGNATURE)
def test_nothing_is_kept_of_an_earlier_call_but_what_its_shapes_decide(one, two, device):
    first, second = one.make(device, BF16), two.make(device, BF16)
    variant = second.variant
    for x in (second.q, second.v, variant.alibi_slopes, variant.sink, variant.attn_bias):
        if x is not None:
            x.mul_(0.5)  # in place: the strides stay
    if variant.rng_state is not None:
        variant.rng_state.add_(1)
    for problem in (first, second, first, second):
        check_problem(problem, one.name, loss="")


def test_the_kernel_is_not_plain_pytorch(device):
    """Every test of this file would pass with row blocks too, some of them slowly."""
    for dtype in (torch.float16, BF16, torch.float32):
        q = torch.zeros(1, 9, 2, 64, dtype=dtype, device=device)
        assert "Triton" in fap.explain(q, q, q).splitlines()[0]


# Public calls, as many kinds as a host could be tempted to wait for the device in.


def public_call(name: str, device: str) -> Callable[[], tuple[Tensor, Tensor]]:
    case = {
        "dense": Case("dense", causal=True, heads=4, heads_k=2, dim=64, sink="h", alibi="bh"),
        "dense dropout": Case("dense_dropout", dropout_p=0.3),
        "varlen": Case("varlen_public", lengths=RAGGED, unused_q=(1, 0, 0, 3), unused_k=(0, 3, 0, 0), padding=(7, 0)),
        "varlen dropout": Case("varlen_public_dropout", lengths=RAGGED, leftpad_k=(0, 3, 0, 9), dropout_p=0.2),
        "paged": Case("paged_public", lengths=RAGGED, page_size=16, unused_k=(0, 3, 0, 0), causal=True),
    }[name]
    q, k, v, variant, varlen = case.make(device, BF16)
    options = {
        "causal": variant.causal,
        "dropout_p": variant.dropout_p,
        "alibi_slopes": variant.alibi_slopes,
        "sink": variant.sink,
        "return_lse": True,
    }
    if varlen is None:
        return lambda: fap.flash_attn_func(q, k, v, **options)
    return lambda: fap.flash_attn_varlen_func(q, k, v, **varlen._asdict(), **options)


@pytest.mark.parametrize("name", ["dense", "dense dropout", "varlen", "varlen dropout", "paged"])
def test_the_host_never_waits(name, device):
    call = public_call(name, device)
    call()
    one = torch.ones((), device=device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            one.item()  # the mode works
        for _ in range(2):
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


class TestStreams:
    def test_runs_on_the_current_stream(self, device):
        q, k, v, later = torch.randn(4, 2, 300, 4, 64, dtype=BF16, device=device)
        q, expected = q.clone(), fap.flash_attn_func(later, k, v, return_lse=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Another stream would not wait for the new q.
            torch.cuda._sleep(100_000_000)
            q.copy_(later)
            actual = fap.flash_attn_func(q, k, v, return_lse=True)
        stream.synchronize()
        assert same_bits(actual, expected)

    @pytest.mark.parametrize("name", ["everything", "varlen_everything", "paged_odd"])
    def test_runs_on_the_device_of_its_tensors(self, name, device):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        assert torch.cuda.current_device() == 0
        for other in ("cuda:1", "cuda:0", "cuda:1"):
            check_problem(BY_NAME[name].make(other, BF16), f"{name} on {other}", loss="")
        assert torch.cuda.current_device() == 0


class Captured:
    """The operator on a problem's tensors as a CUDA graph: replayed, it reads what they hold then."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run_op(problem)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = run_op(problem)
        self.earlier: list[tuple[Tensor, Tensor]] = []

    def check(self) -> None:
        """A replay is what an eager call is, and differs from every replay before."""
        self.graph.replay()
        assert same_bits(self.outputs, run_op(self.problem))
        assert not any(same_bits(self.outputs, results) for results in self.earlier)
        self.earlier.append(tuple(x.clone() for x in self.outputs))


def offsets(device: str, *lengths: int) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


class TestGraphs:
    def test_dense_with_other_inputs(self, device):
        problem = dense(device, (2, 300, 4, 64), (2, 333, 2, 64), causal=True)
        captured = Captured(problem)
        for _ in range(3):
            captured.check()
            for x in problem[:3]:
                x.normal_()

    def test_dropout_with_other_states(self, device):
        state = torch.tensor([5, 0], device=device)
        problem = dense(device, (2, 300, 4, 64), (2, 333, 2, 64), dropout_p=0.3, rng_state=state)
        captured = Captured(problem)
        for _ in range(3):
            captured.check()
            state += 1 << 40

    def test_public_dropout_draws_anew_in_every_replay(self, device):
        q, k, v = torch.randn(3, 2, 130, 2, 64, dtype=BF16, device=device)
        fap.flash_attn_func(q, k, v, dropout_p=0.3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fap.flash_attn_func(q, k, v, dropout_p=0.3)
        graph.replay()
        first = out.clone()
        graph.replay()
        assert not torch.equal(out, first)

    def test_packed_with_other_lengths(self, device):
        q, k, v = torch.randn(3, 1000, 4, 64, dtype=BF16, device=device)
        starts_q, starts_k = offsets(device, 500, 0, 500), offsets(device, 100, 800, 100)
        used = torch.tensor([100, 800, 100], dtype=torch.int32, device=device)
        problem = Problem(q, k, v, Variant(causal=True), Varlen(starts_q, starts_k, 1000, 1000, seqused_k=used))
        captured = Captured(problem)
        captured.check()
        starts_q.copy_(offsets(device, 1, 998, 1))
        captured.check()
        starts_k.copy_(offsets(device, 0, 1000, 0))
        used.copy_(torch.tensor([0, 1000, 0]))
        captured.check()
        used.copy_(torch.tensor([0, 777, 0]))
        captured.check()
        starts_q.copy_(offsets(device, 1000, 0, 0))
        starts_k.copy_(offsets(device, 1000, 0, 0))
        used.copy_(torch.tensor([1000, 0, 0]))
        captured.check()

    def test_pages_with_another_table(self, device):
        pages, size, batch = 40, 16, 3
        q = torch.randn(7 * batch, 4, 64, dtype=BF16, device=device)
        k, v = torch.randn(2, pages, size, 2, 64, dtype=BF16, device=device)
        table = torch.randperm(pages, device=device)[: 10 * batch].view(batch, 10).to(torch.int32)
        used = torch.tensor([160, 3, 77], dtype=torch.int32, device=device)
        starts_k = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        layout = Varlen(offsets(device, 7, 7, 7), starts_k, 7, 160, seqused_k=used, block_table=table)
        captured = Captured(Problem(q, k, v, Variant(causal=True), layout))
        for lengths in ([160, 3, 77], [8, 160, 159], [7, 16, 17]):
            used.copy_(torch.tensor(lengths))
            captured.check()
            table.copy_(torch.randperm(pages, device=device)[: 10 * batch].view(batch, 10))
            captured.check()


@pytest.mark.no_poison
@pytest.mark.xdist_group("inductor")  # a worker pays for its start once
class TestInductor:
    """What is around the call is exact in bfloat16, whatever the compiler fuses: results have equal bits."""

    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch._dynamo.reset()

    @staticmethod
    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = fap.flash_attn_func(q * 0.5, k, v, causal=True, window_size=(100, -1), return_lse=True)
        return out.relu(), lse * 2.0

    @staticmethod
    def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        layout = cu_seqlens, cu_seqlens, 300, 300
        out, lse = fap.flash_attn_varlen_func(q * 0.5, k, v, *layout, causal=True, return_lse=True)
        return out.relu(), lse * 2.0

    @staticmethod
    def inputs(name: str, device: str) -> Iterator[tuple[Tensor, ...]]:
        for lengths in ((300, 1, 0, 99), (100, 100, 100, 100), (0, 0, 200, 200), (7, 93, 200, 100), (300, 100, 0, 0)):
            if name == "dense":
                q = torch.randn(2, 200, 4, 64, dtype=BF16, device=device)
                k, v = torch.randn(2, 2, 250, 2, 64, dtype=BF16, device=device)
                yield q, k, v
            else:
                q, k, v = torch.randn(3, 400, 4, 64, dtype=BF16, device=device)
                yield q, k, v, offsets(device, *lengths)

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    @pytest.mark.parametrize("name", ["dense", "packed"])
    def test_compiled_is_bit_equal_to_eager(self, name, mode, device):
        function = getattr(self, name)
        compiled = torch.compile(function, fullgraph=True, mode=mode)
        with torch.no_grad():
            for arguments in self.inputs(name, device):
                torch.compiler.cudagraph_mark_step_begin()
                actual = tuple(x.clone() for x in compiled(*arguments))
                assert same_bits(actual, function(*arguments))
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        assert skips == 0, "reduce-overhead ran without CUDA graphs"


@pytest.mark.no_poison
class TestPeakMemory:
    """A call allocates its results and nothing else, of the size they have."""

    def check(self, problem: Problem) -> None:
        run_op(problem)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        out, lse = run_op(problem)
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
        assert peak - before == out.nbytes + lse.nbytes

    @pytest.mark.parametrize(
        "case",
        [
            large("memory", 4096, heads=4, heads_k=2, causal=True),
            Case("memory_sliced", layout="sliced", dim=59, dim_v=40),
            Case("memory_transposed", layout="transposed", dim=1, seqlen_q=300),
            Case("memory_packed", layout="packed", dim=111, seqlen_q=200, seqlen_k=200),
            BY_NAME["everything"],
            BY_NAME["varlen_everything"],
            BY_NAME["varlen_leftpad_seqused"],
            BY_NAME["paged_everything"],
        ],
        ids=str,
    )
    def test_results_only(self, case, device):
        self.check(case.make(device, BF16))

    def test_broadcast_options_are_not_expanded(self, device):
        problem = dense(device, (2, 500, 4, 64), (2, 500, 2, 64))
        bias = torch.randn(2, 1, 1, 500, dtype=BF16, device=device).expand(-1, 4, 500, -1)
        self.check(problem._replace(variant=problem.variant._replace(attn_bias=bias)))


class TestFloat32Precision:
    """``torch.set_float32_matmul_precision`` is honoured, both ways."""

    @pytest.fixture(autouse=True)
    def precision(self):
        before = torch.get_float32_matmul_precision()
        yield
        torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize("allowed", ["high", "medium"])
    def test_high_takes_the_error_of_tf32_and_highest_does_not(self, allowed, device):
        case = Case("float32_precision", batch=1, seqlen_q=512, seqlen_k=512, dim=64, causal=True)
        problem = case.make(device, torch.float32)
        expected = oracle_results(problem, None)

        def check(actual: dict[str, Tensor], evaluations: list[dict[str, Tensor]]) -> None:
            for name, value in actual.items():
                oracle = expected[name]
                worst = max((plain[name] for plain in evaluations), key=lambda x: (x - oracle).abs().max().item())
                assert_close_to_oracle(value, oracle, worst, name=name)

        torch.set_float32_matmul_precision("highest")
        highest = dict(zip(("out", "lse"), run_op(problem), strict=True))
        check(highest, [same_dtype_results(problem, None, expected)])

        torch.set_float32_matmul_precision(allowed)
        reduced = dict(zip(("out", "lse"), run_op(problem), strict=True))
        # Hardware rounds operands to TF32 or cuts them off: PyTorch's products do either, so both are evaluated.
        cut = problem._replace(q=cut_to_tf32(problem.q), k=cut_to_tf32(problem.k), v=cut_to_tf32(problem.v))
        check(reduced, [same_dtype_results(x, None, expected) for x in (problem, cut)])
        assert not torch.equal(highest["lse"], reduced["lse"]), f"{allowed} has no effect"

        # The results of another precision are not kept.
        torch.set_float32_matmul_precision("highest")
        assert same_bits(run_op(problem), tuple(highest.values()))


def cut_to_tf32(x: Tensor) -> Tensor:
    """Without the 13 bits of a float32's fraction that TF32 lacks."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


class TestWrongOffsets:
    """Nothing on the host may look at offsets, so wrong ones are told nobody: they stop at the ends of the tensors, and
    the sequences that they do not concern are right. (That nothing outside is touched: the test below.)
    """

    def packed(self, device: str) -> Problem:
        return Case("wrong_offsets", lengths=RAGGED, causal=True, sink="h").make(device, BF16)

    @pytest.mark.parametrize(
        "field, values",
        [
            ("cu_seqlens_q", [0, 37, 38, 108, 10**9]),
            ("cu_seqlens_q", [-9, 37, 38, 108, 2**31 - 1]),
            ("cu_seqlens_k", [0, 37, 117, 122, 10**9]),
            ("cu_seqlens_k", [0, 37, 117, 122, 2**31 - 1]),
            ("seqused_q", [10**9, 1, 70, 2**31 - 1]),
            ("seqused_k", [10**9, 80, 5, 2**31 - 1]),
            ("leftpad_k", [-1, -(2**31), 0, 0]),
        ],
    )
    def test_lengths_end_with_the_segment_and_the_tensor(self, field, values, device):
        problem = self.packed(device)
        assert (problem.q.shape[0], problem.k.shape[0]) == (172, 186)
        wrong = torch.tensor(values, dtype=torch.int32, device=device)
        actual = run_op(problem._replace(varlen=problem.varlen._replace(**{field: wrong})))
        assert same_bits(actual, run_op(problem))

    @pytest.mark.parametrize("field, value", [("seqused_k", -3), ("leftpad_k", 10**9), ("seqused_q", -3)])
    def test_a_sequence_with_nothing_left(self, field, value, device):
        problem = self.packed(device)
        full = {"seqused_k": [37, 80, 5, 64], "leftpad_k": [0] * 4, "seqused_q": [37, 1, 70, 64]}[field]
        wrong = torch.tensor([full[0], full[1], value, full[3]], dtype=torch.int32, device=device)
        out, lse = run_op(problem._replace(varlen=problem.varlen._replace(**{field: wrong})))
        expected_out, expected_lse = run_op(problem)
        empty = slice(38, 108)
        assert (out[empty] == 0).all()
        if field == "seqused_q":
            assert (lse[:, empty] == float("-inf")).all()
        else:
            torch.testing.assert_close(lse[:, empty], problem.variant.sink.float()[:, None].expand(-1, 70))
        for rows in (slice(0, 38), slice(108, 172)):
            assert torch.equal(out[rows], expected_out[rows])
            assert torch.equal(lse[:, rows], expected_lse[:, rows])

    @pytest.mark.parametrize("first", [1, 37, 130])
    def test_rows_before_the_first_sequence_belong_to_none(self, first, device):
        problem = self.packed(device)
        starts = torch.tensor([first, 140, 140, 150, 160], dtype=torch.int32, device=device)
        varlen = problem.varlen._replace(max_seqlen_q=160, max_seqlen_k=160)
        check_problem(problem._replace(varlen=varlen._replace(cu_seqlens_q=starts)), "rows of q before", loss="")
        check_problem(problem._replace(varlen=varlen._replace(cu_seqlens_k=starts)), "rows of k before", loss="")

    def test_unused_entries_of_a_block_table(self, device):
        case = LARGE["paged_16"]
        problem = case.make(device, BF16)
        table = problem.varlen.block_table
        pages = -(-problem.varlen.seqused_k // case.page_size)
        unused = torch.arange(table.shape[1], device=device) >= pages[:, None]
        assert unused.any(1).all()
        garbage = torch.tensor([-5, 10**6, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device)
        garbage = garbage.repeat(table.numel() // 4 + 1)[: table.numel()].view_as(table)
        wrong = problem.varlen._replace(block_table=torch.where(unused, garbage, table))
        assert same_bits(run_op(problem._replace(varlen=wrong)), run_op(problem))

    @pytest.mark.parametrize("wrong", ["page", "length"])
    def test_a_page_or_a_length_that_does_not_exist(self, wrong, device):
        problem = Case("wrong_pages", lengths=RAGGED, page_size=16, unused_k=(0,) * 4).make(device, BF16)
        table, used = problem.varlen.block_table.clone(), problem.varlen.seqused_k.clone()
        if wrong == "page":
            table[1, :2] = torch.tensor([10**6, -5])
        else:
            used[1] = 10**9
        out, lse = run_op(problem._replace(varlen=problem.varlen._replace(block_table=table, seqused_k=used)))
        expected_out, expected_lse = run_op(problem)
        others = torch.arange(172, device=device) != 37  # sequence 1 has one query
        assert torch.equal(out[others], expected_out[others])
        assert torch.equal(lse[:, others], expected_lse[:, others])


def inside_problems(device: str) -> Iterator[tuple[str, Problem]]:
    """What tempts a kernel to leave its tensors: odd shapes, and offsets that no caller should pass."""
    for name in ("dim_59", "varlen_everything", "paged_odd"):
        yield name, BY_NAME[name].make(device, BF16)
    # Rows that are no queries, far more of them than there are keys: a window must not follow them.
    after = Case("padding", lengths=((5, 5), (64, 64)), padding=(100_000, 0), window=(40, -1))
    yield "padding under a window", after.make(device, BF16)
    within = Case("unused", lengths=((100_000, 5), (64, 64)), unused_q=(100_000, 0), window=(40, -1))
    yield "unused rows under a window", within.make(device, BF16)

    options = EVERYTHING | {"bias": "bhqk", "bias_values": "float", "layout": "contiguous"}
    lengths = ((384, 300), (1, 200), (300, 5), (64, 64))
    unused = {"unused_q": (1, 0, 9, 0), "unused_k": (2, 0, 1, 3)}
    packed = Case("inside", lengths=lengths, leftpad_k=(1, 2, 0, 3), **unused, **options).make(device, BF16)
    paged = Case("inside_paged", lengths=lengths, page_size=13, **unused, **options).make(device, BF16)
    generator = torch.Generator().manual_seed(0)
    for kind, problem in (("packed", packed), ("paged", paged)):
        layout = problem.varlen
        for low, high in [(-10, 800)] * 3 + [(-(2**31), 2**31)] * 3:
            garbage = {
                name: torch.randint(low, high, x.shape, generator=generator).to(device, torch.int32)
                for name, x in layout._asdict().items()
                if isinstance(x, Tensor)
            }
            label = f"{kind}, { ({name: x.tolist() for name, x in garbage.items()}) }"
            yield label, problem._replace(varlen=layout._replace(**garbage))
        for starts in ([0, 700, 0, 0, 749], [749, 500, 400, 100, 0], [0, 384, 385, 685, 10**9]):
            wrong = torch.tensor(starts, dtype=torch.int32, device=device)
            for field in ("cu_seqlens_q", "cu_seqlens_k"):
                yield f"{kind}, {field} {starts}", problem._replace(varlen=layout._replace(**{field: wrong}))

    # Rows of q, but no sequence; and a table, but no page.
    none = Case("inside_none", lengths=(), padding=(300, 9), unused_q=(), unused_k=(), leftpad_k=(), **options)
    yield "no sequences", none.make(device, BF16)
    yield "no pages", paged._replace(k=paged.k[:0], v=paged.v[:0])


def run_inside_problems() -> None:
    for name, problem in inside_problems("cuda"):
        print(name, flush=True)  # the last one printed is the one that failed
        out, lse = run_op(problem)
        torch.cuda.synchronize()
        if name == "no sequences":
            assert (out == 0).all() and (lse == float("-inf")).all()


def check_alone(function: Callable[[], None], tool: str) -> None:
    """Runs a function of a test file under a tool, or under none, in a process of its own: a fault would fail all tests
    that follow it. There, every tensor is an allocation.
    """
    here = Path(__file__).parent
    command = [sys.executable, "-c", f"import {function.__module__} as tests; tests.{function.__name__}()"]
    if tool != "no tool":
        path = shutil.which(tool)
        if path is None:
            pytest.skip(f"{tool} is not installed")
        # Not the errors of API calls: Triton asks the driver about null pointers, and takes no for an answer.
        command = [path, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "1", *command]
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)]),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.parametrize("tool", ["no tool", "compute-sanitizer"])
def test_nothing_outside_the_tensors_is_touched(tool):
    check_alone(run_inside_problems, tool)
