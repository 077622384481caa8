"""eager.py: a repeated call goes past the dispatcher, unless anything there would want to see it."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn_plus
from flash_attn_plus import cpu, eager, library
from flash_attn_plus import memory as memory_module
from flash_attn_plus.schemas import Variant

OFFSETS = torch.tensor([0, 3, 8], dtype=torch.int32)


dtype_of_inputs = torch.float32


@pytest.fixture(autouse=True, params=[torch.float32, torch.bfloat16], ids=str)
def _dtype(request, monkeypatch) -> None:
    """Every test of this file: in float32 the quickest way, past what latest calls were like, is closed."""
    monkeypatch.setitem(globals(), "dtype_of_inputs", request.param)


def inputs(requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(1, 8, 2, 16, generator=generator).to(dtype_of_inputs) for _ in range(3))
    return tuple(x.requires_grad_(requires_grad) for x in tensors)


def dense(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return flash_attn_plus.flash_attn_func(q, k, v, causal=True, **options)


def packed(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    q, k, v = (x.squeeze(0) for x in (q, k, v))
    return flash_attn_plus.flash_attn_varlen_func(q, k, v, OFFSETS, OFFSETS, 5, 5, causal=True, **options).unsqueeze(0)


def recalled(q: Tensor, k: Tensor, v: Tensor) -> bool:
    memory, args = library.memory_of("fwd"), (q, k, v, Variant(causal=True))
    return (memory.latest_like(args) or memory.recall(args)) is not None


class Spy:
    """Stands for an operator and counts the calls that go to it."""

    def __init__(self, op) -> None:
        self.op, self.calls = op, 0

    def __call__(self, *args):
        self.calls += 1
        return self.op(*args)


@pytest.fixture(autouse=True)
def crossings(monkeypatch) -> Spy:
    spy = Spy(eager._fwd.op)
    monkeypatch.setattr(eager._fwd, "op", spy)
    for memory in library._memories.values():
        memory.clear()
    return spy


@pytest.fixture
def kernels(monkeypatch) -> list[str]:
    """The directions of the kernels that run; none of them may run under autocast."""
    ran = []

    def watch(name: str, direction: str) -> None:
        kernel = getattr(cpu, name)

        def watched(*args):
            assert not torch.is_autocast_enabled("cpu")
            ran.append(direction)
            return kernel(*args)

        monkeypatch.setattr(cpu, name, watched)

    for prefix, direction in itertools.product(("", "varlen_"), ("forward", "backward")):
        watch(f"{prefix}{direction}", direction)
    return ran


def test_the_second_call_goes_past_the_dispatcher(crossings):
    x = inputs()
    first = dense(*x)
    assert crossings.calls == 1
    assert torch.equal(dense(*x), first)
    assert torch.equal(dense(*inputs()), first)  # other tensors of the same signature
    assert crossings.calls == 1
    dense(*x, softcap=2.0)
    assert crossings.calls == 2


def test_packed(monkeypatch):
    spy = Spy(eager._varlen_fwd.op)
    monkeypatch.setattr(eager._varlen_fwd, "op", spy)
    x = inputs()
    assert torch.equal(packed(*x), packed(*x))
    assert spy.calls == 1


def test_results_are_those_of_the_operator():
    x = inputs()
    for _ in range(2):
        out, lse = flash_attn_plus.flash_attn_func(*x, return_lse=True)
    expected = torch.ops.flash_attn_plus.fwd(*x)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("_dtype", [torch.bfloat16], indirect=True, ids=str)
class TestTheQuickestWay:
    """From the third call of a kind on, no signature is made; the second one's guards tell."""

    @staticmethod
    def check(function, tensors: tuple[Tensor, ...], monkeypatch) -> None:
        """The same results and gradients in every call, and who made signatures."""
        made, original = [], memory_module.signature
        counted = lambda args: (made.append(1), original(args))[1]  # noqa: E731
        monkeypatch.setattr(memory_module, "signature", counted)
        monkeypatch.setattr(library, "signature", counted)
        results = []
        for _ in range(4):
            made.clear()
            out = function(*tensors)
            grads = torch.autograd.grad(out.float().square().sum(), [x for x in tensors if x.requires_grad])
            results.append((out, *grads))
        assert not made
        for result in results:
            assert all(map(torch.equal, result, results[0]))

    @pytest.mark.parametrize("function", [dense, packed])
    def test_has_no_signatures(self, function, monkeypatch):
        self.check(function, inputs(requires_grad=True), monkeypatch)

    @pytest.mark.parametrize("function", [dense, packed])
    def test_with_tensors_among_the_options(self, function, monkeypatch):
        """Several: each goes to its own place."""
        bias, sink = torch.randn(1, 2, 8, 8), torch.randn(2)
        slopes = torch.tensor([0.5, 0.25])

        def attention(q, k, v, bias, sink):
            return function(q, k, v, attn_bias=bias, sink=sink, alibi_slopes=slopes)

        if function is packed:
            bias = bias[..., :5, :5].contiguous()
        self.check(attention, (*inputs(requires_grad=True), bias.requires_grad_(), sink.requires_grad_()), monkeypatch)

    @pytest.mark.parametrize("kv", [False, True])
    def test_of_joint_inputs(self, kv, monkeypatch):
        """One gradient of one tensor, written by the backward, in every call."""
        q, k, v = (x.clone() for x in inputs())
        if kv:
            tensors, function = (q, torch.stack((k, v), 2)), flash_attn_plus.flash_attn_kvpacked_func
        else:
            tensors, function = (torch.stack((q, k, v), 2),), flash_attn_plus.flash_attn_qkvpacked_func
        tensors = tuple(x.requires_grad_() for x in tensors)
        self.check(function, tensors, monkeypatch)
        out = function(*tensors)
        assert out.grad_fn.next_functions[-len(tensors)][0].variable is tensors[0]  # not a view of it
        # Where it may not be joint it is not.
        monkeypatch.setattr(eager, "_may_be_joint", lambda joint: False)
        out = function(*tensors)
        assert "Unbind" in str(out.grad_fn.next_functions)

    def test_records_nothing_where_the_operator_would_not(self):
        """Inference tensors look like others below autograd."""

        def tensors(inference: bool) -> tuple[Tensor, ...]:
            with torch.inference_mode(inference):
                return tuple(x.clone().requires_grad_() for x in inputs())

        dense(*tensors(False))
        for _ in range(3):
            assert not dense(*tensors(True)).requires_grad
            with torch._C._AutoDispatchBelowAutograd():
                assert not dense(*tensors(False)).requires_grad
            assert dense(*tensors(False)).requires_grad
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
                dense(tensors(True)[0], *tensors(False)[1:])


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_without_gradients(context, crossings):
    x = inputs()
    dense(*x)
    with context():
        out = dense(*x)
    assert crossings.calls == 1
    assert out.is_inference() == (context is torch.inference_mode)


def test_inputs_that_require_no_gradient_in_this_call(crossings):
    x = inputs(requires_grad=True)
    dense(*x)
    with torch.no_grad():
        dense(*x)
    assert crossings.calls == 1


class TestGradients:
    """A repeated training step meets the dispatcher neither forward nor backward."""

    @staticmethod
    def step(function=dense, dtype: torch.dtype | None = None, **grad_options) -> tuple[Tensor, ...]:
        x = tuple(x.to(dtype or x.dtype).requires_grad_() for x in inputs())
        return torch.autograd.grad(function(*x).float().square().sum(), x, **grad_options)

    @pytest.mark.parametrize("function", [dense, packed])
    def test_go_past_the_dispatcher_too(self, function, kernels, monkeypatch):
        first = self.step(function)
        assert set(kernels) == {"forward", "backward"}  # of packed sequences: of each run of equal lengths too
        ran = list(kernels)
        way = eager._fwd if function is dense else eager._varlen_fwd
        for part in (way, way.way.backward):
            monkeypatch.setattr(part, "op", None)
        assert all(map(torch.equal, first, self.step(function)))
        assert kernels == ran * 2

    def test_under_autocast_that_casts_nothing(self, crossings, kernels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = self.step(dtype=torch.bfloat16)
            crossings.calls = 0
            for _ in range(3):
                assert all(map(torch.equal, self.step(dtype=torch.bfloat16), expected))
        assert crossings.calls == 0

    def test_none_are_recorded_where_autograd_is_excluded(self):
        """Inside a custom operator, whose own gradient is recorded: in every call, not only in the first."""
        k, v = (x.detach().requires_grad_() for x in inputs()[1:])

        @torch.library.custom_op("flash_attn_plus_test::attention", mutates_args=())
        def attention(q: Tensor) -> Tensor:
            return dense(q, k, v)

        for _ in range(3):
            assert not attention(inputs()[0]).requires_grad
            with torch._C._AutoDispatchBelowAutograd():
                assert not dense(inputs()[0], k, v).requires_grad
        assert dense(inputs()[0], k, v).requires_grad

    def test_compiled_autograd(self):
        x = inputs(requires_grad=True)
        for _ in range(4):
            expected = torch.autograd.grad(dense(*x).square().sum(), x)
        seen = set()

        def backend(module, _):
            seen.update(node.target for node in module.graph.nodes)
            return module.forward

        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
            dense(*x).square().sum().backward()
        assert torch.ops.flash_attn_plus.bwd.default in seen
        torch.testing.assert_close(tuple(tensor.grad for tensor in x), expected)

    def test_create_graph_keeps_history(self):
        for _ in range(2):
            grads = self.step(create_graph=True)
        with pytest.raises(NotImplementedError, match="double backward"):
            grads[0].sum().backward()

    def test_in_place_changes_are_noticed(self):
        for _ in range(2):
            q, k, v = (x * 1.0 for x in inputs(requires_grad=True))
            out = dense(q, k, v)
            with torch.no_grad():
                k.zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()

    def test_slopes_that_require_a_gradient_raise(self):
        slopes = torch.zeros(2)
        dense(*inputs(), alibi_slopes=slopes)
        for requires_grad in (False, True):
            slopes.requires_grad_(requires_grad)
            with pytest.raises(NotImplementedError) if requires_grad else contextlib.nullcontext():
                dense(*inputs(requires_grad=True), alibi_slopes=slopes)

    def test_only_one_of_three_inputs(self):
        for _ in range(2):
            q, k, v = inputs()
            out, lse = flash_attn_plus.flash_attn_func(q, k.requires_grad_(), v, return_lse=True)
            lse.sum().backward()
        expected = k.grad.clone()
        q, k, v = (x.detach() for x in (q, k, v))
        torch.ops.flash_attn_plus.fwd(q, k.requires_grad_(), v)[1].sum().backward()
        assert torch.equal(k.grad, expected) and out.grad_fn is not None

    def test_the_profiler_sees_both(self):
        for _ in range(4):
            self.step()
        for _ in range(2):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                self.step()
            names = {event.key for event in profile.key_averages()}
            assert {"flash_attn_plus::fwd", "flash_attn_plus::bwd"} <= names

    def test_the_profiler_sees_the_backward_alone(self):
        for _ in range(4):
            self.step()
        x = inputs(requires_grad=True)
        out = dense(*x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out.float().sum().backward()
        assert "flash_attn_plus::bwd" in {event.key for event in profile.key_averages()}


class Sees(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class TestWhoeverListensIsAsked:
    """The signature is remembered in each of these tests before the call that matters."""

    @pytest.fixture(autouse=True)
    def remembered(self, crossings) -> None:
        for _ in range(3):
            dense(*inputs())
        assert crossings.calls == 1
        memory = library.memory_of("fwd")
        assert bool(memory.recent.latest) == (memory_module._GUARDS is not None and dtype_of_inputs != torch.float32)

    @pytest.mark.parametrize("option", ["sink", "attn_bias"])
    def test_gradients_of_options(self, option):
        shape = (2,) if option == "sink" else (1, 2, 8, 8)
        values = torch.zeros(shape)
        for _ in range(2):
            dense(*inputs(), **{option: values})
        values = values.clone().requires_grad_()
        dense(*inputs(), **{option: values}).square().sum().backward()
        assert values.grad.abs().sum() > 0

    @pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad])
    def test_forward_mode(self, context, crossings):
        with context(), torch.autograd.forward_ad.dual_level():
            q, k, v = inputs()
            q = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                dense(q, k, v)
        assert crossings.calls == 2

    def test_autocast_that_casts(self, crossings):
        other = torch.bfloat16 if dtype_of_inputs == torch.float32 else torch.float16
        for dtype in (dtype_of_inputs, other):  # autocast that casts nothing may be remembered
            with torch.autocast("cpu", dtype=dtype):
                for _ in range(3):
                    crossings.calls = 0
                    assert dense(*inputs()).dtype == dtype
        assert crossings.calls == 1

    def test_mps_which_has_an_autocast_of_its_own(self):
        assert eager._only_gradients(SimpleNamespace(is_mps=False))
        assert not eager._only_gradients(SimpleNamespace(is_mps=True))

    def test_a_mode(self):
        with Sees() as mode:
            dense(*inputs())
        assert torch.ops.flash_attn_plus.fwd.default in mode.seen

    @pytest.mark.parametrize("pre_dispatch", [False, True])
    def test_a_tracer(self, pre_dispatch):
        graph = make_fx(lambda q, k, v: dense(q, k, v), pre_dispatch=pre_dispatch)(*inputs()).graph
        assert torch.ops.flash_attn_plus.fwd.default in {node.target for node in graph.nodes}

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_the_tracer_of_torchscript(self):
        traced = torch.jit.trace(dense, inputs(), check_trace=False)
        assert "flash_attn_plus::fwd" in str(traced.graph)

    @pytest.mark.parametrize("everywhere", [False, True])
    def test_the_profiler(self, everywhere):
        config = torch._C._profiler._ExperimentalConfig(profile_all_threads=everywhere)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, experimental_config=config) as profile:
            if not everywhere:  # this thread knows by itself
                torch.autograd.profiler._is_profiler_enabled = False
            dense(*inputs())
        assert "flash_attn_plus::fwd" in {event.key for event in profile.key_averages()}

    def test_transforms(self):
        q, k, v = inputs()
        mapped = torch.vmap(dense)(*(torch.stack([x, 2 * x]) for x in (q, k, v)))
        torch.testing.assert_close(mapped[0], dense(q, k, v))
        (gradient,) = torch.func.grad(lambda *x: dense(*x).square().sum(), argnums=(0,))(q, k, v)
        assert gradient.abs().sum() > 0

    def test_compile(self):
        graphs = []

        def backend(module, _):
            graphs.append(module.graph)
            return module.forward

        torch.compile(dense, backend=backend, fullgraph=True)(*inputs())
        assert torch.ops.flash_attn_plus.fwd.default in {node.target for node in graphs[0].nodes}


