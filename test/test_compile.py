"""torch.compile: one node per attention call in each direction, no graph breaks, few compiles over many sizes.

All tests but one stop at the graphs that AOTAutograd makes: Inductor gets the same ones, and its C++ builds are slow.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from graphs import (
    GPT,
    PUBLIC_NAMES,
    Attention,
    Block,
    first,
    inputs,
    offsets,
    operator_nodes,
    output_and_gradients,
    public_calls,
)
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flash_attn_plus as fap
from flash_attn_plus import library

FWD, BWD = library.overload("fwd"), library.overload("bwd")
COMPILE_ERRORS = torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A function compiled whole (a graph break is an error), and the graphs that it became."""

    def __init__(self, function: Callable) -> None:
        self.graphs = AotEagerAndRecordGraphs()
        self.run = torch.compile(function, backend=self.graphs, fullgraph=True, dynamic=True)

    def __call__(self, *args, **options):
        return self.run(*args, **options)

    @property
    def compiles(self) -> int:
        """Those that came to an end: Dynamo starts over where it first takes a float option for symbolic."""
        return len(self.graphs.fw_graphs)

    def nodes(self) -> list[Counter[str]]:
        """The operators in the forward graph, and in the backward graph where there is one."""
        return [operator_nodes(graph) for graph in (*self.graphs.fw_graphs, *self.graphs.bw_graphs)]


def close(actual: object, expected: object) -> None:
    """Up to the order of sums in what stands around the operators, which AOTAutograd decomposes."""
    torch.testing.assert_close(actual, expected)


class TestModel:
    def test_one_node_per_attention_call_in_each_direction(self) -> None:
        model, x = GPT(), inputs(2, 11, 32)
        compiled, parameters = Compiled(model), tuple(model.parameters())
        close(output_and_gradients(compiled, parameters, x), output_and_gradients(model, parameters, x))
        assert compiled.nodes() == [Counter({"fwd": 2}), Counter({"bwd": 2})]

    def test_packed_sequences_are_one_node_per_call_in_each_direction(self) -> None:
        model, x, cu_seqlens = Block(fap.flash_attn_varlen_func), inputs(14, 32), offsets(5, 0, 9)
        compiled, parameters = Compiled(model), tuple(model.parameters())
        layout = x, cu_seqlens, cu_seqlens, 9, 9
        close(output_and_gradients(compiled, parameters, *layout), output_and_gradients(model, parameters, *layout))
        assert compiled.nodes() == [Counter({"varlen_fwd": 1}), Counter({"varlen_bwd": 1})]

    def test_autocast(self) -> None:
        """The casts are part of the graph; the backward runs in the autocast region too, and computes as outside."""
        attend, (q, k, v) = partial(fap.flash_attn_func, causal=True), (inputs(2, 9, 2, 16) for _ in range(3))
        sink = inputs(2, requires_grad=True)
        compiled = Compiled(attend)
        q.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            actual = output_and_gradients(compiled, (q, sink), q, k, v, sink=sink)
            expected = output_and_gradients(attend, (q, sink), q, k, v, sink=sink)
        assert actual[0].dtype == torch.bfloat16
        assert [gradient.dtype for gradient in actual[1:]] == [torch.float32, torch.float32]
        close(actual, expected)
        assert compiled.nodes() == [Counter({"fwd": 1}), Counter({"bwd": 1})]

    @pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler for a CPU")
    @pytest.mark.no_poison
    def test_inductor(self) -> None:
        """Inductor's code asserts the strides that the fakes promise, of results and of gradients."""

        def attend(qkv: Tensor) -> Tensor:
            out, lse = fap.flash_attn_qkvpacked_func(qkv * 0.5, causal=True, return_lse=True)
            return out.sigmoid() + lse.transpose(1, 2).unsqueeze(-1)

        qkv = inputs(2, 11, 3, 2, 8, requires_grad=True)
        compiled = torch.compile(attend, fullgraph=True, dynamic=True)
        close(output_and_gradients(compiled, (qkv,), qkv), output_and_gradients(attend, (qkv,), qkv))


