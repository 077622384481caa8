"""The operators on the CPU against the oracle: every case, every dtype, every implementation that cpu.py has."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from assertions import check_case, gradients, random_gradients, run_op
from cases import BY_NAME, CASES, DENSE_CASES, VARLEN_CASES, Case, Problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flash_attn_plus
from flash_attn_plus import cpu, native, rowblocks
from flash_attn_plus.reference import merge_states
from flash_attn_plus.schemas import Variant, Varlen

needs_native = pytest.mark.skipif(not native.load(), reason=native.status())


def named(names: str) -> list[Case]:
    return [BY_NAME[name] for name in names.split()]


# What PyTorch's own kernel and the native one may take over.
PLAIN = named(
    "plain plain_block_multiple causal gqa mqa dim_59 sliced scale_0_causal scale_negative_causal every_other_no_keys "
    "varlen"
)
# One of every kind, for what need not run on all cases.
SUBSET = PLAIN + named(
    "no_keys batch_0 wider_v causal_more_queries window_both window_past_the_keys everything sink_rows_without_keys "
    "bias_minus_inf dropout_gqa varlen_empty varlen_leftpad varlen_everything paged_odd"
)


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "aten", "row blocks"])
def implementation(request, monkeypatch):
    """Runs the forward by this implementation wherever it computes what is asked."""
    if request.param == "aten":
        monkeypatch.setattr(native, "loaded", lambda: False)
        assert cpu.choose_forward(*torch.zeros(3, 1, 1, 1, 1), Variant()).implementation == "aten"
    elif request.param == "row blocks":
        monkeypatch.setattr(cpu, "choose_forward", lambda *_: cpu.Choice("row blocks", "the test says so"))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_against_the_oracle(case, dtype):
    check_case(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", SUBSET, ids=str)
def test_case_against_the_oracle_in_rarer_dtypes(case, dtype):
    check_case(case, "cpu", dtype)


@pytest.mark.parametrize("loss", ["out", "lse"])
@pytest.mark.parametrize("case", SUBSET, ids=str)
def test_loss_of_one_result_alone(case, loss):
    """Without a gradient through lse, PyTorch's own backward may run; without one through out, dout is absent."""
    check_case(case, "cpu", torch.float32, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_implementations_agree_with_the_oracle(case, dtype):
    check_case(case, "cpu", dtype, loss="out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SUBSET, ids=str)
def test_row_blocks_lse_of_16_bit_inputs_is_as_exact_as_fp32(case, dtype, monkeypatch):
    """PyTorch's own kernel takes a faster exp in 16 bits; row blocks do all arithmetic in fp32."""
    monkeypatch.setattr(cpu, "choose_forward", lambda *_: cpu.Choice("row blocks", "the test says so"))
    check_case(case, "cpu", dtype, loss="", lse_maths=torch.float32)


class TestGradcheck:
    """Finite differences of the operators in fp64, through out and lse, into q, k, v, sink and bias."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"causal": True, "softcap": 1.5},
            {"window_left": 1, "window_right": 1, "alibi_slopes": torch.tensor([0.5, 0.25])},
            {"dropout_p": 0.3, "rng_state": torch.tensor([3, 4]), "causal": True},
            {"softmax_scale": -0.5, "diagonal": 0, "window_right": 1},
        ],
        ids=lambda options: "_".join(options) or "plain",
    )
    @pytest.mark.parametrize("extras", [False, True], ids=["", "sink_bias"])
    def test_dense(self, options, extras):
        q, k, v = (torch.randn(2, s, h, d, dtype=torch.float64) for s, h, d in ((3, 2, 3), (4, 1, 3), (4, 1, 2)))
        inputs = [q, k, v]
        if extras:
            inputs += [torch.randn(2, dtype=torch.float64), torch.randn(1, 2, 3, 4, dtype=torch.float64)]

        def run(q, k, v, sink=None, bias=None):
            return run_op(Problem(q, k, v, Variant(sink=sink, attn_bias=bias, **options), None))

        assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])

    @pytest.mark.parametrize("shape", [(2, 2, 3, 4), (1, 2, 1, 4), (2, 1, 3, 1), (1, 1, 1, 1)])
    def test_bias_broadcast_in_any_axis(self, shape):
        q, k, v = (torch.randn(2, s, 2, 2, dtype=torch.float64) for s in (3, 4, 4))
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda bias: run_op(Problem(q, k, v, Variant(attn_bias=bias), None)), bias)

    def test_varlen(self):
        q, k, v = (torch.randn(n, h, 3, dtype=torch.float64) for n, h in ((6, 2), (8, 1), (8, 1)))
        sink, bias = torch.randn(3, 2, dtype=torch.float64), torch.randn(1, 2, 3, 1, dtype=torch.float64)
        starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 5], [0, 3, 4, 8]))
        varlen = Varlen(starts_q, starts_k, 3, 4, leftpad_k=torch.tensor([1, 0, 0], dtype=torch.int32))

        def run(q, k, v, sink, bias):
            out, lse = run_op(Problem(q, k, v, Variant(sink=sink, attn_bias=bias, causal=True), varlen))
            return out, lse[:, :5]  # the row past the end has lse -inf, which has no finite difference

        assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (q, k, v, sink, bias)])


def forward_and_backward(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    problem = case.make("cpu", dtype, requires_grad=not case.forward_only)
    outputs = run_op(problem)
    if case.forward_only:
        return list(outputs)
    return [*outputs, *gradients(outputs, problem, random_gradients(*outputs)).values()]


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SUBSET, ids=str)
def test_reruns_are_bit_equal(case, dtype):
    first = forward_and_backward(case, dtype)
    for _ in range(3):
        assert_same_bits(first, forward_and_backward(case, dtype))


@needs_native
@pytest.mark.parametrize("case", [case for case in PLAIN if case.lengths is None], ids=str)
def test_native_forward_does_not_depend_on_the_thread_count(case):
    problem, threads = case.make("cpu", torch.float32), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_op(problem))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("case", [*DENSE_CASES, *VARLEN_CASES], ids=str)
def test_inputs_are_not_modified(case):
    problem = case.make("cpu", torch.float32, requires_grad=not case.forward_only)
    tensors = [x for x in tree_leaves(tuple(problem)) if isinstance(x, torch.Tensor)]
    before = [(x.detach().clone(), x._version) for x in tensors]
    outputs = run_op(problem)
    if not case.forward_only:
        gradients(outputs, problem, random_gradients(*outputs))
    for x, (was, version) in zip(tensors, before, strict=True):
        assert torch.equal(x.nan_to_num(), was.nan_to_num()) and x._version == version


def test_backward_of_ring_blocks_adds_up():
    """bwd takes any out and lse: with the merged ones, each block of keys gives its part of the gradients."""
    q, k, v, dout = (torch.randn(2, s, 2, 8, dtype=torch.float64) for s in (20, 30, 30, 20))
    dlse = torch.randn(2, 2, 20, dtype=torch.float64)
    ops = torch.ops.flash_attn_plus
    whole = ops.fwd(q, k, v, causal=True)
    expected = ops.bwd(dout, q, k, v, *whole, dlse, causal=True)

    # Block n holds keys [start, end): its diagonal is the whole's, moved by where the block starts.
    blocks = [(slice(0, 13), 10), (slice(13, 30), 10 - 13)]
    parts = [ops.fwd(q, k[:, keys], v[:, keys], causal=True, diagonal=diagonal) for keys, diagonal in blocks]
    merged = merge_states(*parts[0], *parts[1])
    torch.testing.assert_close(merged, tuple(whole))
    grads = [
        ops.bwd(dout, q, k[:, keys], v[:, keys], *merged, dlse, causal=True, diagonal=diagonal)
        for keys, diagonal in blocks
    ]
    torch.testing.assert_close(grads[0][0] + grads[1][0], expected[0])
    for n in (1, 2):
        torch.testing.assert_close(torch.cat([grads[0][n], grads[1][n]], 1), expected[n])


class LargestResult(TorchDispatchMode):
    """The bytes of the largest storage that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = (x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        self.bytes = max(self.bytes, *sizes, 0)
        return result


@pytest.mark.no_poison
@pytest.mark.parametrize(
    "variant",
    [
        # A small slope: steep ones fill the tail with denormal numbers, which some CPUs take many times longer over.
        Variant(alibi_slopes=torch.tensor([0.001])),
        Variant(dropout_p=0.1, rng_state=torch.tensor([1, 2])),
    ],
    ids=["alibi", "dropout"],
)
def test_row_blocks_never_hold_a_matrix_of_all_scores(variant):
    seqlen = 4096
    q, k, v = torch.randn(3, 1, seqlen, 1, 16)
    with LargestResult() as largest:
        out, lse = rowblocks.forward(q, k, v, variant)
        rowblocks.backward(torch.ones_like(out), q, k, v, out, lse, torch.ones_like(lse), variant)
    assert largest.bytes < seqlen * seqlen  # a quarter of the scores in fp32


PEAK_MEMORY = """
import resource
import torch
import flash_attn_plus

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(seqlen, **options):
    q, k, v = (torch.randn(1, seqlen, 1, 16, requires_grad=True) for _ in range(3))
    out, lse = torch.ops.flash_attn_plus.fwd(q, k, v, **options)
    (out.sum() + lse.sum()).backward()

torch.set_num_threads(1)
for options in ({{"alibi_slopes": torch.tensor([0.001])}}, {{"causal": True}}):
    run(64, **options)  # libraries
    before = peak_bytes()
    run({seqlen}, **options)
    print(peak_bytes() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is POSIX")
def test_peak_memory_of_the_operators_is_linear():
    """Seen from the operating system: also what C++ allocates."""
    seqlen = 4096
    script = PEAK_MEMORY.format(seqlen=seqlen)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for growth in map(int, done.stdout.split()):
        assert growth < 2 * seqlen * seqlen  # half of the scores in fp32


def test_the_package_registers_the_operators():
    assert flash_attn_plus.__version__
    assert {"fwd", "bwd", "varlen_fwd", "varlen_bwd"} <= set(dir(torch.ops.flash_attn_plus))
