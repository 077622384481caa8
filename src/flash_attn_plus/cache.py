"""The cache operators in plain PyTorch, on any device, in any dtype. Lengths are read on the host.

A sequence and its keys are a dense problem, so whatever computes those computes this: ``decode`` takes the forward that
it runs. Neighbours of equal lengths go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import rotate
from .checks import lse_dtype
from .schemas import Cache, New, Rotation, Variant

Forward = Callable[[Tensor, Tensor, Tensor, Variant], tuple[Tensor, Tensor]]


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, new: New) -> None:
    batch, rows = k.shape[:2]
    if new.rotary_cos is not None and k.numel():
        offsets = new.cache_seqlens
        k = rotate.rotary(k, Rotation(new.rotary_cos, new.rotary_sin, 0, offsets, interleaved=new.rotary_interleaved))
    # Of each new row: its place in its sequence, and where that lies. Rows outside of the cache are dropped.
    place = new.cache_seqlens[:, None].long() + torch.arange(rows, device=k.device)
    count, capacity = k_cache.shape[:2]
    if new.block_table is not None:
        page_size, table = capacity, new.block_table
        capacity *= table.shape[1]
        page = (place // page_size).clamp(0, max(table.shape[1] - 1, 0))
        cache = table.long().gather(1, page) if table.shape[1] else torch.full_like(place, -1)
        row = place % page_size
    else:
        numbers = torch.arange(batch, device=k.device) if new.cache_batch_idx is None else new.cache_batch_idx.long()
        cache, row = numbers[:, None].expand_as(place), place
    fits = (place >= 0) & (place < capacity) & (cache >= 0) & (cache < count)
    at = (cache[fits], row[fits])
    k_cache.index_put_(at, k[fits])
    v_cache.index_put_(at, v[fits])


class _Run(NamedTuple):
    """Sequences first to end, whose keys have as many rows, from the same one on."""

    first: int
    end: int
    start: int
    length: int


def _runs(batch: int, starts: list[int], lengths: list[int], together: bool) -> Iterator[_Run]:
    first = 0
    for b in range(1, batch + 1):
        if b < batch and together and (starts[b], lengths[b]) == (starts[first], lengths[first]):
            continue
        yield _Run(first, b, starts[first], lengths[first])
        first = b


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, variant: Variant, num_splits: int, forward: Forward
) -> tuple[Tensor, Tensor]:
    """out (b, sq, h, dv), lse (b, h, sq). ``forward`` computes a dense problem; splits are not needed here."""
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_zeros((batch, seqlen_q, heads, v_cache.shape[3]))
    lse = q.new_full((batch, heads, seqlen_q), -torch.inf, dtype=lse_dtype(q))
    if out.numel() == 0:
        return out, lse
    if k_cache.shape[0] == 0:  # no caches, no keys
        k_cache, v_cache = (x.new_empty((batch, 0, *x.shape[2:])) for x in (k_cache, v_cache))
        cache = Cache()
    # As the kernels: nothing outside of the caches is read, whatever the lists hold.
    capacity = k_cache.shape[1]
    if cache.block_table is not None:
        capacity *= cache.block_table.shape[1]
    pads = [0] * batch if cache.cache_leftpad is None else cache.cache_leftpad.tolist()
    ends = [capacity] * batch
    if cache.cache_seqlens is not None:
        room = max(0, capacity - cache.seqlen_new)
        ends = [min(min(max(0, n), room) + cache.seqlen_new, capacity) for n in cache.cache_seqlens.tolist()]
    pads = [max(0, pad) for pad in pads]
    lengths = [max(0, end - pad) for end, pad in zip(ends, pads, strict=True)]
    together = cache.cache_batch_idx is None and cache.block_table is None
    for run in _runs(batch, pads, lengths, together):
        k, v = (_keys(x, cache, run) for x in (k_cache, v_cache))
        one = _of_sequences(variant, run)
        of_run = _forward(q[run.first : run.end], k, v, one, forward)
        out[run.first : run.end], lse[run.first : run.end] = of_run
    return out, lse


def _keys(x: Tensor, cache: Cache, run: _Run) -> Tensor:
    """(n, length, heads_k, dim) of a run; gathered only from pages."""
    if cache.block_table is not None:
        pages = cache.block_table[run.first, : -(-run.length // x.shape[1])].clamp(0, x.shape[0] - 1)
        return x.index_select(0, pages).flatten(0, 1)[None, : run.length]
    if cache.cache_batch_idx is not None:
        number = min(max(0, int(cache.cache_batch_idx[run.first])), x.shape[0] - 1)
        x = x.narrow(0, number, 1)
    else:
        x = x[run.first : run.end]
    return x.narrow(1, run.start if run.length else 0, run.length)


def _of_sequences(variant: Variant, run: _Run) -> Variant:
    """Slopes and sinks (b, h) -> those of the run."""
    per_sequence = {
        name: x[run.first : run.end]
        for name in ("alibi_slopes", "sink")
        if (x := getattr(variant, name)) is not None and x.dim() == 2
    }
    return variant._replace(**per_sequence)


def _forward(q: Tensor, k: Tensor, v: Tensor, variant: Variant, forward: Forward) -> tuple[Tensor, Tensor]:
    """Where every query sees every key, the query heads of a key head become its queries: each key is read once."""
    batch, seqlen_q, heads, dim = q.shape
    heads_k = k.shape[2]
    if seqlen_q == 1:
        k, v, variant = _seen_by_one(k, v, variant)
    group = heads // heads_k
    seen_by_all = not variant.causal and variant.window_left < 0 and variant.window_right < 0
    if group == 1 or not seen_by_all or variant.alibi_slopes is not None or variant.sink is not None:
        return forward(q, k, v, variant)
    folded = q.unflatten(2, (heads_k, group)).transpose(2, 3).reshape(batch, seqlen_q * group, heads_k, dim)
    out, lse = forward(folded, k, v, variant._replace(diagonal=None))
    out = out.unflatten(1, (seqlen_q, group)).transpose(2, 3).flatten(2, 3)
    return out, lse.unflatten(2, (seqlen_q, group)).permute(0, 1, 3, 2).flatten(1, 2)


def _seen_by_one(k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor, Variant]:
    """The keys that a lone query sees, of which none is masked. ALiBi counts distances from the diagonal."""
    seqlen_k = k.shape[1]
    diagonal = seqlen_k - 1 if variant.diagonal is None else variant.diagonal
    right = 0 if variant.causal else variant.window_right
    first, end = 0, seqlen_k
    if variant.window_left >= 0:
        first = min(max(0, diagonal - variant.window_left), seqlen_k)
    if right >= 0:
        end = max(first, min(seqlen_k, diagonal + right + 1))
    variant = variant._replace(causal=False, window_left=-1, window_right=-1, diagonal=diagonal - first)
    return k[:, first:end], v[:, first:end], variant
