"""What flag_gems computes right, and by whose name the rest is refused (checks.py has what all attention shares).

Read from the source of flag_gems 5.0.2: a guard stands for something that it has not, that it leaves out without a
word, or that it computes wrong. Those that depend on how large a problem is are in integrations/flag_gems.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .checks import _not_implemented
from .schemas import Variant, Varlen, band

# Narrower heads are less than the products of its Triton kernels take.
_LEAST_HEAD_DIM = 16


def dense(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> None:
    checks.dense(q, k, v, variant)
    _variant(variant)
    _qkv(q, k, v)
    batch, seqlen_k = k.shape[:2]
    # One sequence behind the other, as its packed kernel wants them: what it takes for a dense slice of a cache is a
    # kernel that it compiled for other lengths.
    _not_implemented(
        (batch <= 1) | (seqlen_k <= 1) | (k.stride(0) == seqlen_k * k.stride(1)),
        "k: expected sequences that lie one behind the other for flag_gems, no slice of a longer tensor; got shape {} "
        "with strides {}",
        k,
        k.stride(),
    )
    _expect_rows_for_wide_tiles(k)


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, variant: Variant) -> None:
    checks.varlen(q, k, v, layout, variant)
    _variant(variant)
    for name in ("seqused_q", "leftpad_k"):
        _not_implemented(
            getattr(layout, name) is None, "{}: expected None for flag_gems, which has none, got a tensor", name
        )
    _qkv(q, k, v)
    if layout.block_table is None:
        _not_implemented(
            layout.seqused_k is None,
            "seqused_k: expected None for flag_gems without block_table, got a tensor",
        )
        _expect_rows_for_wide_tiles(k)
        return
    pages, page_size = k.shape[:2]
    _not_implemented(
        (pages <= 1) | (k.stride(0) == page_size * k.stride(1)),
        "k: expected pages that lie one behind the other for flag_gems, got shape {} with strides {}",
        k,
        k.stride(),
    )


def _variant(variant: Variant) -> None:
    for name in ("diagonal", "attn_bias", "sink"):
        value = getattr(variant, name)
        _not_implemented(value is None, "{}: expected None for flag_gems, which has none, got {}", name, value)
    # Its dropout lacks the factor 1 / (1 - p), and draws other numbers than this package.
    _not_implemented(variant.dropout_p == 0.0, "dropout_p: expected 0.0 for flag_gems, got {}", variant.dropout_p)
    # It multiplies by the scale after the row maximum is taken and keys are masked: of a negative one the maximum is
    # the minimum, and -inf times 0 is NaN. Its dense function takes 0 for none given.
    scale = variant.softmax_scale
    _not_implemented(
        scale is None or 0.0 < scale < float("inf"),
        "softmax_scale: expected None or a positive number for flag_gems, got {}",
        scale,
    )
    # It drops a lone side, or shifts the other by one. A right one of 0 is its causal mask.
    left, right, _ = band(variant, 0, 0)
    _not_implemented(
        (left < 0 and right <= 0) or (left >= 0 and right >= 0),
        "window_size: expected none, both sides, or causal (with or without a left one) for flag_gems, got ({}, {})",
        variant.window_left,
        variant.window_right,
    )


def _qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    _not_implemented(
        q.dtype in (torch.float16, torch.bfloat16),
        "q: expected dtype float16 or bfloat16 for flag_gems, got {}",
        q.dtype,
    )
    dim = q.shape[-1]
    _not_implemented(v.shape[-1] == dim, "v: expected head_dim {} (q's) for flag_gems, got shape {}", dim, v)
    _not_implemented(
        dim >= _LEAST_HEAD_DIM and dim % 8 == 0,
        "q: expected a head_dim that is a multiple of 8 and at least {} for flag_gems, got {}",
        _LEAST_HEAD_DIM,
        dim,
    )
    _not_implemented(
        k.stride(-1) == 1, "k: expected a contiguous last dimension for flag_gems, got strides {}", k.stride()
    )
    # It reads v by k's strides.
    for size, of_k, of_v in zip(k.shape, k.stride(), v.stride(), strict=True):
        _not_implemented(
            (size <= 1) | (of_k == of_v), "v: expected strides {} (k's) for flag_gems, got {}", k.stride(), v.stride()
        )


def _expect_rows_for_wide_tiles(k: Tensor) -> None:
    """Its tiles are as wide as the next power of two, and what stands behind a row of keys is multiplied by 0: it must
    be another row, not what a program left in a gap, which may be NaN.
    """
    heads, dim = k.shape[-2:]
    if dim & (dim - 1) == 0:
        return
    _not_implemented(
        ((heads == 1) | (k.stride(-2) == dim)) & (k.stride(-3) == heads * dim),
        "k: expected rows without gaps for flag_gems, whose head_dim {} is not a power of two; got strides {}",
        dim,
        k.stride(),
    )
