"""Attention with a key/value cache: the name, arguments and results of flash-attn 2.8.3's ``flash_attn_with_kvcache``.

It only normalises; the operators ``append_kv``, ``decode`` and ``rotary`` check and compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager
from .interface import _length, _public, _variant
from .schemas import Cache, New


@_public
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    sink: Tensor | None = None,
) -> Any:
    """Attention of q over the keys in a cache, after k and v were written into it behind those that are there.

    On a GPU nothing is read on the host (but for float64, which plain PyTorch computes): a step can be captured in a
    CUDA graph, and replayed while the sequences grow. Keys of long sequences are split among the processors (Dao et al.
    2023, Flash-Decoding); the result is the same bits from run to run. The caches are the only arguments that are
    written into. There is no backward.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16, float32 or float64, any strides.
        k_cache: (caches, capacity, heads_k, head_dim), any strides, or (num_pages, page_size, heads_k, head_dim) with
            block_table. heads must be a multiple of heads_k. caches is batch, or any number with cache_batch_idx.
        v_cache: (caches, capacity, heads_k, head_dim_v), or in pages.
        k: (batch, seqlen_new, heads_k, head_dim), written to the rows from cache_seqlens on, which it must not overlap.
            Needs v and cache_seqlens.
        v: (batch, seqlen_new, heads_k, head_dim_v).
        rotary_cos: (seqlen_ro, rotary_dim / 2), a floating dtype, at least as many positions as the cache has; beside
            k. Keys are rotated by the angles of the row that they are written to (leftpad or not), queries by those of
            rows cache_seqlens, cache_seqlens + 1, ... with ``causal`` or a window, and else all by those of row
            cache_seqlens. Queries at rows that the tables do not have are not rotated.
        rotary_sin: as rotary_cos.
        cache_seqlens: int, or int32 (batch,): the rows of each cache that are used, without the new ones. None: all.
        cache_batch_idx: int32 (batch,); the number of each sequence's cache. Not beside block_table.
        cache_leftpad: int32 (batch,); the first rows of each cache that do not count. Not beside block_table.
        block_table: int32 (batch, max_pages); row j of a sequence's cache is row ``j % page_size`` of page
            ``block_table[b, j // page_size]``. Any page size.
        softmax_scale: factor on q @ k^T; default ``head_dim ** -0.5``. May be 0 or negative.
        causal: a query sees no key behind its own place; queries are lined up with the last keys (bottom right).
        window_size: (left, right) from that place; negative: unlimited.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0.0 is off.
        rotary_interleaved: a pair are columns 2j and 2j + 1 (GPT-J); else columns j and j + rotary_dim / 2 (GPT-NeoX).
        alibi_slopes: float32 (heads,) or (batch, heads); ``-slope * |i + seqlen_k - seqlen_q - j|`` is added.
        num_splits: into how many parts the keys of a sequence are split, a hint, 128 at the most; 0 or less: by shapes
            and the device.
        return_softmax_lse: return (out, lse).
        sink: floating (heads,); one more logit per head, without a value.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v), or (out, lse), lse (batch, heads, seqlen_q) float32: the log-sum-exp
        of the scores, sink included. A query that sees no key has out 0 and lse -inf (with a sink: lse = sink).

    Raises:
        ValueError, TypeError, NotImplementedError: before anything is written, naming the argument, what was expected
            and what came. Lengths, and numbers of caches and pages, are looked at on a CPU only. Elsewhere, nothing
            outside of the caches is read or written whatever they are, and rows past the capacity are dropped.
    """
    step = eager.Step(
        *(
            q,
            k_cache,
            v_cache,
            k,
            v,
            rotary_cos,
            rotary_sin,
            cache_seqlens,
            cache_batch_idx,
            cache_leftpad,
            block_table,
        ),
        *(softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits, sink),
    )
    result = eager.again(step)
    out, lse = _first(step) if result is None else result
    return (out, lse) if return_softmax_lse else out


def _first(step: eager.Step) -> tuple[Tensor, Tensor]:
    """What a step does when none like it was kept: its arguments, for the operators."""
    q, k_cache, v_cache, k, v, cos, sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, *options = step
    softmax_scale, causal, window_size, softcap, interleaved, alibi_slopes, num_splits, sink = options
    for name, value in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if value is not None or name not in ("k", "v"):
            _check_tensor(name, value)
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        cache_seqlens = _lengths(cache_seqlens, q, k_cache, k, block_table)
    variant = _variant(softmax_scale, causal, window_size, softcap, alibi_slopes, None, sink, 0.0, None, False)
    append, seqlen_new = None, 0
    if k is not None or v is not None:
        for name, value in (("k", k), ("v", v), ("cache_seqlens", cache_seqlens)):
            if value is None:
                raise ValueError(f"{name}: expected a tensor beside new keys and values, got None")
        # They lose their history there; the caches have none.
        k, v = (x.detach() if x.requires_grad else x for x in (k, v))
        new = New(cache_seqlens, cache_batch_idx, block_table, cos, sin, interleaved)
        append, seqlen_new = (k_cache, v_cache, k, v, new), k.shape[1]
    num_splits = _length(num_splits)
    if isinstance(num_splits, int) and num_splits < 0:  # as 0, in flash-attn
        num_splits = 0
    cache = Cache(cache_seqlens, seqlen_new, cache_batch_idx, cache_leftpad, block_table)
    if append is None and (cos is not None or sin is not None):
        raise ValueError("rotary_cos, rotary_sin: expected None without new keys (k, v), got a tensor")
    return eager.step(step, append, (q, k_cache, v_cache, cache, variant, num_splits))


def _check_tensor(name: str, value: Any) -> None:
    """What is looked into here, before the operators check it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions, got shape {tuple(value.shape)}")


def _lengths(length: Any, q: Tensor, k_cache: Tensor, k: Tensor | None, block_table: Tensor | None) -> Tensor:
    """One length for all sequences, which is known here: so is whether it fits."""
    if not isinstance(length, int | torch.SymInt):
        raise TypeError(f"cache_seqlens: expected an int or an int32 tensor (batch,), got {type(length).__name__}")
    room, new = k_cache.shape[1], 0 if k is None else k.shape[1]
    if block_table is not None and block_table.dim() == 2:
        room *= block_table.shape[1]
    if not 0 <= length <= room - new:
        if torch.compiler.is_compiling():  # symbolic numbers cannot be shown
            raise ValueError("cache_seqlens: expected a length that leaves room for the new keys in k_cache")
        raise ValueError(
            f"cache_seqlens: expected a length between 0 and {room} (the capacity) less {new} new keys, got {length}"
        )
    return torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)
