"""The functions of flash-attn 2.8.3, public and private, with its signatures and result counts.

What flash-attn does otherwise than this package is translated here: softcap beside dropout raises, S_dmask shows blocks
of keys, and with ``infinite_lse`` the log-sum-exp of a query that sees no key is ``+inf``. Beyond its signatures, the
public functions take ``s_aux``: the attention sink, floating (heads,), by the name that flash-attn 3 gives it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import flash_attn_plus
from flash_attn_plus import library, reference
from flash_attn_plus.as_flash_attn import not_served
from flash_attn_plus.device import cuda_capability
from flash_attn_plus.schemas import Variant, Varlen

# Whether the log-sum-exp of a query that sees no key is +inf, as in flash-attn 2, instead of -inf.
infinite_lse = False


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    return -(-x // m) * m


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """The columns that flash-attn's forward takes at a time, which its S_dmask shows. Ours does not depend on them."""
    assert head_dim <= 256
    if head_dim <= 32:
        return 128
    if head_dim <= 64:
        return 64 if is_dropout else 128
    if head_dim <= 96 or head_dim > 128:
        return 64
    major, minor = cuda_capability(torch.device(device)) or (8, 0)
    if major == 8 and minor > 0:
        return 64 if is_causal and not is_dropout else 32
    return 32 if is_dropout else 64


def _check(softcap: float, dropout_p: float) -> None:
    if softcap > 0.0 and dropout_p > 0.0:
        raise RuntimeError(f"softcap: expected 0.0 beside dropout (dropout_p {dropout_p}), got {softcap}")


def _in_key_blocks(S_dmask: Tensor, head_dim: int, causal: bool) -> Tensor:
    """exp(s - maximum of the row) -> exp(s - maximum of this block of keys and those right of it)."""
    if S_dmask.numel() == 0:
        return S_dmask
    width = _get_block_size_n(S_dmask.device, head_dim, True, causal)
    # Rows are padded to multiples of 128: a multiple of every width.
    blocks = S_dmask.float().unflatten(-1, (-1, width))
    peaks = blocks.abs().amax(-1, keepdim=True).flip(-2).cummax(-2).values.flip(-2)
    return (blocks / peaks.masked_fill(peaks == 0, 1.0)).flatten(-2).to(S_dmask.dtype)


def _as_there(results: Sequence[Tensor], head_dim: int, causal: bool) -> tuple[Tensor, ...]:
    """(out, lse, S_dmask, ...) with the log-sum-exp and S_dmask as flash-attn has them."""
    out, lse, S_dmask, *rest = results
    lse = lse.masked_fill(lse == -torch.inf, torch.inf) if infinite_lse else lse
    return out, lse, _in_key_blocks(S_dmask, head_dim, causal), *rest


def _public(results: Tensor | Sequence[Tensor], head_dim: int, causal: bool) -> Tensor | tuple[Tensor, ...]:
    return results if isinstance(results, Tensor) else _as_there(results, head_dim, causal)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    s_aux=None,
):
    """:func:`flash_attn_plus.flash_attn_qkvpacked_func`."""
    _check(softcap, dropout_p)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _public(flash_attn_plus.flash_attn_qkvpacked_func(qkv, *options, sink=s_aux), qkv.shape[-1], causal)


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    s_aux=None,
):
    """:func:`flash_attn_plus.flash_attn_kvpacked_func`."""
    _check(softcap, dropout_p)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _public(flash_attn_plus.flash_attn_kvpacked_func(q, kv, *options, sink=s_aux), q.shape[-1], causal)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    s_aux=None,
):
    """:func:`flash_attn_plus.flash_attn_func`."""
    _check(softcap, dropout_p)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _public(flash_attn_plus.flash_attn_func(q, k, v, *options, sink=s_aux), q.shape[-1], causal)


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    s_aux=None,
):
    """:func:`flash_attn_plus.flash_attn_varlen_qkvpacked_func`."""
    _check(softcap, dropout_p)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    function = flash_attn_plus.flash_attn_varlen_qkvpacked_func
    return _public(function(qkv, cu_seqlens, max_seqlen, *options, sink=s_aux), qkv.shape[-1], causal)


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    s_aux=None,
):
    """:func:`flash_attn_plus.flash_attn_varlen_kvpacked_func`."""
    _check(softcap, dropout_p)
    layout = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _public(
        flash_attn_plus.flash_attn_varlen_kvpacked_func(q, kv, *layout, *options, sink=s_aux), q.shape[-1], causal
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    *,
    s_aux=None,
):
    """:func:`flash_attn_plus.flash_attn_varlen_func`."""
    _check(softcap, dropout_p)
    layout = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _public(
        flash_attn_plus.flash_attn_varlen_func(q, k, v, *layout, *options, block_table, sink=s_aux), q.shape[-1], causal
    )


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
    *,
    s_aux=None,
):
    """:func:`flash_attn_plus.flash_attn_with_kvcache`."""
    out, lse = flash_attn_plus.flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad),
        *(block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits, True),
        sink=s_aux,
    )
    if return_softmax_lse:
        return out, lse.masked_fill(lse == -torch.inf, torch.inf) if infinite_lse else lse
    return out


