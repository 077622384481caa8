"""flag_gems as a backend: the operators ``flag_gems_fwd`` and ``flag_gems_varlen_fwd`` on every device that it serves.

It is imported by the first call, because that starts the tools of a dozen vendors, initialises the device, and fails
in many ways where there is none. checks_flag_gems.py says what it is asked for; here its results are made those that
every operator of this package has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..checks import _not_implemented
from ..schemas import Variant, Varlen, band

# What its import raises where there is no device, no driver, a package too few, or a version that has not what is
# called here.
_FAILURES = (ImportError, RuntimeError, AssertionError, AttributeError)
# From this one on its launcher leaves out compile-time constants.
_TRITON_TOO_NEW = (3, 7)
# Its kernels multiply places by strides in 32 bits.
_MOST_ELEMENTS = 2**31
# A side of a window that holds every key. Sums of it and of lengths stay below 2**31.
_WIDE = 2**30
# The rows of a tile of its dense kernel, in all its configurations. Its causal mask is right for whole tiles.
_TILE = 128


def prepare_forward(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> Callable:
    flag_gems = _library(q, k, v)
    if not (q.numel() and k.numel()):
        return _nothing_is_seen
    if _suits_dense_kernel(q, k, v, variant):
        return functools.partial(_dense, flag_gems.flash_attention_forward)
    return functools.partial(_dense_as_packed, flag_gems.flash_attn_varlen_func)


def prepare_varlen_forward(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, variant: Variant) -> Callable:
    flag_gems = _library(q, k, v)
    if not (q.numel() and k.numel() and layout.cu_seqlens_q.shape[0] > 1):
        return _nothing_is_seen
    return functools.partial(_varlen, flag_gems.flash_attn_varlen_func)


def _library(q: Tensor, k: Tensor, v: Tensor) -> ModuleType:
    """flag_gems, where it can be called with these."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        _not_implemented(
            span < _MOST_ELEMENTS,
            "{}: expected less than 2**31 elements from the first to the last for flag_gems, got shape {} with strides "
            "{}",
            name,
            tensor,
            tensor.stride(),
        )
    flag_gems = _imported()
    _not_implemented(
        q.device.type == flag_gems.device,
        "q: expected a device of type {} (flag_gems'), got {}",
        flag_gems.device,
        q.device,
    )
    # Another implementation, of which nothing is known here.
    native = getattr(getattr(flag_gems, "config", None), "use_c_extension", False)
    _not_implemented(not native, "USE_C_EXTENSION: expected flag_gems' Triton kernels, got its C++ extension")
    return flag_gems


def _imported() -> ModuleType:
    triton = _or_what_to_install(_triton_version)
    if tuple(int("".join(filter(str.isdigit, part)) or 0) for part in triton.split(".")[:2]) >= _TRITON_TOO_NEW:
        raise NotImplementedError(
            f"triton: expected a version up to 3.6 for flag_gems, whose launcher fails with newer ones, got {triton}"
        )
    return _or_what_to_install(_import)


def _or_what_to_install(ask: Callable) -> Any:
    try:
        return ask()
    except _FAILURES as error:
        raise ImportError(
            'backend: expected an installed flag_gems that finds a device, because "flag_gems" was selected, got '
            f"{type(error).__name__}: {error}. Install it with `pip install 'flash-attn-plus[flag_gems]'`, or beside "
            "another NumPy than the 1.26.4 that it asks for with `pip install --no-deps flag_gems` and "
            "`pip install sqlalchemy pyyaml packaging`"
        ) from error


def _import() -> ModuleType:
    import flag_gems

    for name in ("flash_attention_forward", "flash_attn_varlen_func", "device"):
        getattr(flag_gems, name)
    return flag_gems


def _triton_version() -> str:
    import triton

    return triton.__version__


