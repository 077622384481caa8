"""Merging attention states (out, lse) that were computed over disjoint sets of keys.

The log-sum-exp of the union is logsumexp(lse_i), and each part weighs exp(lse_i - lse): Milakov and
Gimelshein 2018; section 3.1 of Dao et al. 2022. Plain PyTorch on every device: it is bound by memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _per_row(weights: Tensor) -> Tensor:
    """(..., h, s) as log-sum-exps lie -> (..., s, h, 1) as outputs lie."""
    return weights.transpose(-1, -2).unsqueeze(-1)


def _weights(lse_parts: Tensor, lse: Tensor) -> Tensor:
    """exp(lse_i - lse); a row that no part has seen (all -inf) weighs 0 and not NaN."""
    return torch.exp(lse_parts - lse.masked_fill(lse == -torch.inf, 0.0))


def _weighted(weight: Tensor, part: Tensor) -> Tensor:
    """weight * part, where a part that weighs nothing may hold anything: split-KV leaves its empty parts unwritten."""
    return torch.where(weight == 0.0, 0.0, weight * part)


def combine(out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """out_partial (n, ..., s, h, d), lse_partial (n, ..., h, s) -> (..., s, h, d), (..., h, s)."""
    lse = torch.logsumexp(lse_partial, 0)
    weights = _per_row(_weights(lse_partial, lse))
    out = out_partial.new_zeros(out_partial.shape[1:], dtype=torch.promote_types(out_partial.dtype, lse.dtype))
    for part, weight in zip(out_partial, weights, strict=True):  # one wide copy at a time, not n
        out += _weighted(weight, part)
    return out.to(out_dtype or out_partial.dtype), lse.contiguous()


def merge_states(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The state over both sets of keys, in the wider of the two dtypes."""
    lse = torch.logaddexp(lse1, lse2)
    out = _weighted(_per_row(_weights(lse1, lse)), out1) + _weighted(_per_row(_weights(lse2, lse)), out2)
    return out.to(torch.promote_types(out1.dtype, out2.dtype)).contiguous(), lse.contiguous()


def part_gradients(
    dout: Tensor | None, dlse: Tensor | None, out_part: Tensor, lse_part: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of one part (or of stacked parts) from those of the merged state.

    d out_i = w_i dout and d lse_i = w_i (dlse + rowsum(dout * (out_i - out))).
    Made of differentiable operations, so that it can be differentiated again.
    """
    weights = _weights(lse_part, lse)
    dlse_part = torch.zeros_like(weights) if dlse is None else weights * dlse
    if dout is None:
        return torch.zeros_like(out_part), dlse_part.to(lse_part.dtype)
    dout_part = _per_row(weights) * dout
    shift = (dout * (out_part.to(weights.dtype) - out)).sum(-1).transpose(-1, -2)
    return dout_part.to(out_part.dtype), (dlse_part + _weighted(weights, shift)).to(lse_part.dtype)
