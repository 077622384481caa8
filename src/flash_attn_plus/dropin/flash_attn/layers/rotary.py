"""``flash_attn.layers.rotary`` (flash_attn_plus/rotary.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn_plus.as_flash_attn import not_served
from flash_attn_plus.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

apply_rotary_emb_func = apply_rotary_emb


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """A quarter turn: each pair of columns (a, b) becomes (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding in plain PyTorch, in the dtype of its arguments, differentiable in all of them.

    Args:
        x: (batch, seqlen, heads, head_dim).
        cos, sin: (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2).
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise ValueError(f"cos: expected at most {x.shape[-1] // 2} columns (half of x's), got {cos.shape[-1]}")
    spread = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: torch.cat((t, t), -1))
    cos, sin = (spread(t).unsqueeze(-2) for t in (cos, sin))
    rotated = x[..., :rotary_dim]
    return torch.cat((rotated * cos + rotate_half(rotated, interleaved) * sin, x[..., rotary_dim:]), -1)


__all__ = [
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]

__getattr__ = not_served(__name__, __all__)
