"""FLOP formulas for ``torch.utils.flop_counter``, counted as PyTorch counts SDPA.

Every query meets every key (what causal masks and windows skip is not subtracted). Varlen counts the segments
between the offsets, seqused and leftpad left aside, and the longest everywhere where the offsets are fake; a cache
counts the keys that are there.
"""

from __future__ import annotations

import torch
from torch.utils import flop_counter

from . import library  # noqa: F401  (defines the operators)
from .schemas import NAMESPACE


def _heads_first(heads: int, shape: tuple) -> tuple:
    """(b, s, h, d) as ours lie -> (b, h, s, d) as SDPA's formulas take them, each query head with its key head."""
    batch, seqlen, _, dim = shape
    return batch, heads, seqlen, dim


def _forward(q, k, v, *args, **kwargs) -> int:
    return flop_counter.sdpa_flop_count(*(_heads_first(q[2], shape) for shape in (q, k, v)))


def _backward(dout, q, k, v, *args, **kwargs) -> int:
    return flop_counter.sdpa_backward_flop_count(*(_heads_first(q[2], shape) for shape in (dout, q, k, v)))


def _is_fake(x: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(x, (FakeTensor, FunctionalTensor)) or x.is_meta


def _lengths(cu_seqlens: torch.Tensor, longest: int) -> list[int]:
    if _is_fake(cu_seqlens):
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()


def _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """The dense shapes of each sequence. In pages or not, the last two axes of k and v are heads and head_dim."""
    lengths_q, lengths_k = _lengths(cu_seqlens_q, max_seqlen_q), _lengths(cu_seqlens_k, max_seqlen_k)
    for seqlen_q, seqlen_k in zip(lengths_q, lengths_k, strict=True):
        yield (1, seqlen_q, *q.shape[1:]), (1, seqlen_k, *k.shape[-2:]), (1, seqlen_k, *v.shape[-2:])


def _varlen_forward(q, k, v, *args, **kwargs) -> int:
    return sum(_forward(*shapes) for shapes in _sequences(q, k, v, *args[:4]))


def _varlen_backward(dout, q, k, v, out, lse, dlse, *args, **kwargs) -> int:
    return sum(
        _backward((*shape_q[:-1], v.shape[-1]), shape_q, shape_k, shape_v)
        for shape_q, shape_k, shape_v in _sequences(q, k, v, *args[:4])
    )


def _varlen_backward_into(dout, q, k, v, out, lse, dlse, dq, dk, dv, *args, **kwargs) -> int:
    return _varlen_backward(dout, q, k, v, out, lse, dlse, *args)


def _decode(
    q,
    k_cache,
    v_cache,
    cache_seqlens=None,
    seqlen_new=0,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    *args,
    **kwargs,
) -> int:
    """Of the keys that are there; of the capacity where that cannot be read."""
    capacity = k_cache.shape[1]
    if block_table is not None:
        capacity *= block_table.shape[1]
    batch, readable = q.shape[0], cache_seqlens is not None and not _is_fake(cache_seqlens)
    lengths = [min(n + seqlen_new, capacity) for n in cache_seqlens.tolist()] if readable else [capacity] * batch
    shapes = ((1, *q.shape[1:]), (1, sum(lengths), *k_cache.shape[2:]), (1, sum(lengths), *v_cache.shape[2:]))
    return _forward(*shapes)


def _register() -> None:
    ops = getattr(torch.ops, NAMESPACE)
    flop_counter.register_flop_formula(ops.fwd)(_forward)
    flop_counter.register_flop_formula(ops.flag_gems_fwd)(_forward)
    flop_counter.register_flop_formula(ops.bwd)(_backward)
    flop_counter.register_flop_formula(ops.decode, get_raw=True)(_decode)
    flop_counter.register_flop_formula(ops.bwd_into)(_backward)
    flop_counter.register_flop_formula(ops.varlen_fwd, get_raw=True)(_varlen_forward)
    flop_counter.register_flop_formula(ops.flag_gems_varlen_fwd, get_raw=True)(_varlen_forward)
    flop_counter.register_flop_formula(ops.varlen_bwd, get_raw=True)(_varlen_backward)
    flop_counter.register_flop_formula(ops.varlen_bwd_into, get_raw=True)(_varlen_backward_into)


_register()
