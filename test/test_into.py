"""``bwd_into`` and ``varlen_bwd_into``: gradients into given tensors, and packed inputs, whose gradients they are."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest
import torch
from cases import BY_NAME, CASES, Case, Problem
from test_opcheck import EVERY_ROW, TRACED, assert_same_metadata, backward_call, check
from torch import Tensor
from torch._dynamo.exc import TorchRuntimeError
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flash_attn_plus as fap
from flash_attn_plus import library

OPS = torch.ops.flash_attn_plus
DIFFERENTIABLE = [case for case in CASES if not case.forward_only]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
SAVED = 7  # dout, q, k, v, out, lse, dlse


def into_call(problem: Problem, given: tuple[Tensor | None, ...] | None = None) -> tuple:
    """The operator and all its arguments; without ``given``, contiguous tensors receive the gradients."""
    op, args = backward_call(problem)
    name = op._schema.name.removeprefix("flash_attn_plus::")
    if given is None:
        given = tuple(torch.empty_like(x).fill_(torch.nan) for x in args[1:4])
    return getattr(OPS, f"{name}_into").default, (*args[:SAVED], *given, *args[SAVED:-3], args[-1])


def expected_of(call: tuple) -> tuple[Tensor, ...]:
    """All five gradients, by the operator that allocates."""
    op, args = call
    name = op._schema.name.removeprefix("flash_attn_plus::").removesuffix("_into")
    return getattr(OPS, name)(*args[:SAVED], *args[SAVED + 3 : -1], True, True, args[-1])


def in_the_middle(x: Tensor, axis: int = -3) -> tuple[Tensor, Tensor]:
    """(a view of x's shape, what it is a view of): the second of three neighbours; all of it NaN."""
    whole = x.new_full((*x.shape[: axis + 1 or None], 3, *x.shape[axis + 1 :]), torch.nan)
    return whole.select(axis if axis < -1 else x.dim(), 1), whole


class TestValues:
    @pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
    def test_into_views_of_a_larger_tensor(self, case: Case) -> None:
        problem = case.make()
        views, wholes = zip(*(in_the_middle(x) for x in problem[:3]), strict=True)
        op, args = call = into_call(problem, views)
        dsink, dbias = op(*args)
        torch.testing.assert_close((*views, dsink, dbias), expected_of(call), rtol=0, atol=0)
        for whole in wholes:
            assert whole.select(-3, 0).isnan().all() and whole.select(-3, 2).isnan().all()

    @pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), ()])
    @pytest.mark.parametrize("name", ["everything", "varlen_everything"])
    def test_only_what_is_given(self, name: str, needed: tuple[int, ...]) -> None:
        problem = BY_NAME[name].make()
        given = tuple(torch.empty_like(x) if i in needed else None for i, x in enumerate(problem[:3]))
        op, args = call = into_call(problem, given)
        results = (*given, *op(*args))
        for actual, expected in zip(results, expected_of(call), strict=True):
            assert actual is None or torch.equal(actual, expected)

    def test_a_last_dimension_that_is_not_contiguous(self) -> None:
        problem = BY_NAME["plain"].make()
        given = tuple(x.new_empty(x.shape[::-1]).permute(3, 2, 1, 0) for x in problem[:3])
        op, args = call = into_call(problem, given)
        op(*args)
        torch.testing.assert_close(given, expected_of(call)[:3], rtol=0, atol=0)


