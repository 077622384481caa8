"""Every argument error of the cache operators, said once (checks.py has those of attention)."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    MAX_HEAD_DIM,
    _expect_device,
    _expect_shape,
    _expect_writable,
    _int32,
    _not_implemented,
    _qkv,
    _type,
    _value,
    _variant,
)
from .schemas import Cache, New, Variant

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_KEYS = 2**29  # of one sequence: places are 32-bit numbers, and three of them are added up


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, variant: Variant, num_splits: int) -> None:
    """q (b, sq, h, d), k_cache (caches, capacity, hk, d), v_cache (caches, capacity, hk, dv), or in pages."""
    _value(q.dim() == 4, "q: expected 4 dimensions (batch, seqlen, heads, head_dim), got shape {}", q)
    _numbers(variant, num_splits)
    batch = q.shape[0]
    _caches(k_cache, v_cache, cache.block_table)
    _qkv(q, k_cache, v_cache, 2, ("q", "k_cache", "v_cache"))
    _places(batch, k_cache, cache.cache_batch_idx, cache.block_table, q, "q")
    for name in ("cache_seqlens", "cache_leftpad"):
        tensor = getattr(cache, name)
        if tensor is not None:
            _int32(name, tensor, q)
            _expect_shape(name, tensor, "(batch,)", batch)
    if cache.block_table is not None:
        _not_implemented(cache.cache_leftpad is None, "cache_leftpad: expected None beside block_table, got a tensor")
    new = cache.seqlen_new
    capacity = _capacity(k_cache, cache.block_table)
    _value(new >= 0, "seqlen_new: expected a length of at least 0, got {}", new)
    _value(new <= capacity, "seqlen_new: expected at most {} (the capacity of k_cache), got {}", capacity, new)
    if cache.cache_seqlens is None:
        _value(new == 0, "seqlen_new: expected 0 without cache_seqlens, got {}", new)
    _value(num_splits >= 0, "num_splits: expected 0 (chosen here) or a positive number, got {}", num_splits)
    _not_implemented(variant.attn_bias is None, "attn_bias: expected None beside a cache, got a tensor")
    _not_implemented(variant.dropout_p == 0.0, "dropout_p: expected 0.0 beside a cache, got {}", variant.dropout_p)
    _variant(q, variant, batch, q.shape[2], q.shape[1], capacity)


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, new: New) -> None:
    """k (b, s, hk, d), v (b, s, hk, dv); the caches as for ``decode``."""
    _caches(k_cache, v_cache, new.block_table)
    _type(
        k_cache.dtype in _DTYPES, "k_cache: expected dtype float16, bfloat16, float32 or float64, got {}", k_cache.dtype
    )
    for name, tensor in (("v_cache", v_cache), ("k", k), ("v", v)):
        _type(
            tensor.dtype == k_cache.dtype,
            "{}: expected dtype {} (k_cache's), got {}",
            name,
            k_cache.dtype,
            tensor.dtype,
        )
        _expect_device(name, tensor, k_cache, "k_cache")
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        _type(tensor.layout is torch.strided, "{}: expected a strided tensor, got layout {}", name, tensor.layout)
    _value(k.dim() == 4, "k: expected 4 dimensions (batch, seqlen_new, heads_k, head_dim), got shape {}", k)
    batch, rows = k.shape[:2]
    meaning = "(batch, seqlen_new, heads_k, head_dim)"
    _expect_shape("k", k, meaning, batch, rows, *k_cache.shape[2:])
    _expect_shape("v", v, meaning, batch, rows, *v_cache.shape[2:])
    _int32("cache_seqlens", new.cache_seqlens, k_cache, "k_cache")
    _expect_shape("cache_seqlens", new.cache_seqlens, "(batch,)", batch)
    _places(batch, k_cache, new.cache_batch_idx, new.block_table, k_cache, "k_cache")
    capacity = _capacity(k_cache, new.block_table)
    _value(rows <= capacity, "k: expected at most {} rows (the capacity of k_cache), got shape {}", capacity, k)
    _tables(k_cache, new.rotary_cos, new.rotary_sin, capacity)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _expect_writable(name, cache)


def _numbers(variant: Variant, num_splits: int) -> None:
    """What the operator's schema would refuse, when something was written already."""
    for name in ("window_left", "window_right"):
        _whole(name, getattr(variant, name))
    _whole("num_splits", num_splits)
    for name in ("softmax_scale", "softcap"):
        value = getattr(variant, name)
        real = isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
        _type(real or (value is None and name == "softmax_scale"), "{}: expected a number, got {}", name, value)


def _whole(name: str, value) -> None:
    _type(isinstance(value, (int, torch.SymInt)), "{}: expected an integer, got {}", name, value)
    if isinstance(value, int):
        _value(-(2**63) <= value < 2**63, "{}: expected an integer of 64 bits, got {}", name, value)


