"""A small modern GPT whose attention is ``flash_attn_plus.flash_attn_func``, or ``flash_attn_varlen_func`` when packed.

Pre-norm, rotary positions, normalised queries and keys, grouped-query attention, squared-ReLU MLP, tied embeddings.
Shapes in comments: b batch, s sequence, h query heads, hk key/value heads, d head dimension. A packed batch has one
dimension where the others have (b, s): the rows of all its sequences, one sequence behind the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn_plus import flash_attn_func, flash_attn_varlen_func


@dataclass(frozen=True)
class Config:
    vocab: int
    context: int = 256  # the longest sequence
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2  # each key/value head serves heads / kv_heads query heads
    dim: int = 192

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (b, s, h, d), k and v (b, s, hk, d) -> (b, s, h, d). No transposes, no repeated heads, no mask tensor."""
    return flash_attn_func(q, k, v, causal=True)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The same within each sequence of a packed batch: q (rows, h, d), k and v (rows, hk, d) -> (rows, h, d)."""
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)


def rotary_tables(context: int, dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (context, dim / 2): RoFormer, https://arxiv.org/abs/2104.09864."""
    frequency = base ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.outer(torch.arange(context), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) of (b, s, heads, d) or (rows, heads, d) by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (s or rows, 1, d/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config, attention: Callable[..., Tensor]):
        super().__init__()
        self.attention, self.head_dim = attention, config.head_dim
        self.query = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *layout: Any) -> Tensor:
        # (b, s, dim) -> q (b, s, h, d), k and v (b, s, hk, d): the layout that attention takes is that of the product.
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        q, k = (F.rms_norm(x, (self.head_dim,)) for x in (q, k))  # scores stay within +- sqrt(d), whatever the weights
        return self.out(self.attention(rotate(q, cos, sin), rotate(k, cos, sin), v, *layout).flatten(-2))


class Block(nn.Module):
    def __init__(self, config: Config, attention: Callable[..., Tensor]):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.attention = Attention(config, attention)
        self.up = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.down = nn.Linear(4 * config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *layout: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, *layout)
        return x + self.down(F.relu(self.up(self.mlp_norm(x))).square())


class GPT(nn.Module):
    """tokens (b, s) int64 -> logits (b, s, vocab).

    A packed batch has tokens (rows,) and the position of each in its sequence, (rows,); ``layout`` is what the
    attention takes behind q, k and v: cu_seqlens and max_seqlen of :func:`packed_attention`.
    """

    def __init__(self, config: Config, attention: Callable[..., Tensor] = causal_attention):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        cos, sin = rotary_tables(config.context, config.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Each block adds twice to the residual stream: its output layers start smaller (GPT-2).
                depth = (2 * config.layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(weight, std=0.02 * depth)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, *layout: Any) -> Tensor:
        x = self.embedding(tokens)  # (b, s, dim) or (rows, dim)
        where = slice(tokens.shape[1]) if positions is None else positions
        cos, sin = self.cos[where], self.sin[where]
        for block in self.blocks:
            x = block(x, cos, sin, *layout)
        return F.linear(self.norm(x), self.embedding.weight)
