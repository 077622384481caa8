"""The backward on a GPU: sizes at which narrow arithmetic overflows, compilers, graphs, streams, threads and memory.

Values at small sizes are in test_backward_kernel.py. Gradients too large to compare whole are compared on samples.
Tests that hold more than 8 GB share the xdist group "memory" with those of the forward (run with ``--dist
loadgroup``), so that no two of them run at a time; they hold up to 16 GB.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import NamedTuple

import pytest
import torch
from assertions import (
    GRADIENT_FACTOR,
    Douts,
    assert_close_to_oracle,
    cast,
    check_problem,
    gradients,
    oracle_results,
    random_gradients,
    rounding_floor,
    run_op,
    run_reference,
    same_dtype_results,
)
from cases import BY_NAME, EMPTY, RAGGED, Case, Problem
from graphs import operator_nodes
from sampled import MINUS_INF, assert_no_nan, check_samples, lengths
from test_gpu_forward import (
    BF16,
    LARGE,
    LARGE_DENSE,
    LARGE_PACKED,
    SAME_SIGNATURE,
    UNEVEN,
    check_alone,
    dense,
    inside_problems,
    large,
    memory_is_given_back,  # noqa: F401  (a fixture)
    named,
    offsets,
    same_bits,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flash_attn_plus as fap
from flash_attn_plus.schemas import Variant, Varlen

pytestmark = pytest.mark.gpu


def differentiable(problem: Problem) -> Problem:
    for x in problem.differentiable().values():
        x.requires_grad_()
    return problem


def drawn_gradients(outputs: tuple[Tensor, Tensor]) -> Douts:
    """Drawn on the device, where they may be large."""
    return tuple(torch.randn_like(x) for x in outputs)


def step(problem: Problem, douts: Douts) -> tuple[Tensor, ...]:
    """out, lse and the gradient of every input that has one."""
    outputs = run_op(problem)
    return *(x.detach() for x in outputs), *gradients(outputs, problem, douts).values()


def run_backward(problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None):
    """dq, dk, dv, dsink and dbias of the operator."""
    ops = torch.ops.flash_attn_plus
    q, k, v, variant, varlen = problem
    if varlen is None:
        return ops.bwd(dout, q, k, v, out, lse, dlse, *variant)
    return ops.varlen_bwd(dout, q, k, v, out, lse, dlse, *varlen[:4], *variant, *varlen[4:])


def test_the_kernels_are_not_plain_pytorch(device):
    """Every test of this file would pass with row blocks too, some of them slowly."""
    for dtype in (torch.float16, BF16, torch.float32):
        q = torch.zeros(1, 9, 2, 64, dtype=dtype, device=device)
        assert "Triton" in fap.explain(q, q, q).splitlines()[1]


# The oracle on a sample. The gradient of some rows of q depends on no other rows, and that of some keys on no other
# keys, but for the out and lse of the whole, which the backward is given. Of the weight of each row a sample has the
# share exp(its lse - the whole's), so its part of the gradients is that of its own attention with
#
#     its dout = share * dout,  its dlse = share * (dout . its out - delta),  delta = dout . out - dlse
#
# as the blocks of a ring get theirs.


class Sample(NamedTuple):
    """Some rows and some keys of one key head, for all the query heads that share it."""

    sequence: int
    head: int  # of k
    rows: slice  # of q, counted from the first row of the sequence
    keys: slice

    def within(self, problem: Problem) -> tuple[slice, slice, slice, slice]:
        """Rows and heads of q, rows and heads of k: of the sequence in a dense batch, of the tensor in a packed one."""
        varlen, group = problem.varlen, problem.q.shape[-2] // problem.k.shape[-2]
        row = key = 0
        if varlen is not None:
            row, key = int(varlen.cu_seqlens_q[self.sequence]), int(varlen.cu_seqlens_k[self.sequence])
            key += 0 if varlen.leftpad_k is None else int(varlen.leftpad_k[self.sequence])
        return (
            slice(row + self.rows.start, row + self.rows.stop),
            slice(self.head * group, (self.head + 1) * group),
            slice(key + self.keys.start, key + self.keys.stop),
            slice(self.head, self.head + 1),
        )

    def of_sequence(self, problem: Problem, x: Tensor) -> Tensor:
        return x[self.sequence] if problem.varlen is None else x

    def of_rows(self, problem: Problem, x: Tensor) -> Tensor:
        """(rows, heads, dim) of q, out, or a gradient of one."""
        rows, heads, _, _ = self.within(problem)
        return self.of_sequence(problem, x)[rows, heads]

    def of_lse(self, problem: Problem, x: Tensor) -> Tensor:
        """(heads, rows) of lse or its gradient."""
        rows, heads, _, _ = self.within(problem)
        return self.of_sequence(problem, x)[heads, rows]

    def of_keys(self, problem: Problem, x: Tensor) -> Tensor:
        """(keys, 1, dim) of k, v, or a gradient of one."""
        _, _, keys, head = self.within(problem)
        return self.of_sequence(problem, x)[keys, head]

    def of_heads(self, problem: Problem, x: Tensor) -> Tensor:
        """(heads,) of a sink, of slopes, or of a gradient of the sink."""
        return (x if x.dim() == 1 else x[self.sequence])[self.within(problem)[1]]

    def of_bias(self, problem: Problem, x: Tensor) -> Tensor:
        """(1, heads, rows, keys), 1 where it broadcasts, of the bias or its gradient."""
        of_axes = slice(self.sequence, self.sequence + 1), self.within(problem)[1], self.rows, self.keys
        return x[tuple(slice(None) if size == 1 else wanted for size, wanted in zip(x.shape, of_axes, strict=True))]


def part(problem: Problem, sample: Sample) -> Problem:
    """The sample as a packed problem of its own."""
    q, k, v, variant, _ = problem
    seqlen_q, seqlen_k = lengths(problem)[sample.sequence]
    diagonal = seqlen_k - seqlen_q if variant.diagonal is None else variant.diagonal
    # Dropout numbers the pairs of sequence and head: as many empty sequences go before.
    before = sample.sequence * k.shape[-2] + sample.head if variant.dropout_p else 0
    q, k, v = sample.of_rows(problem, q), sample.of_keys(problem, k), sample.of_keys(problem, v)
    slopes, sink, bias = variant.alibi_slopes, variant.sink, variant.attn_bias
    variant = variant._replace(
        diagonal=diagonal + sample.rows.start - sample.keys.start,
        alibi_slopes=None if slopes is None else sample.of_heads(problem, slopes),
        sink=None if sink is None else sample.of_heads(problem, sink),
        attn_bias=None if bias is None else sample.of_bias(problem, bias),
    )
    starts_q, starts_k = (offsets(q.device, *[0] * before, x.shape[0]) for x in (q, k))
    return Problem(q, k, v, variant, Varlen(starts_q, starts_k, q.shape[0], k.shape[0]))


class Whole(NamedTuple):
    """What the backward was given, and what it returned."""

    problem: Problem
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None
    gradients: dict[str, Tensor]

    def douts(self, sample: Sample, small: Problem) -> Douts:
        """The sample's own, by the dtype of ``small``, its part of the problem."""
        dtype = small.q.dtype
        dout, out = (sample.of_rows(self.problem, x).to(dtype) for x in (self.dout, self.out))
        delta = (dout * out).sum(-1).T
        if self.dlse is not None:
            delta = delta - sample.of_lse(self.problem, self.dlse)
        with torch.no_grad():
            own_out, own_lse = run_reference(small, None)
        share = (own_lse - sample.of_lse(self.problem, self.lse)).exp().masked_fill(own_lse == MINUS_INF, 0.0)
        return share.T[..., None] * dout, share * ((dout * own_out).sum(-1).T - delta)

    def oracle(self, sample: Sample) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sample's part of the gradients: by the oracle, and by the same maths in fp32 (fp64 where that is tested).

        Not in 16 bits: PyTorch's 16-bit maths rounds the scores, and where a few of thousands of keys have most of the
        weight, that costs more than losing a block of keys.
        """
        small = part(self.problem, sample)
        exact, same = (cast(small, torch.promote_types(small.q.dtype, x)) for x in (torch.float64, torch.float32))
        expected = oracle_results(exact, self.douts(sample, exact))
        return expected, same_dtype_results(same, self.douts(sample, same), expected)

    def check(self, values: dict[str, Tensor], samples: list[Sample], name: str) -> None:
        """``values``, what the samples' parts of the gradients must add up to, by the rule of assertions.py."""
        # The rounding of lse, as in check_problem.
        recomputed = rounding_floor(self.lse[self.lse.isfinite()], self.lse.dtype)
        found = list(zip(*(self.oracle(sample) for sample in samples), strict=True))
        for tensor, value in values.items():
            expected, plain = (sum(x[tensor] for x in results) for results in found)
            label = f"{name}, {value.dtype}, {samples[0]}: {tensor}"
            assert_close_to_oracle(value, expected, plain.to(value.dtype), GRADIENT_FACTOR, label, recomputed)