class TestWhatPyTorchAsks:
    @pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
    def test_schema_autograd_and_fake(self, case: Case) -> None:
        check(into_call(case.make()), EVERY_ROW)

    @pytest.mark.parametrize("name", [name for name in TRACED if not BY_NAME[name].forward_only])
    def test_traces_with_symbolic_sizes(self, name: str) -> None:
        check(into_call(BY_NAME[name].make()), ("test_aot_dispatch_dynamic",))

    @pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
    def test_meta_device(self, case: Case) -> None:
        assert_same_metadata(into_call(case.make()))

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_notes_that_tensors_were_written_into(self, context) -> None:
        op, args = into_call(BY_NAME["plain"].make())
        before = [x._version for x in args[SAVED : SAVED + 3]]
        others = [x._version for x in args[:SAVED]]
        with context():
            op(*args)
        assert [x._version for x in args[SAVED : SAVED + 3]] == [version + 1 for version in before]
        assert [x._version for x in args[:SAVED]] == others

    def test_a_gradient_tensor_that_was_saved_is_noticed(self) -> None:
        op, args = into_call(BY_NAME["plain"].make())
        leaf = torch.ones_like(args[SAVED], requires_grad=True)
        product = leaf * args[SAVED]
        op(*args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()

    def test_inference_tensors(self) -> None:
        with torch.inference_mode():
            op, args = call = into_call(BY_NAME["plain"].make())
            op(*args)
            assert torch.equal(args[SAVED], expected_of(call)[0])

    @pytest.mark.parametrize("place", [0, 2, SAVED])
    def test_records_no_gradient(self, place: int) -> None:
        op, args = into_call(BY_NAME["plain"].make())
        args[place].requires_grad_()
        with pytest.raises(NotImplementedError, match=r"bwd_into writes into its arguments.*no_grad"):
            op(*args)
        with torch.no_grad():
            op(*args)

    def test_forward_mode_raises(self) -> None:
        op, args = into_call(BY_NAME["plain"].make())
        with torch.autograd.forward_ad.dual_level():
            op(*args)
            dout = torch.autograd.forward_ad.make_dual(args[0], torch.ones_like(args[0]))
            with pytest.raises(NotImplementedError, match="bwd_into"):
                op(dout, *args[1:])

    def test_vmap_raises_by_name(self) -> None:
        op, args = into_call(BY_NAME["plain"].make())
        with pytest.raises(NotImplementedError, match="flash_attn_plus::bwd_into writes into its arguments"):
            torch.vmap(lambda dout: op(dout, *args[1:]))(torch.stack([args[0]] * 2))

    def test_never_runs_under_autocast(self) -> None:
        op, args = call = into_call(BY_NAME["everything"].make())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            op(*args)
        torch.testing.assert_close(args[SAVED : SAVED + 3], expected_of(call)[:3], rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["plain", "varlen"])
    def test_flops_are_those_of_the_backward(self, name: str) -> None:
        def count(call: tuple) -> int:
            with FlopCounterMode(display=False) as counter:
                call[0](*call[1])
            return counter.get_total_flops()

        problem = BY_NAME[name].make()
        assert count(into_call(problem)) == count(backward_call(problem)) > 0

    def test_compiled_as_one_node_that_writes_into_views(self) -> None:
        """As a ring's backward calls it: into slices of one buffer."""
        op, args = call = into_call(BY_NAME["plain"].make())

        def into_slices(*args):
            whole = torch.empty(3, *args[1].shape)
            op(*args[:SAVED], *whole.unbind(0), *args[SAVED + 3 :])
            return whole

        graphs = AotEagerAndRecordGraphs()
        compiled = torch.compile(into_slices, backend=graphs, fullgraph=True)
        expected = torch.stack(expected_of(call)[:3])
        assert torch.equal(compiled(*args), expected)
        [graph] = graphs.fw_graphs
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert sum("flash_attn_plus" in target or "auto_functionalized" in target for target in targets) == 1


def sentences(name: str) -> list[str]:
    op, args = into_call(BY_NAME[name].make())
    dq, dk, dv = args[SAVED : SAVED + 3]
    found = []
    for given in (
        (dq[..., :-1], dk, dv),
        (dq, dk.half(), dv),
        (dq, dk, dv[0]),
        (dq, dk[:1].expand_as(dk), dv),
        (dq.to("meta"), dk, dv),
        (dq.to_sparse(), dk, dv),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            op(*args[:SAVED], *given, *args[SAVED + 3 :])
        found.append(f"{type(error.value).__name__}: {error.value}")
    return found


def test_errors() -> None:
    dense = sentences("plain")
    assert [x.split(": ")[1] for x in dense] == ["dq", "dk", "dv", "dk", "dq", "dq"]
    assert dense[0] == "ValueError: dq: expected shape of q = (2, 67, 2, 32), got (2, 67, 2, 31)"
    assert dense[1] == "TypeError: dk: expected dtype torch.float32 (q's), got torch.float16"
    assert "expected a place of its own for every element" in dense[3]
    assert [x.split(": ")[:2] for x in sentences("varlen")] == [x.split(": ")[:2] for x in dense]


# Packed inputs


OFFSETS = torch.tensor([0, 3, 8], dtype=torch.int32)


def qkv_dense(x: Tensor, **options):
    return fap.flash_attn_qkvpacked_func(x, **options)


def qkv_packed(x: Tensor, **options):
    return fap.flash_attn_varlen_qkvpacked_func(x, OFFSETS, 5, **options)


def kv_dense(x: Tensor, **options):
    return fap.flash_attn_kvpacked_func(x[..., 0, :, :] * 2, x[..., 1:, :, :], **options)


def kv_packed(x: Tensor, **options):
    return fap.flash_attn_varlen_kvpacked_func(x[..., 0, :, :], x[..., 1:, :, :], OFFSETS, OFFSETS, 5, 5, **options)


FUNCTIONS = {
    "qkv": (qkv_dense, (2, 8, 3, 2, 16)),
    "kv": (kv_dense, (2, 8, 3, 2, 16)),
    "varlen_qkv": (qkv_packed, (8, 3, 2, 16)),
    "varlen_kv": (kv_packed, (8, 3, 2, 16)),
}


class Seen(TorchDispatchMode):
    """The names of the operators that run; a mode, hence the ordinary way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_by_one(monkeypatch):
    """A context where packed inputs are views whose gradients PyTorch puts together."""

    def switch() -> None:
        monkeypatch.setattr("flash_attn_plus.eager._may_be_joint", lambda joint: False)

    return switch


@pytest.mark.parametrize("name", FUNCTIONS)
class TestPacked:
    @staticmethod
    def gradients(name: str, **options) -> tuple[Tensor, ...]:
        function, shape = FUNCTIONS[name]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out, lse = function(x, causal=True, return_lse=True, **options)
        return torch.autograd.grad(out.square().sum() + lse.sum(), [x, *options.values()])

    @pytest.mark.parametrize("times", [1, 2])
    def test_equal_to_views(self, name: str, times: int, one_by_one) -> None:
        """In the first call, which goes through the dispatcher, and in the second, which need not."""
        for memory in library._memories.values():
            memory.clear()
        for _ in range(times):
            sink = torch.randn(2, generator=torch.Generator().manual_seed(1)).requires_grad_()
            actual = self.gradients(name, sink=sink)
        one_by_one()
        torch.testing.assert_close(actual, self.gradients(name, sink=sink), rtol=0, atol=0)

    def test_written_where_they_belong(self, name: str, monkeypatch) -> None:
        """One tensor for all of them, and no copy: the class for packed inputs writes into views of what it returns."""
        written = []
        backward_into = "backward_into" if name in ("qkv", "kv") else "varlen_backward_into"
        for memory in library._memories.values():
            memory.clear()

        def spy(*structured):
            written.append(structured[7:10])
            for x in structured[7:10]:
                if x is not None:
                    x.zero_()
            return torch.empty(0), torch.empty(0)

        monkeypatch.setattr(f"flash_attn_plus.cpu.{backward_into}", spy)
        function, shape = FUNCTIONS[name]
        x = torch.randn(shape).requires_grad_()
        out = function(x)
        assert type(out.grad_fn).__name__ == f"FlashAttnPlus_{'varlen_' if 'varlen' in name else ''}fwdBackward"
        (grad,) = torch.autograd.grad(out.sum(), x)
        [(dq, dk, dv)] = written
        assert dk._base is dv._base is not None
        if name in ("qkv", "varlen_qkv"):
            assert dq._base is dk._base
            assert grad.data_ptr() == dq.data_ptr() and grad.is_contiguous()

    def test_options_alone(self, name: str) -> None:
        function, shape = FUNCTIONS[name]
        sink = torch.zeros(2, requires_grad=True)
        (grad,) = torch.autograd.grad(function(torch.randn(shape), sink=sink).square().sum(), sink)
        assert grad.abs().sum() > 0

    def test_double_backward_raises_and_create_graph_alone_does_not(self, name: str) -> None:
        function, shape = FUNCTIONS[name]
        x = torch.randn(shape).requires_grad_()
        (expected,) = torch.autograd.grad(function(x).square().sum(), x)
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        torch.testing.assert_close(grad, expected)
        with pytest.raises(NotImplementedError, match=r"not differentiable \(no double backward\)"):
            grad.square().sum().backward()

    def test_in_place_changes_are_noticed(self, name: str) -> None:
        function, shape = FUNCTIONS[name]
        x = torch.randn(shape)
        doubled = x.requires_grad_() * 2
        out = function(doubled)
        with torch.no_grad():
            doubled.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_profiled_all_the_same(self, name: str) -> None:
        """What the profiler shows is what runs without it."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.gradients(name)
        names = {event.key for event in profile.key_averages()}
        prefix = "varlen_" if "varlen" in name else ""
        assert f"flash_attn_plus::{prefix}bwd_into" in names
        assert "aten::stack" not in names

    def test_a_mode_sees_operators_that_allocate(self, name: str) -> None:
        with Seen() as mode:
            self.gradients(name)
        assert {"flash_attn_plus::bwd", "flash_attn_plus::varlen_bwd"} & set(mode.names)
        assert not any("_into" in name for name in mode.names)

    @pytest.mark.parametrize("forward, backward", [(True, False), (False, True), (True, True)])
    def test_checkpoint_with_a_mode_in_one_half(self, name: str, forward: bool, backward: bool) -> None:
        """What is saved is the same with a mode and without: the recomputation may have another."""
        function, shape = FUNCTIONS[name]
        x = torch.randn(shape).requires_grad_()
        (expected,) = torch.autograd.grad(function(x).square().sum(), x)
        with FlopCounterMode(display=False) if forward else nullcontext():
            out = checkpoint(lambda x: function(x * 1.0), x, use_reentrant=False)
        with FlopCounterMode(display=False) if backward else nullcontext():
            out.square().sum().backward()
        torch.testing.assert_close(x.grad, expected)

    def test_a_batch_of_gradients(self, name: str) -> None:
        function, shape = FUNCTIONS[name]
        x = torch.randn(shape).requires_grad_()
        out = function(x)
        douts = torch.randn(3, *out.shape)
        (batched,) = torch.autograd.grad(out, x, douts, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(out, x, dout, retain_graph=True)[0] for dout in douts]
        torch.testing.assert_close(batched, torch.stack(each))

    def test_gradients_of_a_class_with_torch_dispatch(self, name: str) -> None:
        function, shape = FUNCTIONS[name]
        x = torch.randn(shape).requires_grad_()
        out = function(x)
        a, b = torch.randn_like(out), torch.randn_like(out)
        (both,) = torch.autograd.grad(out, x, TwoTensor(a, b), retain_graph=True)
        for part, dout in ((both.a, a), (both.b, b)):
            torch.testing.assert_close(part, torch.autograd.grad(out, x, dout, retain_graph=True)[0])

    def test_a_trace_of_the_backward(self, name: str) -> None:
        function, shape = FUNCTIONS[name]
        x = torch.randn(shape).requires_grad_()
        out = function(x)
        dout = torch.randn_like(out)
        graph = make_fx(lambda dout: torch.autograd.grad(out, x, dout, retain_graph=True)[0])(dout)
        torch.testing.assert_close(graph(dout), torch.autograd.grad(out, x, dout)[0])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_autocast(self, name: str, dtype: torch.dtype) -> None:
        """bfloat16 inputs stay what they are; float32 inputs are cast, and their gradient is float32."""
        function, shape = FUNCTIONS[name]
        x = torch.randn(shape, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(x)
        out.float().sum().backward()
        assert out.dtype == torch.bfloat16 and x.grad.dtype == dtype
        plain = x.detach().to(torch.bfloat16).requires_grad_()
        function(plain).float().sum().backward()
        torch.testing.assert_close(x.grad.to(torch.bfloat16), plain.grad, rtol=0.02, atol=0.02)

    def test_vmap(self, name: str) -> None:
        function, shape = FUNCTIONS[name]
        x = torch.randn(2, *shape)

        def gradient(x: Tensor) -> Tensor:
            return torch.func.grad(lambda x: function(x).square().sum())(x)

        torch.testing.assert_close(torch.vmap(gradient)(x), torch.stack([gradient(x[0]), gradient(x[1])]))


def test_functionalize_tells_what_it_cannot() -> None:
    """torch.func.functionalize knows no operators that write; what PyTorch says is a sentence, not wrong values."""
    op, args = into_call(BY_NAME["plain"].make())
    with pytest.raises(RuntimeError, match=r"flash_attn_plus::bwd_into.*only support functionalizing"):
        functionalize(lambda *args: op(*args))(*args)


def test_an_inference_tensor_is_not_written_into_outside_inference_mode() -> None:
    op, args = into_call(BY_NAME["plain"].make())
    with torch.inference_mode():
        dq = torch.zeros_like(args[SAVED])
    with pytest.raises(RuntimeError, match="inference tensor is written into outside InferenceMode"):
        op(*args[:SAVED], dq, *args[SAVED + 1 :])
    assert (dq == 0).all()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_views_with_symbolic_offsets_are_right_or_refused(backend: str) -> None:
    """Inductor loses the offsets of such views (pytorch/pytorch#198068)."""
    torch._dynamo.reset()

    def into_slices(*saved: Tensor) -> Tensor:
        whole = torch.empty(3, *saved[1].shape)
        OPS.bwd_into(*saved, None, *whole.unbind(0))
        return whole

    compiled = torch.compile(into_slices, backend=backend, dynamic=False)
    for length in (8, 9, 20):
        q, k, v = torch.randn(3, 2, length, 2, 16).unbind(0)
        out, lse = OPS.fwd(q, k, v)
        saved = (torch.randn_like(out), q, k, v, out, lse)
        assert torch.equal(compiled(*saved), torch.stack(OPS.bwd(*saved, None)[:3]))
    with pytest.raises(TorchRuntimeError, match="dk: expected a tensor whose place in its memory does not depend"):
        torch.compile(into_slices, backend=backend, dynamic=True)(*saved)


@pytest.mark.parametrize("name", ["kv", "varlen_kv"])
def test_queries_or_keys_alone(name: str) -> None:
    shape = FUNCTIONS[name][1]
    q, kv = torch.randn(*shape[:-3], *shape[-2:]), torch.randn(*shape[:-3], 2, *shape[-2:])
    layout = () if name == "kv" else (OFFSETS, OFFSETS, 5, 5)
    function = fap.flash_attn_kvpacked_func if name == "kv" else fap.flash_attn_varlen_kvpacked_func
    leaves = q.requires_grad_(), kv.requires_grad_()
    expected = torch.autograd.grad(function(q, kv, *layout).square().sum(), leaves)
    alone = torch.autograd.grad(function(q, kv.detach(), *layout).square().sum(), q)
    torch.testing.assert_close(alone, expected[:1], rtol=0, atol=0)
    alone = torch.autograd.grad(function(q.detach(), kv, *layout).square().sum(), kv)
    torch.testing.assert_close(alone, expected[1:], rtol=0, atol=0)