def _caches(k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> None:
    paged = block_table is not None
    axes = "(num_pages, page_size, heads_k, head_dim)" if paged else "(caches, capacity, heads_k, head_dim)"
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        _value(tensor.dim() == 4, "{}: expected 4 dimensions {}, got shape {}", name, axes, tensor)
        size = tensor.shape[3]
        _value(size >= 1, "{}: expected head_dim of at least 1, got shape {}", name, tensor)
        _not_implemented(size <= MAX_HEAD_DIM, "{}: head_dim up to {} is implemented, got {}", name, MAX_HEAD_DIM, size)
    _expect_shape("v_cache", v_cache, axes, *k_cache.shape[:3], v_cache.shape[3])
    if paged:
        _value(k_cache.shape[1] >= 1, "k_cache: expected a page_size of at least 1, got shape {}", k_cache)


def _capacity(k_cache: Tensor, block_table: Tensor | None):
    return k_cache.shape[1] if block_table is None else k_cache.shape[1] * block_table.shape[1]


def _places(
    batch, k_cache: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None, like: Tensor, whose: str
) -> None:
    """Which cache, or which pages, a sequence has."""
    if block_table is not None:
        _value(cache_batch_idx is None, "cache_batch_idx: expected None beside block_table, got a tensor")
        _int32("block_table", block_table, like, whose)
        _value(block_table.dim() == 2, "block_table: expected shape (batch, max_pages), got {}", block_table)
        _expect_shape("block_table", block_table, "(batch, max_pages)", batch, block_table.shape[1])
    elif cache_batch_idx is not None:
        _int32("cache_batch_idx", cache_batch_idx, like, whose)
        _expect_shape("cache_batch_idx", cache_batch_idx, "(batch,)", batch)
    else:
        _value(
            k_cache.shape[0] == batch,
            "k_cache: expected {} caches (the batch) without cache_batch_idx, got shape {}",
            batch,
            k_cache,
        )
    _not_implemented(
        _capacity(k_cache, block_table) <= _MOST_KEYS,
        "k_cache: a capacity of up to {} keys is implemented, got {}",
        _MOST_KEYS,
        _capacity(k_cache, block_table),
    )


def _tables(k_cache: Tensor, cos: Tensor | None, sin: Tensor | None, capacity) -> None:
    for name, table, other in (("rotary_cos", cos, sin), ("rotary_sin", sin, cos)):
        _value(table is not None or other is None, "{}: expected a tensor beside the other table, got None", name)
    if cos is None or sin is None:
        return
    _value(cos.dim() == 2, "rotary_cos: expected 2 dimensions (seqlen_ro, rotary_dim / 2), got shape {}", cos)
    _expect_shape("rotary_sin", sin, "of rotary_cos", *cos.shape)
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        _type(table.dtype in _DTYPES, "{}: expected a floating dtype of 16, 32 or 64 bits, got {}", name, table.dtype)
        _expect_device(name, table, k_cache, "k_cache")
    _value(cos.shape[1] >= 1, "rotary_cos: expected a rotary_dim of at least 2, got shape {}", cos)
    _value(
        2 * cos.shape[1] <= k_cache.shape[3],
        "rotary_cos: expected a rotary_dim of at most head_dim ({}), got {} (shape {})",
        k_cache.shape[3],
        2 * cos.shape[1],
        cos,
    )
    _value(
        cos.shape[0] >= capacity,
        "rotary_cos: expected at least {} positions (the capacity of k_cache), got shape {}",
        capacity,
        cos,
    )


def values(
    k_cache: Tensor,
    cache_seqlens: Tensor | None,
    seqlen_new: int,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Lengths, and numbers of caches and pages, where the host can read them."""
    count, capacity = k_cache.shape[0], _capacity(k_cache, block_table)
    if cache_seqlens is None:
        ends = None
    else:
        lengths = cache_seqlens.tolist()
        ends = [length + seqlen_new for length in lengths]
        _value(
            all(length >= 0 and end <= capacity for length, end in zip(lengths, ends, strict=True)),
            "cache_seqlens: expected lengths between 0 and {} (a capacity of {} less {} new keys), got {}",
            capacity - seqlen_new,
            capacity,
            seqlen_new,
            lengths,
        )
    if cache_batch_idx is not None:
        numbers = cache_batch_idx.tolist()
        _value(
            all(0 <= number < count for number in numbers),
            "cache_batch_idx: expected numbers between 0 and {}, got {}",
            count - 1,
            numbers,
        )
    if cache_leftpad is not None:
        pads = cache_leftpad.tolist()
        _value(
            all(0 <= pad <= end for pad, end in zip(pads, ends or [capacity] * len(pads), strict=True)),
            "cache_leftpad: expected padding between 0 and the sequence's keys ({}), got {}",
            capacity if ends is None else ends,
            pads,
        )
    if block_table is not None:
        page_size = k_cache.shape[1]
        for row, end in zip(block_table.tolist(), ends or [capacity] * block_table.shape[0], strict=True):
            used = row[: -(-end // page_size)]
            _value(
                all(0 <= page < count for page in used),
                "block_table: expected page numbers between 0 and {}, got {}",
                count - 1,
                used,
            )