class TestPublicFunctions:
    @pytest.mark.parametrize("name", PUBLIC_NAMES)
    def test_no_graph_break_and_one_node(self, name: str) -> None:
        call = public_calls(requires_grad=True)[name]
        leaves = [tensor for tensor in call.tensors if tensor.requires_grad]

        def run(*tensors: Tensor) -> Tensor:
            return first(call.run(*tensors))

        compiled = Compiled(run)
        close(output_and_gradients(compiled, leaves, *call.tensors), output_and_gradients(run, leaves, *call.tensors))
        forward, backward = compiled.nodes()
        assert forward == Counter({call.operator: 1})
        # States are merged, and their gradients computed, by plain PyTorch, which the compiler may fuse.
        expected = Counter({call.operator.replace("fwd", "bwd"): 1} if "fwd" in call.operator else {})
        assert backward == expected

    @pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
    def test_without_gradients(self, name: str) -> None:
        call = public_calls()[name]
        compiled = Compiled(call.run)
        close(compiled(*call.tensors), call.run(*call.tensors))
        assert compiled.nodes() == [Counter({call.operator: 1})]

    def test_every_option_at_once(self) -> None:
        q, k, v = (inputs(2, 9, 2, 16, requires_grad=True) for _ in range(3))
        bias, sink = inputs(2, 9, 9, requires_grad=True), inputs(2, requires_grad=True)
        slopes = torch.tensor([0.5, 0.25])
        leaves = q, k, v, bias, sink

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = fap.flash_attn_func(
                *(q, k, v, 0.0, 0.3, True, (5, 2), 4.0, slopes), attn_bias=bias, sink=sink, return_lse=True
            )
            return out + lse.transpose(1, 2).unsqueeze(-1)

        compiled = Compiled(attend)
        close(output_and_gradients(compiled, leaves, q, k, v), output_and_gradients(attend, leaves, q, k, v))
        assert compiled.nodes() == [Counter({"fwd": 1}), Counter({"bwd": 1})]

    def test_attention_probabilities(self) -> None:
        """The test-only third result is plain PyTorch beside the node."""
        q, k, v = (inputs(1, 9, 1, 8) for _ in range(3))
        attend = partial(fap.flash_attn_func, dropout_p=0.3, return_attn_probs=True)
        compiled = torch.compile(attend, backend="eager", fullgraph=True)
        torch.manual_seed(5)
        actual = compiled(q, k, v)
        torch.manual_seed(5)
        close(actual, attend(q, k, v))


class TestFewCompiles:
    """Sizes, windows and longest lengths are symbolic. One compile serves them; 0 and 1 may cost a second."""

    def test_batch_and_length(self) -> None:
        model = Block()
        compiled, parameters = Compiled(model), tuple(model.parameters())
        for batch, seqlen in ((2, 11), (3, 11), (2, 64), (5, 7), (4, 130)):
            x = inputs(batch, seqlen, 32)
            close(output_and_gradients(compiled, parameters, x), output_and_gradients(model, parameters, x))
        assert compiled.compiles <= 2

    def test_lengths_of_queries_and_keys(self) -> None:
        attend = partial(fap.flash_attn_func, causal=True)
        compiled = Compiled(attend)
        for seqlen_q, seqlen_k in ((4, 9), (9, 4), (17, 17), (5, 40), (33, 7)):
            q, k, v = inputs(2, seqlen_q, 2, 8), inputs(2, seqlen_k, 2, 8), inputs(2, seqlen_k, 2, 8)
            close(compiled(q, k, v), attend(q, k, v))
        assert compiled.compiles <= 2

    def test_windows(self) -> None:
        q, k, v = (inputs(2, 30, 2, 8) for _ in range(3))
        attend = lambda left, right: fap.flash_attn_func(q, k, v, window_size=(left, right))  # noqa: E731
        compiled = Compiled(attend)
        for window in ((4, 5), (7, 2), (3, 9), (12, 4), (29, 28), (6, 6)):
            close(compiled(*window), attend(*window))
        assert compiled.compiles <= 2

    def test_diagonals(self) -> None:
        q, k, v = (inputs(2, 30, 2, 8) for _ in range(3))
        attend = lambda diagonal: FWD(q, k, v, causal=True, diagonal=diagonal)[0]  # noqa: E731
        compiled = Compiled(attend)
        for diagonal in (4, 9, 17, 3, 25, 8):
            close(compiled(diagonal), attend(diagonal))
        assert compiled.compiles <= 2

    def test_longest_lengths_and_total(self) -> None:
        model = Attention(fap.flash_attn_varlen_func)
        compiled, parameters = Compiled(model), tuple(model.parameters())
        for lengths in ((5, 3, 9), (7, 7, 2), (20, 4), (3, 2, 8, 30), (12, 0, 5)):
            cu_seqlens, longest = offsets(*lengths), max(lengths)
            layout = inputs(sum(lengths), 32), cu_seqlens, cu_seqlens, longest, longest
            close(output_and_gradients(compiled, parameters, *layout), output_and_gradients(model, parameters, *layout))
        assert compiled.compiles <= 2

    def test_options_that_broadcast(self) -> None:
        """Guards on a bias' axes being 1 or full must not pin the sizes."""

        def attend(q: Tensor, bias: Tensor) -> Tensor:
            return fap.flash_attn_func(q, q, q, attn_bias=bias)

        compiled = Compiled(attend)
        for batch, seqlen in ((2, 11), (3, 19), (5, 7), (4, 30)):
            q, bias = inputs(batch, seqlen, 2, 8), inputs(batch, 1, 1, seqlen)
            close(compiled(q, bias), attend(q, bias))
        assert compiled.compiles <= 2


