"""flag_gems as a backend: the operators ``flag_gems_fwd`` and ``flag_gems_varlen_fwd`` on every device that it serves.

It is imported by the first call, because that starts the tools of a dozen vendors, initialises the device, and fails
in many ways where there is none. checks_flag_gems.py says what it is asked for; here its results are made those that
every operator of this package has.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..checks import _not_implemented
from ..schemas import Variant, Varlen, band

# What is refused, and what is asked for in place of what is wrong, was read from this one's source.
_VERSION = "5.0.2"
# Vendors bind functions of their own to the names of these at the top.
_OWN = "flag_gems.ops.attention"
# From this one on its launcher leaves out compile-time constants.
_TRITON_TOO_NEW = (3, 7)
# Its kernels multiply places by strides in 32 bits.
_MOST_ELEMENTS = 2**31
# What its dense function pads a head dimension to: the next of these.
_DENSE_HEAD_DIMS = (16, 32, 64, 96, 128, 192, 256)
# Of a grid, but for its first dimension. Heads times sequences are the second one of its dense kernel, sequences the
# second and heads the third one of its packed kernel.
_MOST_PROGRAMS = 65535
# A side of a window that holds every key. Sums of it and of lengths stay below 2**31.
_WIDE = 2**30
# Where its dense function runs: it asks for the properties of a device "cuda", whichever has the tensors.
_DENSE_DEVICES = ("cuda",)
# The rows of a tile of its dense kernel, in all its configurations. Its causal mask is right for whole tiles.
_TILE = 128


def prepare_forward(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> Callable:
    batch, _, heads, dim = q.shape
    computes, dense = bool(q.numel() and k.numel()), _suits_dense_kernel(q, k, v, variant)
    if computes:
        _expect_32_bits(q, k, v, next(size for size in _DENSE_HEAD_DIMS if size >= dim) if dense else dim)
        if not dense:
            _expect_a_grid("q", batch, heads)
    flag_gems = _library(q)
    if not computes:
        return _nothing_is_seen
    if dense:
        return functools.partial(_dense, _own(flag_gems, "flash_attention_forward"))
    return functools.partial(_dense_as_packed, _own(flag_gems, "flash_attn_varlen_func"))


def prepare_varlen_forward(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, variant: Variant) -> Callable:
    sequences = layout.cu_seqlens_q.shape[0] - 1
    computes = bool(q.numel() and k.numel() and sequences > 0)
    if computes:
        _expect_32_bits(q, k, v, q.shape[-1])
        _expect_a_grid("cu_seqlens_q", sequences, q.shape[1])
    flag_gems = _library(q)
    if not computes:
        return _nothing_is_seen
    return functools.partial(_varlen, _own(flag_gems, "flash_attn_varlen_func"))


def explain(q: Tensor, k: Tensor, v: Tensor, variant: Variant, layout: Varlen | None = None) -> str:
    """Which of its functions computes a call that was checked; imports it."""
    prepared = prepare_forward(q, k, v, variant) if layout is None else prepare_varlen_forward(q, k, v, layout, variant)
    runs = "nothing: there are no queries, or no keys"
    if isinstance(prepared, functools.partial):
        runs = f"flag_gems {_VERSION}: {prepared.args[0].__name__}, which the caller selects"
    return f"forward: {runs}\nbackward: none: what flag_gems computes has no gradient"


def _expect_32_bits(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> None:
    """Of what is given, and of what is made of it: copies (also of what is expanded), padding and the output."""
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
        # The output has as many as q.
        _not_implemented(
            tensor.numel() // tensor.shape[-1] * head_dim <= _MOST_ELEMENTS,
            "{}: expected up to 2**31 elements for flag_gems, of a head_dim of {} as it computes with, got shape {}",
            name,
            head_dim,
            tensor,
        )


def _expect_a_grid(name: str, sequences: int, heads: int) -> None:
    _not_implemented(
        sequences <= _MOST_PROGRAMS,
        "{}: expected up to {} sequences for flag_gems, which launches a program for each, got {}",
        name,
        _MOST_PROGRAMS,
        sequences,
    )
    _not_implemented(
        heads <= _MOST_PROGRAMS,
        "q: expected up to {} heads for flag_gems, which launches a program for each, got {}",
        _MOST_PROGRAMS,
        heads,
    )


def _library(q: Tensor) -> ModuleType:
    """flag_gems, where it is the one that is known here and serves q's device."""
    flag_gems = _imported()
    version = getattr(flag_gems, "__version__", "one that does not say it")
    _not_implemented(
        version == _VERSION,
        "flag_gems: expected version {}, of which is known what is right, got {}",
        _VERSION,
        version,
    )
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


def _own(flag_gems: ModuleType, name: str) -> Callable:
    function = getattr(flag_gems, name)
    module = getattr(function, "__module__", None)
    _not_implemented(
        module == _OWN, "{}: expected the function of {}, got one of {}, of which nothing is known", name, _OWN, module
    )
    return function


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
    except Exception as error:  # no device, no driver, no permission, a package too few, another version of one
        raise ImportError(
            'backend: expected an installed flag_gems that finds a device, because "flag_gems" was selected, got '
            f"{type(error).__name__}: {error}. Install it with `pip install 'flash-attn-plus[flag_gems]'`, or beside "
            "another NumPy than the 1.26.4 that it asks for with `pip install --no-deps flag_gems` and "
            "`pip install sqlalchemy pyyaml packaging`"
        ) from error


_importing = threading.Lock()


def _import() -> ModuleType:
    # What a failed import leaves behind would let the next one fail in another way, and that of another thread, too.
    with _importing:
        path, modules = list(sys.path), set(sys.modules)
        if "flag_gems" not in modules:
            modules -= {name for name in modules if name.startswith("flag_gems.")}
        try:
            import flag_gems

            for name in ("flash_attention_forward", "flash_attn_varlen_func", "device"):
                getattr(flag_gems, name)
        except BaseException:
            sys.path[:] = path
            for name in filter(_is_a_part, set(sys.modules) - modules):
                del sys.modules[name]
            raise
    return flag_gems


def _is_a_part(name: str) -> bool:
    """Whether a module is of flag_gems, which imports those of its vendors by names of their own."""
    file = getattr(sys.modules[name], "__file__", None) or ""
    return name.partition(".")[0] == "flag_gems" or f"{os.sep}flag_gems{os.sep}" in file


def _triton_version() -> str:
    import triton

    return triton.__version__


def _suits_dense_kernel(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> bool:
    """The packed kernel takes the rest, windows among it, of which the dense one drops those beyond the keys."""
    if q.device.type not in _DENSE_DEVICES:
        return False
    # flag_gems finds a compiled kernel by strides but not by lengths, and how it was compiled depends on these: strides
    # have to tell them. A kernel that is right for 128 keys would be taken for the first 100 of them.
    if any(x.stride() != _strides_of_new(x) for x in (q, k, v)):
        return False
    if q.shape[0] * q.shape[2] > _MOST_PROGRAMS:
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
