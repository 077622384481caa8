"""``flash_attn_2_cuda``: the functions of flash-attn's extension module, by place, for those who call it themselves."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_interface as interface
from torch import Tensor

from flash_attn_plus.as_flash_attn import not_served
from flash_attn_plus.schemas import Varlen


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state]; the first is the given ``out``, filled, where there is one."""
    results = interface.forward(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes),
        *(return_softmax, None, generator),
    )
    return _into(out, results)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    zero_tensors: bool,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state]."""
    layout = Varlen(
        *(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), None, seqused_k, leftpad_k, block_table)
    )
    results = interface.forward(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes),
        *(return_softmax, layout, generator),
    )
    return _into(out, results)


def _into(given: Tensor | None, results: tuple[Tensor, ...]) -> list[Tensor]:
    out, *rest = results
    if given is None:
        return [out, *rest]
    if given.shape != out.shape or given.dtype != out.dtype:
        expected = f"{tuple(out.shape)} in {out.dtype}"
        raise ValueError(f"out: expected shape {expected}, got {tuple(given.shape)} in {given.dtype}")
    return [given.copy_(out), *rest]


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d]: the given gradients, or new ones; softmax_d is empty."""
    grads = _gradients((dq, dk, dv), (q, k, v))
    softmax_d = interface.backward(
        *(dout, q, k, v, out, softmax_lse, *grads, dropout_p, softmax_scale, causal, window_size_left),
        *(window_size_right, softcap, alibi_slopes, deterministic, rng_state),
    )
    return [*grads, softmax_d]


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    zero_tensors: bool,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: torch.Generator | None,
    rng_state: Tensor | None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d]: the given gradients, or new ones; softmax_d is empty."""
    grads = _gradients((dq, dk, dv), (q, k, v))
    layout = Varlen(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    softmax_d = interface.backward(
        *(dout, q, k, v, out, softmax_lse, *grads, dropout_p, softmax_scale, causal, window_size_left),
        *(window_size_right, softcap, alibi_slopes, deterministic, rng_state, layout),
    )
    return [*grads, softmax_d]


def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens_k: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """[out, softmax_lse]; the first is the given ``out``, filled, where there is one."""
    results = interface.flash_attn_with_kvcache(
        *(q, kcache, vcache, k, v, rotary_cos, rotary_sin, seqlens_k, cache_batch_idx, leftpad_k, block_table),
        *(softmax_scale, is_causal, (window_size_left, window_size_right), softcap, is_rotary_interleaved),
        *(alibi_slopes, num_splits, True),
    )
    return _into(out, results)


def _gradients(given: tuple[Tensor | None, ...], of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) if grad is None else grad for grad, x in zip(given, of, strict=True))


__getattr__ = not_served(__name__, ["fwd", "varlen_fwd", "bwd", "varlen_bwd", "fwd_kvcache"])