def _suits_dense_kernel(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> bool:
    """The packed kernel takes the rest, windows among it, of which the dense one drops those beyond the keys."""
    # flag_gems finds a compiled kernel by strides but not by lengths, and how it was compiled depends on these: strides
    # have to tell them. A kernel that is right for 128 keys would be taken for the first 100 of them.
    if any(x.stride() != _strides_of_new(x) for x in (q, k, v)):
        return False
    # It rounds up to a multiple of 32, and asks for one of its own list.
    if q.shape[-1] <= 16:
        return False
    left, right, _ = band(variant, 0, 0)
    if (left, right) == (-1, -1):
        return True
    # With slopes its causal log-sum-exp is off by a constant in each row.
    seqlen_q = q.shape[1]
    return (left, right) == (-1, 0) and variant.alibi_slopes is None and (seqlen_q % _TILE == 0 or seqlen_q == 1)


def _strides_of_new(x: Tensor) -> tuple[int, ...]:
    return torch.empty(x.shape, device="meta").stride()


def _scale(q: Tensor, variant: Variant) -> float:
    return q.shape[-1] ** -0.5 if variant.softmax_scale is None else variant.softmax_scale


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _dense(function: Callable, q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    out, lse, *_ = function(
        *(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, band(variant, 0, 0)[1] == 0, False),
        scale=_scale(q, variant),
        softcap=variant.softcap,
        alibi_slopes=_contiguous(variant.alibi_slopes),
        disable_splitkv=True,  # what combines the parts writes outside of the output
    )
    return out.contiguous(), _minus_inf(lse).contiguous()


def _dense_as_packed(function: Callable, q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    cu_seqlens_q, cu_seqlens_k = (
        torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=q.device) for n in (seqlen_q, seqlen_k)
    )
    layout = Varlen(cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k)
    out, lse = _packed(function, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout, variant)
    return out.view(q.shape), _minus_inf(lse).view(heads, batch, seqlen_q).transpose(0, 1).contiguous()


def _varlen(
    function: Callable, q: Tensor, k: Tensor, v: Tensor, layout: Varlen, variant: Variant
) -> tuple[Tensor, Tensor]:
    out, lse = _packed(function, q, k, v, layout, variant)
    # Rows of no sequence are not written.
    row, cu_seqlens = torch.arange(q.shape[0], device=q.device), layout.cu_seqlens_q
    padding = (row < cu_seqlens[0]) | (row >= cu_seqlens[-1])
    return out.masked_fill_(padding[:, None, None], 0.0), _minus_inf(lse).masked_fill_(padding, float("-inf"))


def _packed(
    function: Callable, q: Tensor, k: Tensor, v: Tensor, layout: Varlen, variant: Variant
) -> tuple[Tensor, Tensor]:
    """Of its packed kernel; rows of no sequence hold anything, rows that see no key have +inf."""
    left, right, _ = band(variant, 0, 0)
    causal = (left, right) == (-1, 0)
    if causal and variant.alibi_slopes is not None:
        # As a window: to what is causal it adds slope * j, another log-sum-exp.
        causal, left = False, _WIDE
    window = (-1, -1) if causal else (min(left, _WIDE), min(right, _WIDE))
    cu_seqlens_k, lengths = layout.cu_seqlens_k, None
    if layout.block_table is not None:
        lengths = cu_seqlens_k[1:] - cu_seqlens_k[:-1] if layout.seqused_k is None else layout.seqused_k
        cu_seqlens_k = None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _, lse = function(
        *(q, k, v),
        # Of one query it makes the heads rows of a tile. This takes every sequence for one of exactly one row, padding
        # and empty ones too, and orders the log-sum-exp by heads of the wrong group.
        max_seqlen_q=max(layout.max_seqlen_q, 2),
        cu_seqlens_q=layout.cu_seqlens_q.contiguous(),
        # A side that is not shorter than this is dropped, and the other one with it.
        max_seqlen_k=max(layout.max_seqlen_k, window[0] + 1, window[1] + 1),
        cu_seqlens_k=_contiguous(cu_seqlens_k),
        seqused_k=_contiguous(lengths),
        softmax_scale=_scale(q, variant),
        causal=causal,
        window_size=window,
        softcap=variant.softcap,
        alibi_slopes=_contiguous(variant.alibi_slopes),
        block_table=_contiguous(layout.block_table),
        return_softmax_lse=True,
        out=out,
    )
    return out, lse


def _minus_inf(lse: Tensor) -> Tensor:
    """A row that sees no key has +inf in flag_gems."""
    return lse.masked_fill_(lse == float("inf"), float("-inf"))


def _nothing_is_seen(q: Tensor, k: Tensor, v: Tensor, *options: Varlen | Variant) -> tuple[Tensor, Tensor]:
    """No queries, or no keys: flag_gems divides by their number."""
    *batch, rows, heads, _ = q.shape
    lse = torch.full((*batch, heads, rows), float("-inf"), dtype=torch.float32, device=q.device)
    return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse
