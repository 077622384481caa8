"""Graphs with attention in them, and what counts its nodes: shared by the tests of compile, FX and export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_attn_plus as fap
from flash_attn_plus.schemas import NAMESPACE


class Attention(nn.Module):
    """Causal grouped-query attention: x (batch, seqlen, width), or (total, width) beside offsets."""

    def __init__(self, attend: Callable = fap.flash_attn_func, width: int = 32, heads: int = 4, heads_k: int = 2):
        super().__init__()
        self.attend, self.heads, self.heads_k = attend, heads, heads_k
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, (heads + 2 * heads_k) * self.head_dim)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor, *layout: Any, **options: Any) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.heads, self.heads_k, self.heads_k), dim=-2)
        return self.project(self.attend(q, k, v, *layout, **{"causal": True, **options}).flatten(-2))


class Block(nn.Module):
    """A pre-norm GPT block."""

    def __init__(self, attend: Callable = fap.flash_attn_func, width: int = 32) -> None:
        super().__init__()
        self.attention = Attention(attend, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *layout: Any, **options: Any) -> Tensor:
        x = x + self.attention(self.norm1(x), *layout, **options)
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class GPT(nn.Module):
    """Two blocks: two attention calls."""

    def __init__(self, attend: Callable = fap.flash_attn_func) -> None:
        super().__init__()
        self.blocks = nn.ModuleList((Block(attend), Block(attend)))

    def forward(self, x: Tensor, *layout: Any, **options: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *layout, **options)
        return x


def inputs(*shape: int, requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)


def offsets(*lengths: int) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


class Call(NamedTuple):
    """One call of a public function. ``options`` are scalars, so that a traced function takes ``tensors`` alone."""

    function: Callable
    operator: str  # the node that it becomes
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]

    def run(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, **self.options)


def public_calls(requires_grad: bool = False) -> dict[str, Call]:
    """Every public function that computes attention or merges it, once each."""
    torch.manual_seed(3)

    def floats(*shape: int) -> Tensor:
        return inputs(*shape, requires_grad=requires_grad)

    cu, dense, longest = offsets(5, 0, 9), {"causal": True}, {"max_seqlen_q": 9, "max_seqlen_k": 9}
    state = (floats(2, 7, 2, 8), floats(2, 2, 7))
    calls = (
        Call(fap.flash_attn_func, "fwd", tuple(floats(2, 7, 2, 8) for _ in range(3)), dense),
        Call(fap.flash_attn_kvpacked_func, "fwd", (floats(2, 7, 2, 8), floats(2, 9, 2, 1, 8)), dense),
        Call(fap.flash_attn_qkvpacked_func, "fwd", (floats(2, 7, 3, 2, 8),), {"window_size": (3, 1)}),
        Call(fap.flash_attn_varlen_func, "varlen_fwd", (*(floats(14, 2, 8) for _ in range(3)), cu, cu), longest),
        Call(
            fap.flash_attn_varlen_kvpacked_func,
            "varlen_fwd",
            (floats(14, 2, 8), floats(14, 2, 1, 8), cu, cu),
            {**longest, "causal": True},
        ),
        Call(fap.flash_attn_varlen_qkvpacked_func, "varlen_fwd", (floats(14, 3, 2, 8), cu), {"max_seqlen": 9}),
        Call(fap.merge_states, "merge_states", (*state, floats(2, 7, 2, 8), floats(2, 2, 7)), {}),
        Call(fap.flash_attn_combine, "combine", (floats(3, 2, 7, 2, 8), floats(3, 2, 2, 7)), {}),
    )
    return {call.function.__name__: call for call in calls}


PUBLIC_NAMES = list(public_calls())


def operator_nodes(graph_module: torch.fx.GraphModule) -> Counter[str]:
    """How often each of this package's operators is called in a graph and the graphs inside it."""
    counts: Counter[str] = Counter()
    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and str(node.target).startswith(f"{NAMESPACE}."):
                    counts[str(node.target).split(".")[1]] += 1
    return counts


def clones(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors)


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def output_and_gradients(function: Callable, parameters: Iterable[Tensor], *args: Any, **options: Any) -> tuple:
    """The output of a call, then the gradients of a loss of it in ``parameters``."""
    out = function(*args, **options)
    loss = (out.float() * torch.linspace(-1.0, 1.0, out.numel()).view_as(out)).sum()
    return out.detach(), *torch.autograd.grad(loss, tuple(parameters))