class TestDropout:
    def test_reproduced_by_the_seed(self) -> None:
        """The random state is drawn in the graph, as eager mode draws it, so the same seed drops the same weights."""
        model, x = Attention(), inputs(2, 11, 32)
        compiled, parameters = Compiled(model), tuple(model.parameters())

        def run(function: Callable, seed: int) -> tuple[Tensor, ...]:
            torch.manual_seed(seed)
            return output_and_gradients(function, parameters, x, dropout_p=0.3)

        one = run(compiled, 1)
        assert all(map(torch.equal, one, run(compiled, 1)))
        assert not torch.equal(one[0], run(compiled, 2)[0])
        close(one, run(model, 1))
        assert compiled.nodes() == [Counter({"fwd": 1}), Counter({"bwd": 1})]

    def test_every_call_drops_others(self) -> None:
        q, k, v = (inputs(2, 9, 2, 8) for _ in range(3))
        compiled = Compiled(partial(fap.flash_attn_func, dropout_p=0.5))
        assert not torch.equal(compiled(q, k, v), compiled(q, k, v))


class TestErrors:
    """The sentence stands in the message that the compiler wraps around it, and is the one of eager mode."""

    @staticmethod
    def arguments(**changed: Tensor) -> dict[str, Tensor]:
        return {name: inputs(2, 9, 2, 8) for name in ("q", "k", "v")} | changed

    @pytest.mark.parametrize(
        "changed, options",
        [
            ({"k": torch.zeros(2, 9, 2, 16)}, {}),
            ({"v": torch.zeros(2, 9, 2, 8, dtype=torch.float64)}, {}),
            ({"k": torch.zeros(2, 9, 3, 8), "v": torch.zeros(2, 9, 3, 8)}, {}),
            ({"q": torch.zeros(9, 2, 8)}, {}),
            ({}, {"attn_bias": torch.zeros(2, 9, 8)}),
            ({}, {"sink": torch.zeros(3)}),
            ({}, {"softcap": -1.0}),
            ({}, {"dropout_p": 1.0}),
            ({}, {"return_lse": True, "return_attn_probs": True}),
            ({}, {"window_size": (1, 2, 3)}),
        ],
        ids=["head_dim", "dtype", "heads", "dims", "bias", "sink", "softcap", "dropout_p", "returns", "window_size"],
    )
    def test_the_sentence_of_eager_mode(self, changed: dict, options: dict) -> None:
        arguments = self.arguments(**changed)
        attend = partial(fap.flash_attn_func, **options)
        with pytest.raises((ValueError, TypeError)) as eager:
            attend(**arguments)
        with pytest.raises(COMPILE_ERRORS) as compiled:
            torch.compile(attend, backend="eager", fullgraph=True)(**arguments)
        assert str(eager.value) in str(compiled.value)

    def test_packed_sequences(self) -> None:
        q, cu_seqlens = inputs(14, 2, 8), offsets(5, 9).long()
        attend = lambda q, cu: fap.flash_attn_varlen_func(q, q, q, cu, cu, 9, 9)  # noqa: E731
        with pytest.raises(COMPILE_ERRORS, match=r"cu_seqlens_q: expected dtype torch\.int32, got torch\.int64"):
            torch.compile(attend, backend="eager", fullgraph=True)(q, cu_seqlens)


def save_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    """Keep the results of attention, recompute what is cheap."""
    return CheckpointPolicy.MUST_SAVE if op is FWD else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = {"context_fn": partial(create_selective_checkpoint_contexts, save_attention)}


class TestCheckpoint:
    """Activation checkpointing replays the random state, so recomputed attention drops the same weights."""

    @staticmethod
    def run(function: Callable, module: Attention, x: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        return output_and_gradients(function, tuple(module.parameters()), x)

    @pytest.mark.parametrize("options", [{}, SELECTIVE], ids=["whole", "selective"])
    def test_same_gradients_in_eager_mode(self, options: dict) -> None:
        module, x = Attention(), inputs(2, 11, 32, requires_grad=True)
        plain = partial(module, dropout_p=0.3)
        checkpointed = partial(checkpoint, plain, use_reentrant=False, **options)
        close(self.run(checkpointed, module, x), self.run(plain, module, x))

    @pytest.mark.parametrize("options, recomputed", [({}, 1), (SELECTIVE, 0)], ids=["whole", "selective"])
    def test_same_gradients_compiled(self, options: dict, recomputed: int) -> None:
        """A policy that saves attention knows it by the operator: its forward does not run a second time."""
        module, x = Attention(), inputs(2, 11, 32, requires_grad=True)
        plain = partial(module, dropout_p=0.3)
        compiled = Compiled(lambda x: checkpoint(plain, x, use_reentrant=False, **options))
        close(self.run(compiled, module, x), self.run(plain, module, x))
        forward, backward = compiled.nodes()
        assert forward == Counter({"fwd": 1})
        assert backward == Counter({"fwd": recomputed, "bwd": 1})