class TestTensorsThatAreNotWhatTheyLookLike:
    """Shape, strides, dtype and device of a tensor whose signature is remembered, and yet other values."""

    @pytest.fixture(autouse=True)
    def remembered(self) -> None:
        for _ in range(3):
            dense(*inputs())

    def test_a_negative_bit(self):
        q, k, v = inputs()
        negative = torch._neg_view(q)
        assert negative.is_neg() and torch.equal(negative.resolve_neg(), -q)
        assert recalled(q, k, v) and not recalled(negative, k, v)
        assert torch.equal(dense(negative, k, v), dense(-q, k, v))

    def test_a_zero_without_memory(self):
        q, k, v = inputs()
        zero = torch._efficientzerotensor(q.shape, dtype=q.dtype)
        assert not recalled(zero, k, v)
        torch.testing.assert_close(dense(zero, k, v), dense(torch.zeros_like(q), k, v))

    def test_a_wrapper(self):
        q, k, v = inputs()
        wrapped = torch._to_functional_tensor(q)
        assert not recalled(wrapped, k, v)

    def test_a_class_with_torch_dispatch(self):
        class Negated(Tensor):
            """Its values are the negatives of what lies in memory."""

            __torch_function__ = torch._C._disabled_torch_function_impl

            @staticmethod
            def __new__(cls, x):
                negated = Tensor._make_subclass(cls, x)
                negated.plain = x
                return negated

            @classmethod
            def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                return func(*(-x.plain if isinstance(x, cls) else x for x in args), **(kwargs or {}))

        q, k, v = inputs()
        assert not recalled(Negated(q), k, v)
        with torch.no_grad():
            assert torch.equal(dense(Negated(q), k, v), dense(-q, k, v))

    def test_a_parameter_is_a_plain_tensor(self, crossings):
        q, k, v = inputs()
        before = crossings.calls
        with torch.no_grad():
            dense(torch.nn.Parameter(q), k, v)
        assert crossings.calls == before

    def test_numbers_that_the_dispatcher_converts(self):
        import numpy

        q, k, v = inputs()
        expected = dense(q, k, v, softmax_scale=0.5)
        for scale in (numpy.float64(0.5), torch.tensor(0.5)):
            for _ in range(2):
                assert torch.equal(dense(q, k, v, softmax_scale=scale), expected)


def test_lengths_are_integers_every_time():
    q, k, v = (x[0] for x in inputs())
    for length in (8, 8, 8.0):
        with contextlib.nullcontext() if length.__class__ is int else pytest.raises(RuntimeError, match="int"):
            flash_attn_plus.flash_attn_varlen_func(q, k, v, OFFSETS, OFFSETS, length, 8)


def test_integers_for_floats_are_converted_every_time():
    x = inputs()
    for scale in (2.0**64, 2**64, 2.0**64, 2**64):
        assert dense(*x, softmax_scale=scale, softcap=1.0).isfinite().all()


def test_results_are_no_views():
    """A view that was made under no_grad could not be changed in place."""
    q, k, v = (x[:, :, :1].double() for x in inputs())
    with torch.no_grad():
        for _ in range(2):
            results = flash_attn_plus.flash_attn_func(q, k, v, return_lse=True)
    assert not any(x._is_view() for x in results)


def test_errors_are_raised_again():
    q, k, v = inputs()
    for _ in range(3):
        with pytest.raises(ValueError, match="softcap"):
            dense(q, k, v, softcap=-1.0)
