"""A flag_gems of a few lines on a CPU, by the oracle: right, or wrong on purpose, as the environment says.

STAND_IN names what is wrong in it, separated by commas: "alignment" and "dropped window" as in flag_gems 5.0.2, "other"
in some other way, "outside" writes outside its memory, "raises", "crashes", "hangs", "no device".
"""

from __future__ import annotations

import os
import time

import torch

from flash_attn_plus import reference
from flash_attn_plus.schemas import Variant, Varlen

__version__ = "stand-in"
FAULTS = set(os.environ.get("STAND_IN", "").split(","))

if "no device" in FAULTS:
    raise RuntimeError("No device were detected on your machine !")


def _written(x: torch.Tensor) -> torch.Tensor:
    """Into memory that torch.empty_like gives, as a kernel does."""
    out = torch.empty_like(x.half())
    out.copy_(x)
    if "outside" in FAULTS:
        out.as_strided((1,), (1,), out.storage_offset() + out.numel() + 3).fill_(1)
    return out


def scaled_dot_product_attention_forward(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    if "raises" in FAULTS:
        raise AssertionError("only head dimension 7")
    diagonal = 0 if "alignment" in FAULTS and is_causal else None
    variant = Variant(softmax_scale=scale, causal=is_causal, diagonal=diagonal, attn_bias=attn_mask)
    out, lse = reference.attention(*(x.transpose(1, 2) for x in (query, key, value)), variant)
    return _written(out.transpose(1, 2)), lse.float() / torch.log(torch.tensor(2.0))


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    variant = Variant(softmax_scale=scale, causal=is_causal, attn_bias=attn_mask)
    out, _ = reference.attention(*(x.transpose(1, 2) for x in (query, key, value)), variant)
    return out.transpose(1, 2).to(query.dtype)


def flash_attention_forward(
    query,
    key,
    value,
    cumulative_sequence_length_q,
    cumulative_sequence_length_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    softcap=0.0,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
    alibi_slopes=None,
    disable_splitkv=False,
):
    if "hangs" in FAULTS and window_size_left == 1000:
        time.sleep(600)
    if "crashes" in FAULTS and is_causal:
        os.abort()
    left, right = (-1 if side is None else side for side in (window_size_left, window_size_right))
    if "dropped window" in FAULTS and (left < 0 or right < 0):
        left = right = -1
    if "other" in FAULTS:
        value = 2 * value
    variant = Variant(scale, is_causal, left, right, None, softcap, alibi_slopes)
    out, lse = reference.attention(query, key, value, variant)
    return _written(out), lse.float(), None, None, None


def flash_attn_varlen_func(
    q,
    k,
    v,
    max_seqlen_q,
    cu_seqlens_q,
    max_seqlen_k,
    cu_seqlens_k=None,
    seqused_k=None,
    q_v=None,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=None,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    return_softmax_lse=False,
    out=None,
    s_aux=None,
):
    starts = torch.zeros(len(cu_seqlens_q), dtype=torch.int32) if cu_seqlens_k is None else cu_seqlens_k
    layout = Varlen(cu_seqlens_q, starts, max_seqlen_q, max_seqlen_k)
    layout = layout._replace(seqused_k=seqused_k, block_table=block_table)
    variant = Variant(softmax_scale, causal, *(window_size or (-1, -1)), None, softcap, alibi_slopes)
    found, lse = reference.varlen_attention(q, k, v, layout, variant)
    return (_written(found), lse.float()) if return_softmax_lse else _written(found)