def some(length: int, count: int, from_start: bool) -> list[slice]:
    """The first, middle and last ``count``; the first alone where the oracle counts from there."""
    starts = {0} if from_start else {0, max(0, (length - count) // 2), max(0, length - count)}
    return [slice(start, min(start + count, length)) for start in sorted(starts)]


def samples(problem: Problem, count: int) -> tuple[list[Sample], list[Sample]]:
    """Some rows with all keys, and some keys with all rows: in the first, middle and last key head of the first,
    middle, last and longest sequence.
    """
    found, heads_k = lengths(problem), problem.k.shape[-2]
    longest = max(range(len(found)), key=lambda b: found[b][0] * found[b][1])
    drops = problem.variant.dropout_p > 0.0
    of_rows, of_keys = [], []
    for b in sorted({0, len(found) // 2, len(found) - 1, longest}):
        seqlen_q, seqlen_k = found[b]
        for head in sorted({0, heads_k // 2, heads_k - 1}):
            if seqlen_q:
                of_rows += [Sample(b, head, x, slice(0, seqlen_k)) for x in some(seqlen_q, count, drops)]
            if seqlen_k:
                of_keys += [Sample(b, head, slice(0, seqlen_q), x) for x in some(seqlen_k, count, drops)]
    return of_rows, of_keys


def check_gradients(problem: Problem, name: str, count: int = 64, dout: Tensor | None = None) -> None:
    """Every gradient against the oracle on samples: of a loss of out and lse, or with ``dout`` of out alone.

    Everywhere: nothing is NaN, rows that see no key have dq 0, keys of no sequence have dk and dv 0.
    """
    out, lse = run_op(differentiable(problem))
    douts = drawn_gradients((out, lse)) if dout is None else (dout, None)
    found = gradients((out, lse), problem, douts)
    for tensor, x in found.items():
        assert_no_nan(x, f"{name}: {tensor}")
    whole = Whole(problem, out.detach(), lse.detach(), *douts, found)
    assert_dead_rows_and_keys(whole, name)

    of_rows, of_keys = samples(problem, count)
    for sample in of_rows:
        whole.check({"dq": sample.of_rows(problem, found["dq"])}, [sample], name)
    for sample in of_keys:
        whole.check({tensor: sample.of_keys(problem, found[tensor]) for tensor in ("dk", "dv")}, [sample], name)
    if "dsink" in found:
        check_sink(whole, of_keys, name)
    if "dbias" in found:
        rows, keys = problem.variant.attn_bias.shape[2:]
        # What such a sample leaves out is not part of its gradient along the axes that the bias has.
        check_bias(whole, [*(of_rows if rows > 1 else ()), *(of_keys if keys > 1 else ())], name)


def check_sink(whole: Whole, of_keys: list[Sample], name: str) -> None:
    problem, dsink = whole.problem, whole.gradients["dsink"]
    found = lengths(problem)
    for b, head in sorted({(sample.sequence, sample.head) for sample in of_keys}):
        sequences = [b] if dsink.dim() == 2 else range(len(found))
        # It takes all rows and no key.
        parts = [Sample(n, head, slice(0, found[n][0]), slice(0, 0)) for n in sequences]
        whole.check({"dsink": parts[0]._replace(sequence=b).of_heads(problem, dsink)}, parts, name)


def check_bias(whole: Whole, samples: list[Sample], name: str) -> None:
    """In a packed batch, whose sequences differ in length, the bias must not broadcast over them."""
    problem, dbias = whole.problem, whole.gradients["dbias"]
    for sample in samples:
        sequences = [sample.sequence] if dbias.shape[0] > 1 else range(len(lengths(problem)))
        heads = [sample.head] if dbias.shape[1] > 1 else range(problem.k.shape[-2])
        parts = [sample._replace(sequence=b, head=head) for b, head in product(sequences, heads)]
        whole.check({"dbias": sample.of_bias(problem, dbias)}, parts, name)


def assert_dead_rows_and_keys(whole: Whole, name: str) -> None:
    problem = whole.problem
    dq, dk, dv = (whole.gradients[tensor] for tensor in ("dq", "dk", "dv"))
    sees_no_key = (whole.lse == MINUS_INF).transpose(-1, -2)
    if sees_no_key.any():
        assert (dq[sees_no_key] == 0).all(), f"{name}: dq is not exactly 0 where lse is -inf"
    if problem.varlen is not None:
        dead = torch.ones(dk.shape[0], dtype=torch.bool, device=dk.device)
        for b, (_, seqlen_k) in enumerate(lengths(problem)):
            dead[Sample(b, 0, slice(0, 0), slice(0, seqlen_k)).within(problem)[2]] = False
        assert (dk[dead] == 0).all() and (dv[dead] == 0).all(), f"{name}: a key of no sequence has a gradient"


PARTS = (
    "plain gqa causal_more_keys window_both diagonal_window softcap alibi_per_batch sink_per_batch sink bias_full "
    "bias_over_batch bias_over_heads bias_over_queries bias_over_keys dropout_gqa everything varlen_empty_causal_sink "
    "varlen_padding varlen_leftpad_seqused varlen_alibi varlen_bias varlen_sink varlen_dropout"
)


class TestSamples:
    """What the tests of large shapes rest on."""

    @pytest.mark.parametrize("name", PARTS.split())
    def test_a_sample_is_a_part_of_the_whole(self, name, device):
        """In fp64, where the bound is that of rounding."""
        check_gradients(BY_NAME[name].make(device, torch.float64), name, count=16)

    @pytest.mark.parametrize("lost", ["rows", "keys"])
    @pytest.mark.parametrize("name", ["plain", "causal_gqa", "varlen"])
    def test_a_lost_block_is_noticed(self, name, lost, device, monkeypatch):
        """64 rows or keys in the middle of the longest sequence."""
        problem = LARGE[name].make(device, BF16)
        axis = 0 if lost == "rows" else 1
        middle = max(lengths(problem), key=lambda found: found[0] * found[1])[axis] // 2
        longest = max(found[axis] for found in lengths(problem))
        seen = torch.arange(longest, device=device).sub(middle).abs() >= 32
        seen = seen.view((1, 1, -1, 1) if lost == "rows" else (1, 1, 1, -1))

        whole, names = gradients, ("dk", "dv") if lost == "rows" else ("dq",)

        def without_a_block(outputs: tuple[Tensor, Tensor], problem: Problem, douts: Douts) -> dict[str, Tensor]:
            lacking = problem._replace(variant=problem.variant._replace(attn_bias=seen))
            with torch.no_grad():
                found = dict(zip(("dq", "dk", "dv"), run_backward(lacking, douts[0], *outputs, douts[1]), strict=False))
            return whole(outputs, problem, douts) | {name: found[name] for name in names}

        monkeypatch.setattr(sys.modules[__name__], "gradients", without_a_block)
        with pytest.raises(AssertionError, match=f"({'|'.join(names)}): error .* > bound"):
            check_gradients(problem, name)


LARGE_MORE = [
    large("causal", causal=True),
    large("full_128", heads=4, heads_k=2, dim=128),
    large("full_256", dim=256),
    large("causal_256_gqa", heads=4, heads_k=2, dim=256, causal=True),
    large("uneven", lengths=UNEVEN, causal=True),
]


class TestLargeShapes:
    @pytest.mark.parametrize("case", [*LARGE_DENSE, *LARGE_PACKED, *LARGE_MORE], ids=str)
    def test_bfloat16(self, case, device):
        check_gradients(case.make(device, BF16), case.name)

    @pytest.mark.parametrize("case", named("causal_gqa softcap varlen"), ids=str)
    def test_float16(self, case, device):
        check_gradients(case.make(device, torch.float16), case.name)

    @pytest.mark.parametrize("case", named("plain bias_over_queries varlen"), ids=str)
    def test_float32(self, case, device):
        check_gradients(case.make(device, torch.float32), case.name)

    @pytest.mark.xdist_group("memory")
    def test_256k_tokens(self, device):
        problem = dense(device, (1, 1 << 18, 8, 128), (1, 1 << 18, 8, 128), causal=True)
        check_samples(problem, "256k", count=16)
        check_gradients(problem, "256k", count=16)

    def test_more_heads_than_a_grid_has_rows(self, device):
        """Only the first axis of a grid goes beyond 65,535."""
        bias, sink = (torch.randn(4096, 32, *shape, dtype=BF16, device=device) for shape in ((1, 16), ()))
        problem = dense(device, (4096, 16, 32, 16), (4096, 16, 32, 16), causal=True, attn_bias=bias, sink=sink)
        check_gradients(problem, "batch * heads = 131072")


def span(x: Tensor) -> int:
    """Elements from the first to the last one."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


@pytest.mark.xdist_group("memory")
class TestManyElements:
    """Offsets beyond 2**31 elements, one way at a time: each product of a stride must leave 32 bits by itself.

    Where q is large it is its own dout, and where k is large v lies in the same place: that leaves room for others.
    """

    def check(self, problem: Problem, name: str) -> None:
        assert span(problem.q) > 2**31
        check_gradients(problem, name, dout=problem.q.detach())

    def test_rows(self, device):
        # A window: otherwise this takes seconds.
        problem = dense(device, (1, 16500, 1024, 128), (1, 16500, 64, 128), causal=True, window_left=1000)
        self.check(problem, "rows")

    def test_rows_of_packed_sequences(self, device):
        q, k, v, variant, _ = dense(device, (1, 16500, 1024, 128), (1, 16500, 64, 128), causal=True, window_left=1000)
        starts = torch.tensor([0, 100, 100, 16490], dtype=torch.int32, device=device)
        self.check(Problem(q[0], k[0], v[0], variant, Varlen(starts, starts, 16390, 16390)), "packed rows")

    def test_batches(self, device):
        self.check(dense(device, (16500, 128, 8, 128), (16500, 128, 1, 128)), "batches")

    def test_heads(self, device):
        problem = dense(device, (1, 16500, 1024, 128), (1, 1024, 1100, 128))
        self.check(problem._replace(q=problem.q.transpose(1, 2)), "heads")

    def test_one_tile_of_queries_and_their_gradient(self, device):
        """128 rows of q, dout, out and dq span more than 2**31 elements."""
        self.check(dense(device, (1, 129, 133120, 128), (1, 129, 8320, 128)), "row stride of dq")

    @pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
    def test_one_tile_of_keys_and_bias(self, biased, device):
        """64 rows of q, k, v, dout and of the bias span more than 2**31 elements: views of one buffer."""
        rows, heads, dim, stride = 130, 2, 64, 36 << 20
        width = heads * dim
        buffer = torch.empty((rows - 1) * stride + 4 * width + rows, dtype=BF16, device=device)

        def view(shape: tuple[int, ...], strides: tuple[int, ...], column: int) -> Tensor:
            values = torch.randn(shape, dtype=BF16, device=device)
            return buffer.as_strided(shape, strides, column).copy_(values)

        q, k, v, dout = (view((1, rows, heads, dim), (1, stride, dim, 1), n * width) for n in range(4))
        bias = view((1, 1, rows, rows), (1, 1, stride, 1), 4 * width) if biased else None
        variant = Variant(softmax_scale=4.0 * dim**-0.5, causal=True, attn_bias=bias)
        assert span(k[:, :64]) > 2**31
        check_gradients(Problem(q, k, v, variant, None), "row stride of k", dout=dout)

    @pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
    def test_keys_and_their_gradients(self, packed, device):
        problem = dense(device, (1, 16, 1024, 128), (1, 16500, 1024, 128))
        q, k, varlen = problem.q, problem.k, None
        if packed:
            starts = (offsets(device, *n) for n in ((8, 8), (1000, 15000)))
            q, k, varlen = q[0], k[0], Varlen(*starts, 8, 15000)
        del problem
        assert span(k) > 2**31
        variant = Variant(softmax_scale=4.0 * 128**-0.5)
        check_gradients(Problem(q, k, k.detach(), variant, varlen), "keys", dout=torch.randn_like(q))

    def test_the_gradient_of_a_bias(self, device):
        bias = torch.randn(1, 32, 8200, 8200, dtype=BF16, device=device)
        assert span(bias) > 2**31
        check_gradients(dense(device, (1, 8200, 32, 16), (1, 8200, 4, 16), attn_bias=bias), "bias")


@pytest.mark.parametrize(
    "case",
    named("causal_gqa bias_full bias_over_queries sink_window dropout everything varlen varlen_leftpad varlen_dropout"),
    ids=str,
)
def test_50_reruns_are_bit_equal(case, device):
    problem = case.make(device, BF16, requires_grad=True)
    douts = drawn_gradients(run_op(problem))
    first = step(problem, douts)
    for n in range(50):
        assert same_bits(step(problem, douts), first), f"run {n}"


@pytest.mark.parametrize("one, two", [SAME_SIGNATURE[name] for name in ("dense", "varlen")], ids=["dense", "varlen"])
def test_nothing_is_kept_of_an_earlier_call_but_what_its_shapes_decide(one, two, device):
    first, second = (case.make(device, BF16, requires_grad=True) for case in (one, two))
    variant = second.variant
    with torch.no_grad():
        for x in (second.q, second.v, variant.alibi_slopes, variant.sink, variant.attn_bias):
            if x is not None:
                x.mul_(0.5)  # in place: the strides stay
    if variant.rng_state is not None:
        variant.rng_state.add_(1)
    for problem in (first, second, first, second):
        check_problem(problem, one.name)


@pytest.mark.parametrize("name", ["everything", "bias_over_queries", "varlen_leftpad_seqused", "varlen_everything"])
def test_the_host_never_waits(name, device):
    problem = BY_NAME[name].make(device, BF16, requires_grad=True)
    douts = drawn_gradients(run_op(problem))
    step(problem, douts)
    one = torch.ones((), device=device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            one.item()  # the mode works
        for _ in range(2):
            step(problem, douts)
    finally:
        torch.cuda.set_sync_debug_mode(before)


# Layouts: of what the backward is given, and of what its gradients go to.

LAYOUTS: dict[str, Callable[[tuple[int, ...], str], Tensor]] = {
    "scalar": lambda shape, device: torch.ones((), dtype=BF16, device=device).expand(shape),  # of out.sum()
    "one of all rows": lambda shape, device: torch.randn(shape[-1:], dtype=BF16, device=device).expand(shape),
    "one of all columns": lambda shape, device: torch.randn((*shape[:-1], 1), dtype=BF16, device=device).expand(shape),
    "heads before rows": lambda shape, device: torch.randn(
        (*shape[:-3], shape[-2], shape[-3], shape[-1]), dtype=BF16, device=device
    ).transpose(-2, -3),
    "every other column": lambda shape, device: torch.randn((*shape, 2), dtype=BF16, device=device)[..., 1],
    "a slice": lambda shape, device: torch.randn((*shape[:-1], shape[-1] + 7), dtype=BF16, device=device)[..., 3:-4],
}
ODD = [
    Case("odd_dims", seqlen_q=70, seqlen_k=90, heads=4, heads_k=2, dim=59, dim_v=37, causal=True),
    *(BY_NAME[name] for name in ("varlen_padding", "one_query", "no_keys", "no_queries", "batch_0", "varlen_empty")),
    Case("empty_leftpad", lengths=EMPTY, leftpad_k=(0, 0, 31, 5, 0), dim=59, sink="bh"),
]
# Each is kernels to compile: all layouts of two problems, and two of the others.
LAID_OUT = [*product(LAYOUTS, ODD[:2]), *product(("scalar", "every other column"), ODD[2:])]


class TestLayouts:
    @pytest.mark.parametrize("layout, case", LAID_OUT, ids=str)
    def test_of_the_output_gradient(self, layout, case, device):
        problem = case.make(device, BF16, requires_grad=True)
        outputs = run_op(problem)
        douts = LAYOUTS[layout](outputs[0].shape, device), torch.ones((), device=device).expand(outputs[1].shape)
        self.check(gradients(outputs, problem, douts), problem, douts, f"{case}, {layout}")

    @staticmethod
    def check(actual: dict[str, Tensor], problem: Problem, douts: Douts, name: str) -> None:
        expected = oracle_results(problem, douts)
        plain = same_dtype_results(problem, douts, expected)
        recomputed = rounding_floor(expected["lse"][expected["lse"].isfinite()], torch.float32)
        for tensor, value in actual.items():
            of_tensor = expected[tensor], plain[tensor], GRADIENT_FACTOR, f"{name}: {tensor}", recomputed
            assert_close_to_oracle(value, *of_tensor)

    @pytest.mark.parametrize("dim", [64, 59])
    def test_gradients_reach_the_tensors_that_inputs_are_views_of(self, dim, device):
        """Heads before rows, a slice of rows, and a column of a packed tensor. What is not seen has gradient 0."""
        base_q = torch.randn(2, 4, 70, dim, dtype=BF16, device=device, requires_grad=True)
        base_k = torch.randn(2, 100, 2, dim + 5, dtype=BF16, device=device, requires_grad=True)
        base_v = torch.randn(2, 90, 3, 2, dim, dtype=BF16, device=device, requires_grad=True)

        def views(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return q.transpose(1, 2), k[:, 7:97, :, 5:], v[:, :, 1]

        problem = Problem(*views(base_q, base_k, base_v), Variant(causal=True), None)
        out, lse = run_op(problem)
        (out.sum() + lse.sum()).backward()
        douts = torch.ones_like(out), torch.ones_like(lse)
        found = views(*(x.grad for x in (base_q, base_k, base_v)))
        self.check(dict(zip(("dq", "dk", "dv"), found, strict=True)), problem, douts, "views")
        for base, seen in zip((base_q, base_k, base_v), found, strict=True):
            assert base.grad.count_nonzero() == seen.count_nonzero() > 0

    @pytest.mark.parametrize("name", ["gqa", "varlen_padding"])
    def test_out_and_its_gradient_in_float32(self, name, device):
        """Merged states are often kept so."""
        problem = BY_NAME[name].make(device, BF16, requires_grad=True)
        with torch.no_grad():
            out, lse = run_op(problem)
            dout = torch.randn_like(out)
            found = run_backward(problem, dout.float(), out.float(), lse)
        self.check(dict(zip(("dq", "dk", "dv"), found, strict=False)), problem, (dout, None), name)


class TestStreams:
    @staticmethod
    def late_problem(device: str) -> tuple[Problem, Douts, Callable[[], None], tuple[Tensor, ...]]:
        """A problem that is not what it will be, its douts, what makes it so (late), and its results then."""
        problem = dense(device, (2, 300, 4, 64), (2, 300, 2, 64), causal=True)
        late = torch.randn_like(problem.q)
        douts = drawn_gradients(run_op(problem))
        expected = step(differentiable(problem._replace(q=late.clone())), douts)

        def arrive() -> None:
            # Another stream would not wait for the new q.
            torch.cuda._sleep(100_000_000)
            with torch.no_grad():
                problem.q.copy_(late)

        return differentiable(problem), douts, arrive, expected

    def test_runs_on_the_current_stream(self, device):
        problem, douts, arrive, expected = self.late_problem(device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            arrive()
            actual = step(problem, douts)
        stream.synchronize()
        assert same_bits(actual, expected)

    def test_runs_on_the_stream_of_the_forward(self, device):
        """Wherever the gradients are asked for: autograd goes back there, and the kernels with it."""
        problem, douts, arrive, expected = self.late_problem(device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            arrive()
            outputs = run_op(problem)
        found = gradients(outputs, problem, douts)
        torch.cuda.synchronize()
        assert same_bits((*(x.detach() for x in outputs), *found.values()), expected)

    @pytest.mark.parametrize("name", ["everything", "varlen_everything"])
    def test_runs_on_the_device_of_its_tensors(self, name, device):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        assert torch.cuda.current_device() == 0
        for other in ("cuda:1", "cuda:0", "cuda:1"):
            check_problem(BY_NAME[name].make(other, BF16, requires_grad=True), f"{name} on {other}")
        assert torch.cuda.current_device() == 0


class TestThreads:
    @pytest.mark.parametrize("name", ["everything", "varlen_everything"])
    def test_backward_in_another_thread_than_the_forward(self, name, device):
        problem = BY_NAME[name].make(device, BF16, requires_grad=True)
        douts = random_gradients(*run_op(problem))
        expected = step(problem, douts)
        outputs = run_op(problem)
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(gradients, outputs, problem, douts).result()
        assert same_bits((*(x.detach() for x in outputs), *found.values()), expected)

    def test_threads_with_equal_signatures(self, device):
        """They share what was prepared for the signature, each with tensors and a stream of its own."""
        problems = [dense(device, (2, 200, 4, 64), (2, 200, 2, 64), causal=True) for _ in range(4)]
        douts = [drawn_gradients(run_op(problem)) for problem in problems]
        expected = [step(differentiable(problem), of_it) for problem, of_it in zip(problems, douts, strict=True)]
        assert not any(same_bits(expected[0], other) for other in expected[1:])
        torch.cuda.synchronize()

        def train(problem: Problem, douts: Douts, expected: tuple[Tensor, ...]) -> list[bool]:
            with torch.cuda.stream(torch.cuda.Stream()):
                return [same_bits(step(problem, douts), expected) for _ in range(20)]

        with ThreadPoolExecutor(4) as threads:
            assert all(map(all, threads.map(train, problems, douts, expected)))


class CapturedStep:
    """A step as a CUDA graph: replayed, it reads what its tensors hold then."""

    def __init__(self, step: Callable[[], tuple[Tensor, ...]]) -> None:
        self.step = step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = step()
        self.earlier: list[tuple[Tensor, ...]] = []

    def replay(self) -> tuple[Tensor, ...]:
        """The results, which differ from those of every replay before."""
        self.graph.replay()
        assert not any(same_bits(self.results, results) for results in self.earlier)
        self.earlier.append(tuple(x.clone() for x in self.results))
        return self.results

    def check(self) -> None:
        """A replay is what an eager step is."""
        assert same_bits(self.replay(), self.step())


class TestGraphs:
    def test_dense_with_other_inputs(self, device):
        case = Case("graph", seqlen_q=300, seqlen_k=333, heads=4, heads_k=2, dim=64, causal=True, sink="h", bias="1h1k")
        problem = case.make(device, BF16, requires_grad=True)
        douts = drawn_gradients(run_op(problem))
        captured = CapturedStep(lambda: step(problem, douts))
        for _ in range(4):
            captured.check()
            with torch.no_grad():
                for x in (*problem.differentiable().values(), *douts):
                    x.normal_()

    def test_packed_with_other_lengths(self, device):
        problem = dense(device, (1, 1000, 4, 64), (1, 1000, 2, 64), causal=True)
        starts_q, starts_k = offsets(device, 500, 0, 500), offsets(device, 100, 800, 100)
        used = torch.tensor([100, 800, 100], dtype=torch.int32, device=device)
        layout = Varlen(starts_q, starts_k, 1000, 1000, seqused_k=used)
        problem = differentiable(Problem(*(x[0] for x in problem[:3]), problem.variant, layout))
        douts = drawn_gradients(run_op(problem))
        captured = CapturedStep(lambda: step(problem, douts))
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

    @pytest.mark.parametrize("name", ["dense", "packed"])
    def test_dropout_draws_anew_in_every_replay(self, name, device):
        """The forward and the backward of one replay drop the same weights: those of the state that it drew."""
        options = {"heads": 4, "heads_k": 2, "dim": 64, "dropout_p": 0.3, "sink": "h"}
        packed = {"lengths": RAGGED} if name == "packed" else {}
        problem = Case(f"graph_dropout_{name}", **options, **packed).make(device, BF16, requires_grad=True)
        douts = drawn_gradients(run_op(problem))

        def drawn_step() -> tuple[Tensor, ...]:
            state = torch.randint(0, 2**62, (2,), device=device)  # as the public functions draw it
            return state, *step(problem._replace(variant=problem.variant._replace(rng_state=state)), douts)

        captured = CapturedStep(drawn_step)
        for _ in range(4):
            state, *actual = captured.replay()
            drawn = problem._replace(variant=problem.variant._replace(rng_state=state.clone()))
            assert same_bits(tuple(actual), step(drawn, douts))
        states = [tuple(state.tolist()) for state, *_ in captured.earlier]
        assert len(set(states)) == len(states)

    @pytest.mark.parametrize("name", ["dense", "packed"])
    def test_public_functions_draw_anew_in_every_replay(self, name, device):
        q, k, v = torch.randn(3, 2, 130, 2, 64, dtype=BF16, device=device)
        starts = offsets(device, 130, 130)

        def train() -> tuple[Tensor, ...]:
            inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
            if name == "dense":
                out = fap.flash_attn_func(*inputs, dropout_p=0.3)
            else:
                packed = (x.flatten(0, 1) for x in inputs)
                out = fap.flash_attn_varlen_func(*packed, starts, starts, 130, 130, dropout_p=0.3)
            return torch.autograd.grad(out.sum(), inputs)

        captured = CapturedStep(train)
        for _ in range(3):
            captured.replay()


@pytest.mark.no_poison
@pytest.mark.xdist_group("inductor")  # a worker pays for its start once
class TestInductor:
    """What is around the calls is exact in bfloat16, whatever the compiler fuses: parameters stay bit-equal."""

    @pytest.fixture(autouse=True)
    def graphs(self, monkeypatch) -> Iterator[list[Counter[str]]]:
        """The operators in every graph that Inductor compiles, which is none that it finds in a cache."""
        from torch._inductor import compile_fx  # takes seconds

        graphs, compile_graph = [], compile_fx._compile_fx_inner

        def record(graph: torch.fx.GraphModule, *args, **options):
            graphs.append(operator_nodes(graph))
            return compile_graph(graph, *args, **options)

        monkeypatch.setattr(compile_fx, "_compile_fx_inner", record)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch._inductor.config.patch(force_disable_caches=True):
            yield graphs
        torch._dynamo.reset()

    @staticmethod
    def dense(q: Tensor, k: Tensor, v: Tensor, target: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v, target = (x.unflatten(0, (2, 200)) for x in (q, k, v, target))
        out, lse = fap.flash_attn_func(q * 0.5, k, v, causal=True, window_size=(100, -1), return_lse=True)
        return (out.relu() * target).sum() + lse.sum() * 2.0

    @staticmethod
    def packed(q: Tensor, k: Tensor, v: Tensor, target: Tensor, cu_seqlens: Tensor) -> Tensor:
        layout = cu_seqlens, cu_seqlens, 300, 300
        out, lse = fap.flash_attn_varlen_func(q * 0.5, k, v, *layout, causal=True, return_lse=True)
        return (out.relu() * target).sum() + lse.sum() * 2.0

    @staticmethod
    def train(function: Callable[..., Tensor], device: str) -> list[tuple[Tensor, ...]]:
        """The parameters and their gradients after every step."""
        torch.manual_seed(3)
        shapes = ((400, 4, 64), (400, 2, 64), (400, 2, 64))
        parameters = [torch.randn(shape, dtype=BF16, device=device, requires_grad=True) for shape in shapes]
        optimizer = torch.optim.SGD(parameters, lr=2.0**-4)
        history = []
        for packed in ((300, 1, 0, 99), (100, 100, 100, 100), (0, 0, 200, 200), (7, 93, 200, 100), (300, 100, 0, 0)):
            torch.compiler.cudagraph_mark_step_begin()
            target = torch.randn(400, 4, 64, dtype=BF16, device=device)
            optimizer.zero_grad()
            function(*parameters, target, offsets(device, *packed)).backward()
            optimizer.step()
            history.append(tuple(x.clone() for p in parameters for x in (p.detach(), p.grad)))
        return history

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    @pytest.mark.parametrize("name", ["dense", "packed"])
    def test_compiled_training_is_bit_equal_to_eager(self, name, mode, device, graphs):
        function = getattr(self, name)
        actual = self.train(torch.compile(function, fullgraph=True, mode=mode), device)
        for n, (one, other) in enumerate(zip(actual, self.train(function, device), strict=True)):
            assert same_bits(one, other), f"step {n}"
            assert all(x.isfinite().all() and x.any() for x in other)
        forward, backward = ("fwd", "bwd") if name == "dense" else ("varlen_fwd", "varlen_bwd")
        assert graphs == [Counter({forward: 1}), Counter({backward: 1})]
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        assert skips == 0, "reduce-overhead ran without CUDA graphs"


class TestCheckpoint:
    """Activation checkpointing replays the random state: what is computed again drops the same weights."""

    @staticmethod
    def attention(name: str, device: str) -> Callable[[Tensor, Tensor], Tensor]:
        if name == "dense":
            return lambda q, kv: fap.flash_attn_kvpacked_func(q, kv, dropout_p=0.3, causal=True)
        starts = offsets(device, 100, 0, 160)

        def packed(q: Tensor, kv: Tensor) -> Tensor:
            q, kv = q.flatten(0, 1), kv.flatten(0, 1)
            out = fap.flash_attn_varlen_kvpacked_func(q, kv, starts, starts, 160, 160, dropout_p=0.3, causal=True)
            return out.unflatten(0, (2, 130))

        return packed

    @staticmethod
    def train(attention: Callable[[Tensor, Tensor], Tensor], device: str, seed: int = 7) -> tuple[Tensor, ...]:
        """The output of two layers, and all gradients."""
        torch.manual_seed(3)
        q = torch.randn(2, 130, 4, 64, dtype=BF16, device=device, requires_grad=True)
        layers = [torch.randn(2, 130, 2, 2, 64, dtype=BF16, device=device, requires_grad=True) for _ in range(2)]
        torch.manual_seed(seed)
        out = q
        for kv in layers:
            out = attention(out, kv)
        torch.rand(1000, device=device)  # nor is it the state that the forward ends with
        out.sum().backward()
        return out.detach(), *(x.grad for x in (q, *layers))

    @pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
    @pytest.mark.parametrize("name", ["dense", "packed"])
    def test_gradients_are_bit_equal(self, name, use_reentrant, device):
        attention = self.attention(name, device)
        calls = Counter()

        def counted(q: Tensor, kv: Tensor) -> Tensor:
            calls["attention"] += 1
            return attention(q, kv)

        plain = self.train(attention, device)
        again = self.train(lambda q, kv: checkpoint(counted, q, kv, use_reentrant=use_reentrant), device)
        assert calls["attention"] == 4, "nothing was computed again"
        assert same_bits(again, plain)
        assert not any(torch.equal(*pair) for pair in zip(self.train(attention, device, seed=8), plain, strict=True))


@pytest.mark.no_poison
class TestPeakMemory:
    """Beside its results a backward allocates four numbers for each row: nothing of the size of q or of the scores, and
    nothing for each query head where these share keys.
    """

    @staticmethod
    def peak(call: Callable[[], tuple[Tensor, ...]]) -> tuple[int, int]:
        """Bytes that a call takes at most, and those of its results."""
        call()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        results = call()
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        return peak, sum(x.nbytes for x in results)

    CASES = (
        large("memory", 4096, heads=8, heads_k=2, causal=True),
        large("memory_mqa", 4096, heads=8, heads_k=1, dim=128),
        Case("memory_sliced", layout="sliced", dim=59, dim_v=40),
        Case("memory_transposed", layout="transposed", dim=8, seqlen_q=300),
        Case("memory_packed", layout="packed", dim=111, seqlen_q=200, seqlen_k=200),
        BY_NAME["everything"],
        BY_NAME["varlen_everything"],
        BY_NAME["varlen_leftpad_seqused"],
    )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_of_the_operator(self, case, device):
        problem = case.make(device, BF16)
        out, lse = run_op(problem)
        dout = torch.randn_like(out)
        peak, results = self.peak(lambda: run_backward(problem, dout, out, lse))
        assert results <= peak <= results + 4 * lse.nbytes

    @pytest.mark.parametrize("frozen", ["nothing", "q", "k v"])
    def test_of_a_training_step(self, frozen, device):
        """What needs no gradient has no memory for one."""
        problem = self.CASES[0].make(device, BF16, requires_grad=True)
        leaves = {"q": problem.q, "k": problem.k, "v": problem.v}
        for name in set(frozen.split()) & set(leaves):
            leaves.pop(name).requires_grad_(False)
        dout = torch.randn_like(run_op(problem)[0])

        def train() -> tuple[Tensor, ...]:
            out, lse = run_op(problem)
            return out.detach(), lse.detach(), *torch.autograd.grad(out, tuple(leaves.values()), dout)

        peak, results = self.peak(train)
        rows = 4 * problem.q.shape[:3].numel()  # a float32 for each
        assert results <= peak <= results + 4 * rows


PACKED = {
    "qkv": (fap.flash_attn_qkvpacked_func, (2, 700, 3, 4, 64)),
    "kv": (fap.flash_attn_kvpacked_func, (2, 700, 2, 4, 64)),
    "varlen_qkv": (fap.flash_attn_varlen_qkvpacked_func, (1400, 3, 4, 64)),
    "varlen_kv": (fap.flash_attn_varlen_kvpacked_func, (1400, 2, 4, 64)),
}


@pytest.mark.no_poison
@pytest.mark.parametrize("name", PACKED)
class TestPackedInputs:
    """Their gradient is written as one tensor: the bits of the gradients of three, and the memory of one."""

    @staticmethod
    def step(name: str, device: str) -> Callable[[], tuple[Tensor, ...]]:
        function, shape = PACKED[name]
        generator = torch.Generator(device).manual_seed(0)
        packed = torch.randn(shape, dtype=BF16, device=device, generator=generator).requires_grad_()
        q = torch.randn_like(packed.detach().select(-3, 0), memory_format=torch.contiguous_format).requires_grad_()
        leaves = (packed,) if "qkv" in name else (q, packed)
        cu_seqlens = torch.tensor([0, 1, 600, 600, 1390], dtype=torch.int32, device=device)
        layouts = {"varlen_qkv": (cu_seqlens, 790), "varlen_kv": (cu_seqlens, cu_seqlens, 790, 790)}
        layout = layouts.get(name, ())
        dout = torch.randn(q.shape, dtype=BF16, device=device, generator=generator)

        def train() -> tuple[Tensor, ...]:
            out = function(*leaves, *layout, causal=True)
            return out.detach(), *torch.autograd.grad(out, leaves, dout)

        return train

    def test_equal_to_views(self, name, device, monkeypatch):
        train = self.step(name, device)
        first, second = train(), train()
        monkeypatch.setattr("flash_attn_plus.eager._may_be_joint", lambda joint: False)
        assert same_bits(first, train()) and same_bits(first, second)

    def test_peak_memory(self, name, device):
        train = self.step(name, device)
        peak, results = TestPeakMemory.peak(train)
        rows = 2 * 700 * 4
        assert results <= peak <= results + 4 * 5 * rows + 4096  # log-sum-exp and statistics


@pytest.mark.parametrize(
    "field, values",
    [
        ("cu_seqlens_q", [0, 37, 38, 108, 10**9]),
        ("cu_seqlens_q", [-9, 37, 38, 108, 2**31 - 1]),
        ("cu_seqlens_k", [0, 37, 117, 122, 10**9]),
        ("seqused_q", [10**9, 1, 70, 2**31 - 1]),
        ("seqused_k", [10**9, 80, 5, 2**31 - 1]),
        ("leftpad_k", [-1, -(2**31), 0, 0]),
    ],
)
def test_wrong_offsets_end_with_the_segment_and_the_tensor(field, values, device):
    """Nothing on the host may look at offsets, so wrong ones are told nobody. (Memory: the test below.)"""
    problem = Case("wrong_offsets", lengths=RAGGED, causal=True, sink="h").make(device, BF16, requires_grad=True)
    assert (problem.q.shape[0], problem.k.shape[0]) == (172, 186)
    douts = drawn_gradients(run_op(problem))
    wrong = torch.tensor(values, dtype=torch.int32, device=device)
    actual = step(problem._replace(varlen=problem.varlen._replace(**{field: wrong})), douts)
    assert same_bits(actual, step(problem, douts))


def run_inside_problems() -> None:
    for name, problem in inside_problems("cuda"):
        if problem.varlen is not None and problem.varlen.block_table is not None:
            continue
        print(name, flush=True)  # the last one printed is the one that failed
        outputs = run_op(differentiable(problem))
        found = gradients(outputs, problem, drawn_gradients(outputs))
        torch.cuda.synchronize()
        if name == "no sequences":
            assert all((x == 0).all() for x in found.values())


@pytest.mark.parametrize("tool", ["no tool", "compute-sanitizer"])
def test_nothing_outside_the_tensors_is_touched(tool):
    check_alone(run_inside_problems, tool)
