"""FX: a public function is one node of a symbolic trace, an operator one node of a ``make_fx`` trace."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from graphs import GPT, PUBLIC_NAMES, clones, first, inputs, offsets, operator_nodes, public_calls
from torch import Tensor
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import flash_attn_plus as fap


def with_arguments(count: int, function: Callable) -> Callable:
    """``function`` with ``count`` named arguments: a symbolic trace has one placeholder for each."""
    names = ", ".join(f"x{i}" for i in range(count))
    return eval(f"lambda {names}: function({names})", {"function": function})


def calls_of(graph_module: GraphModule, function: Callable) -> int:
    return len(graph_module.graph.find_nodes(op="call_function", target=function))


class TestSymbolicTrace:
    @pytest.mark.parametrize("name", PUBLIC_NAMES)
    def test_a_public_function_is_one_node(self, name: str) -> None:
        call = public_calls()[name]
        traced = symbolic_trace(with_arguments(len(call.tensors), lambda x, *rest: call.run(x * 0.5, *rest)))
        assert calls_of(traced, call.function) == 1
        assert len(traced.graph.nodes) == len(call.tensors) + 3  # the product, the call and the output

        expected = call.run(call.tensors[0] * 0.5, *call.tensors[1:])
        torch.testing.assert_close(traced(*call.tensors), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("name", PUBLIC_NAMES)
    def test_traces_are_pickled_by_the_function_s_name(self, name: str) -> None:
        call = public_calls()[name]
        traced = symbolic_trace(with_arguments(len(call.tensors), call.run))
        again = pickle.loads(pickle.dumps(traced))
        assert calls_of(again, call.function) == 1
        torch.testing.assert_close(again(*call.tensors), call.run(*call.tensors), rtol=0, atol=0)

    def test_a_model_has_one_node_per_attention_call(self) -> None:
        class Model(GPT):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x, window_size=(5, 0))

        model, x = Model(), inputs(2, 11, 32)
        traced = symbolic_trace(model)
        assert calls_of(traced, fap.flash_attn_func) == 2
        for node in traced.graph.find_nodes(op="call_function", target=fap.flash_attn_func):
            assert node.kwargs["window_size"] == (5, 0)
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)

    def test_arguments_by_name_and_traced_lengths(self) -> None:
        """Everything but one tensor may be a proxy, in whatever place."""

        def attend(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, left: int) -> Tensor:
            return fap.flash_attn_varlen_qkvpacked_func(
                qkv=qkv, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, window_size=(left, 0)
            )

        traced = symbolic_trace(attend)
        assert calls_of(traced, fap.flash_attn_varlen_qkvpacked_func) == 1
        arguments = inputs(14, 3, 2, 8), offsets(5, 0, 9), 9, 4
        torch.testing.assert_close(traced(*arguments), attend(*arguments), rtol=0, atol=0)

    def test_traces_are_differentiable(self) -> None:
        traced = symbolic_trace(lambda q, k, v: fap.flash_attn_func(q, k, v, causal=True))
        tensors = public_calls(requires_grad=True)["flash_attn_func"].tensors
        copies = clones(tensors)
        traced(*tensors).square().sum().backward()
        fap.flash_attn_func(*copies, causal=True).square().sum().backward()
        for tensor, copy in zip(tensors, copies, strict=True):
            torch.testing.assert_close(tensor.grad, copy.grad, rtol=0, atol=0)


class TestTorchFunction:
    """The protocol that makes the nodes: tensor subclasses and modes see the public function, once."""

    @pytest.mark.parametrize("name", PUBLIC_NAMES)
    def test_a_subclass_takes_the_call(self, name: str) -> None:
        seen = []

        class Logged(Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                seen.append(function)
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args, **(kwargs or {}))

        call = public_calls()[name]
        last = len(call.tensors) - 1
        result = call.run(*call.tensors[:last], call.tensors[last].as_subclass(Logged))
        assert seen == [call.function]
        torch.testing.assert_close(first(result), first(call.run(*call.tensors)), rtol=0, atol=0)

    @pytest.mark.parametrize("name", PUBLIC_NAMES)
    def test_a_mode_takes_the_call(self, name: str) -> None:
        seen = []

        class Log(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        call = public_calls()[name]
        with Log():
            result = call.run(*call.tensors)
        assert seen == [call.function]
        torch.testing.assert_close(first(result), first(call.run(*call.tensors)), rtol=0, atol=0)


class TestMakeFx:
    @pytest.mark.parametrize("options", [{}, {"tracing_mode": "symbolic"}, {"pre_dispatch": True}], ids=str)
    @pytest.mark.parametrize("name", PUBLIC_NAMES)
    def test_an_operator_is_one_node(self, name: str, options: dict) -> None:
        call = public_calls()[name]
        traced = make_fx(call.run, **options)(*call.tensors)
        assert operator_nodes(traced) == Counter({call.operator: 1})
        torch.testing.assert_close(traced(*call.tensors), call.run(*call.tensors), rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
    def test_a_gradient_is_one_node_more(self, name: str) -> None:
        call = public_calls(requires_grad=True)[name]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(call.run(*tensors).square().sum(), tensors[:3])

        traced = make_fx(gradients)(*call.tensors)
        assert operator_nodes(traced) == Counter({call.operator: 1, call.operator.replace("fwd", "bwd"): 1})
        torch.testing.assert_close(traced(*call.tensors), gradients(*call.tensors), rtol=0, atol=0)

    def test_the_random_state_of_dropout_is_drawn_in_the_trace(self) -> None:
        """Not a constant: every run of the traced program drops others, and a seed reproduces them."""
        q, k, v = public_calls()["flash_attn_func"].tensors
        traced = make_fx(lambda q, k, v: fap.flash_attn_func(q, k, v, dropout_p=0.4))(q, k, v)
        assert operator_nodes(traced) == Counter({"fwd": 1})
        torch.manual_seed(1)
        one, two = traced(q, k, v), traced(q, k, v)
        torch.manual_seed(1)
        assert torch.equal(traced(q, k, v), one)
        assert not torch.equal(one, two)
        torch.manual_seed(1)
        assert torch.equal(fap.flash_attn_func(q, k, v, dropout_p=0.4), one)