# What other libraries build on. No results but `out` and `lse` are differentiable.


def _variant(
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    rng_state: Tensor | None,
    deterministic: bool = False,
) -> Variant:
    return Variant(
        *(softmax_scale, causal, window_size_left, window_size_right, None, softcap, alibi_slopes, None, None),
        *(dropout_p, rng_state if dropout_p > 0.0 else None, deterministic),
    )


def _random_state(q: Tensor, dropout_p: float, generator: torch.Generator | None) -> Tensor:
    """(seed, offset), which the backward takes; nothing is drawn without dropout."""
    if dropout_p > 0.0:
        return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=q.device, generator=generator)
    return torch.zeros(2, dtype=torch.int64, device=q.device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
    layout: Varlen | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, S_dmask, rng_state) of all forwards below."""
    _check(softcap, dropout_p)
    rng_state = _random_state(q, dropout_p, generator)
    variant = _variant(
        *(softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p, rng_state)
    )
    S_dmask = q.new_empty((0,))
    if layout is None:
        out, lse = library.overload("fwd")(*library.flatten("fwd", (q, k, v, variant)))
    else:
        out, lse = library.overload("varlen_fwd")(*library.flatten("varlen_fwd", (q, k, v, layout, variant)))
    if return_softmax and dropout_p > 0.0:
        with torch.no_grad():
            S_dmask = (
                reference.s_dmask(q, k, variant) if layout is None else reference.varlen_s_dmask(q, k, layout, variant)
            )
    return _as_there((out, lse, S_dmask, rng_state), q.shape[-1], causal)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None,
    layout: Varlen | None = None,
) -> Tensor:
    """Of all backwards below: fills dq, dk and dv, of any strides, each where it is not None. ``out`` and
    ``softmax_lse`` may be those of more keys than these: of a whole ring.

    Returns an empty tensor for flash-attn's softmax_d, which no caller reads, and which is not at hand here.
    """
    _check(softcap, dropout_p)
    if dropout_p > 0.0 and rng_state is None:
        raise ValueError("rng_state: expected what the forward returned, beside dropout_p > 0; got None")
    variant = _variant(
        *(softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p, rng_state),
        deterministic,
    )
    name = "bwd_into" if layout is None else "varlen_bwd_into"
    parts = (variant,) if layout is None else (layout, variant)
    saved = (dout, q, k, v, out, softmax_lse, None)
    with torch.no_grad():
        library.overload(name)(*library.flatten(name, (*saved, dq, dk, dv, *parts, False)))
    return softmax_lse.new_empty((0,))


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state)."""
    return forward(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes),
        return_softmax,
    )


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state). Rows past the last offset are zero whatever ``zero_tensors`` says."""
    layout = Varlen(
        *(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), None, seqused_k, leftpad_k, block_table)
    )
    return forward(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes),
        *(return_softmax, layout),
    )


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes into dq, dk and dv; returns :func:`backward`'s empty softmax_d."""
    return backward(
        *(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left),
        *(window_size_right, softcap, alibi_slopes, deterministic, rng_state),
    )


def _flash_attn_varlen_backward(
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
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes into dq, dk and dv; returns :func:`backward`'s empty softmax_d."""
    layout = Varlen(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    return backward(
        *(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left),
        *(window_size_right, softcap, alibi_slopes, deterministic, rng_state, layout),
    )


# Under torch.compile each is the operators that it calls.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward

_SERVED = [name for name in globals() if "flash_attn_" in name and name != "flash_attn_plus"]

__all__ = [name for name in _SERVED if not name.startswith("_")]

__getattr__ = not_served(__name__, [*_SERVED, "maybe_contiguous", "round_multiple", "_get_block_size_n"])
