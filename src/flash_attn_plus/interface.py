"""The public functions: the names, arguments and results of flash-attn 2.8.3, over the operators of library.py.

These functions only normalise (packed tensors become views, windows become ints, dropout gets its random
state); the operators check, so a wrong argument is told in the same words however the operator is reached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import eager, library
from .schemas import Variant, Varlen

_merge_states = library.overload("merge_states")
_combine = library.overload("combine")

_OPTIONS = """dropout_p: float in [0, 1). Attention weights are dropped with this probability and the kept ones scaled
            by 1 / (1 - p). The pattern is Philox4x32-10 of (key column, query row, batch * heads + head), seeded from
            the device's default generator: the same on every device and in every backward. Pass 0.0 in evaluation.
        softmax_scale: factor on q @ k^T; default ``head_dim ** -0.5``. May be 0 or negative.
        causal: a query sees no key behind its own place. Query and key sequences of different length are lined up
            at their ends (bottom right): query i sees key j iff ``j <= i + seqlen_k - seqlen_q``.
        window_size: (left, right); query i sees key j iff
            ``i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right``. Negative: unlimited.
            With ``causal`` the right window is 0.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2); 0.0 is off.
        alibi_slopes: float32 (heads,) or (batch, heads); ``-slope * |i + seqlen_k - seqlen_q - j|`` is added to the
            scores (Press et al. 2022). Not differentiable.
        deterministic: also exclude backward kernels whose result may differ from run to run.
        return_attn_probs: return (out, lse, S_dmask); S_dmask is for tests: empty without dropout, else
            (batch, heads, seqlen_q, seqlen_k rounded up to multiples of 128), magnitude exp(score - row maximum),
            negative where dropped. Takes O(seqlen ** 2) memory.
        attn_bias: added to the scores, broadcastable to (batch, heads, seqlen_q, seqlen_k) and never expanded in
            memory; a floating dtype (differentiable; may hold -inf) or bool (True keeps).
        sink: floating (heads,); one more logit per head that takes part in the softmax and has no value
            ("attention sink", Xiao et al. 2024; gpt-oss). Differentiable.
        return_lse: return (out, lse).
        backend: None, or "flag_gems": flag_gems computes the forward. There is no backward, and what it does not
            compute right raises NotImplementedError, as does what it has not: nothing else runs in its place.

    Returns:
        out, or (out, lse), or (out, lse, S_dmask). lse is the log-sum-exp of the scores (sink included), natural
        logarithm, float32 (float64 for float64 inputs), differentiable. A query that sees no key has out 0 and lse
        -inf (with a sink: lse = sink), and gradients 0.

    Raises:
        ValueError, TypeError, NotImplementedError: before anything runs, naming the argument, what was expected and
            what came."""

_VARLEN = """cu_seqlens_q: int32 (batch + 1,); sequence b holds the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q.
            Rows past the last offset are padding: out 0, lse -inf, gradients 0.
        cu_seqlens_k: int32 (batch + 1,); the same for k and v. Sequences may be empty.
        max_seqlen_q: the longest query sequence, or more: int, symbolic int or 0-d CPU tensor.
        max_seqlen_k: the longest key sequence, or more."""

_DTYPES = "float16, bfloat16 or float32, one dtype for q, k and v (float64 where the device has it)"


def _public(function: Callable) -> Callable:
    """Document the shared options, and let FX and tensor subclasses take the call (``__torch_function__``)."""
    for placeholder, text in (("{options}", _OPTIONS), ("{varlen}", _VARLEN), ("{dtypes}", _DTYPES)):
        function.__doc__ = function.__doc__ and function.__doc__.replace(placeholder, text)

    @functools.wraps(function)
    def call(*args, **kwargs):
        values = (*args, *kwargs.values())
        if has_torch_function(values):
            return handle_torch_function(call, values, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def _length(value: Any) -> Any:
    """A length or window: ints and symbolic ints stay, 0-d CPU tensors are read."""
    return int(value) if isinstance(value, Tensor) else value


def _window(window_size: Sequence) -> tuple[Any, Any]:
    if len(window_size) != 2:
        raise ValueError(f"window_size: expected (left, right), got {window_size}")
    left, right = window_size
    if type(left) is int and type(right) is int:
        return left, right
    left, right = (-1 if side is None else _length(side) for side in window_size)
    if isinstance(left, float) or isinstance(right, float):
        raise TypeError(f"window_size: expected two integers, got {window_size}")
    return left, right


def _random_state(q: Tensor, dropout_p: float) -> Tensor | None:
    """(seed, offset) from the device's default generator: no host read, safe in graphs, replayed by checkpointing."""
    if not dropout_p > 0.0:
        return None
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=q.device)


def _variant(
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence,
    softcap: float,
    alibi_slopes: Tensor | None,
    attn_bias: Tensor | None,
    sink: Tensor | None,
    dropout_p: float,
    rng_state: Tensor | None,
    deterministic: bool,
) -> Variant:
    """The functions' options as the operators take them: windows as two ints, attn_bias with four dimensions."""
    key = None
    if not torch.compiler.is_compiling() and alibi_slopes is None and attn_bias is None and sink is rng_state is None:
        key = _key(softmax_scale, causal, window_size, softcap, dropout_p, deterministic)
        known = _known_variants.get(key)
        if known is not None:
            return known
    left, right = _window(window_size)
    while attn_bias is not None and attn_bias.dim() < 4:
        attn_bias = attn_bias.unsqueeze(0)
    variant = Variant(
        *(softmax_scale, causal, left, right, None, softcap, alibi_slopes, attn_bias, sink, dropout_p, rng_state),
        deterministic,
    )
    if key is not None:
        if len(_known_variants) >= _MOST_KNOWN_VARIANTS:
            _known_variants.clear()
        _known_variants[key] = variant
    return variant


# The same object for the same options: what compares it (memory.py) need not look inside.
_known_variants: dict[tuple | None, Variant] = {}
_MOST_KNOWN_VARIANTS = 256


def _key(
    softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, dropout_p: Any, deterministic: Any
) -> tuple | None:
    """Of options that are what they should be, without dropout; None of others, which may only be equal to these."""
    if window_size.__class__ is not tuple or len(window_size) != 2:
        return None
    left, right = window_size
    if left.__class__ is not int or right.__class__ is not int or softcap.__class__ is not float:
        return None
    if causal.__class__ is not bool or deterministic.__class__ is not bool:
        return None
    if dropout_p.__class__ is not float or dropout_p != 0.0:
        return None
    if softmax_scale is not None and softmax_scale.__class__ is not float:
        return None
    return softmax_scale, causal, left, right, softcap, deterministic


def _check_returns(return_attn_probs: bool, return_lse: bool) -> None:
    if return_attn_probs and return_lse:
        raise ValueError("return_lse: expected at most one of return_lse and return_attn_probs, got both")


def _parts(name: str, packed: Tensor, count: int, axis: int, meaning: str) -> tuple[Tensor, ...]:
    """Views of q, k, v (or k, v)."""
    if packed.dim() != axis + 3 or packed.shape[axis] != count:
        raise ValueError(f"{name}: expected shape {meaning}, got {tuple(packed.shape)}")
    return packed.unbind(axis)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    joint: eager.Joint | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    attn_bias: Tensor | None,
    sink: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> Any:
    _check_returns(return_attn_probs, return_lse)
    attend = eager.fwd if backend is None else eager.selected(backend, "fwd")
    rng_state = _random_state(q, dropout_p)
    variant = _variant(
        *(softmax_scale, causal, window_size, softcap, alibi_slopes, attn_bias, sink, dropout_p, rng_state),
        deterministic,
    )
    out, lse = attend((q, k, v, variant), joint)
    if return_attn_probs:
        return out, lse, _s_dmask("s_dmask", q, k, variant)
    return (out, lse) if return_lse else out


@_public
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """softmax(q @ k^T * softmax_scale) @ v without the seqlen_q x seqlen_k matrix in memory (Dao et al. 2022, 2023).

    Args:
        q: (batch, seqlen_q, heads, head_dim), {dtypes}. Any strides; a last dimension that is not contiguous is copied.
        k: (batch, seqlen_k, heads_k, head_dim). heads must be a multiple of heads_k: MQA and GQA without copies.
        v: (batch, seqlen_k, heads_k, head_dim_v). head_dim and head_dim_v up to 256; they may differ.
        {options}

    Shapes: out (batch, seqlen_q, heads, head_dim_v), lse (batch, heads, seqlen_q).
    """
    return _dense(
        *(q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        *(return_attn_probs, attn_bias, sink, return_lse, backend),
    )


def _s_dmask(function: str, q: Tensor, k: Tensor, variant: Variant, *layout: Varlen) -> Tensor:
    from . import reference

    if variant.dropout_p == 0.0:
        return q.new_empty((0,))
    with torch.no_grad():
        return getattr(reference, function)(q, k, *layout, variant)


@_public
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """:func:`flash_attn_func` with keys and values in one tensor; its gradient is one tensor too.

    Args:
        q: (batch, seqlen_q, heads, head_dim), {dtypes}.
        kv: (batch, seqlen_k, 2, heads_k, head_dim).
        {options}

    Shapes: out (batch, seqlen_q, heads, head_dim), lse (batch, heads, seqlen_q).
    """
    k, v = _parts("kv", kv, 2, 2, "(batch, seqlen_k, 2, heads_k, head_dim)")
    return _dense(
        *(q, k, v, (q, kv), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        *(return_attn_probs, attn_bias, sink, return_lse, backend),
    )


@_public
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """:func:`flash_attn_func` with queries, keys and values in one tensor; its gradient is one tensor too.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), {dtypes}.
        {options}

    Shapes: out (batch, seqlen, heads, head_dim), lse (batch, heads, seqlen).
    """
    q, k, v = _parts("qkv", qkv, 3, 2, "(batch, seqlen, 3, heads, head_dim)")
    return _dense(
        *(q, k, v, (qkv, None), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        *(return_attn_probs, attn_bias, sink, return_lse, backend),
    )


def _layout(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: Any, max_seqlen_k: Any, *options: Tensor | None
) -> Varlen:
    return Varlen(cu_seqlens_q, cu_seqlens_k, _length(max_seqlen_q), _length(max_seqlen_k), *options)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Varlen,
    joint: eager.Joint | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    attn_bias: Tensor | None,
    sink: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> Any:
    _check_returns(return_attn_probs, return_lse)
    attend = eager.varlen_fwd if backend is None else eager.selected(backend, "varlen_fwd")
    rng_state = _random_state(q, dropout_p)
    variant = _variant(
        *(softmax_scale, causal, window_size, softcap, alibi_slopes, attn_bias, sink, dropout_p, rng_state),
        deterministic,
    )
    out, lse = attend((q, k, v, layout, variant), joint)
    if return_attn_probs:
        return out, lse, _s_dmask("varlen_s_dmask", q, k, variant, layout)
    return (out, lse) if return_lse else out


@_public
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    attn_bias: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """:func:`flash_attn_func` over sequences of different length, packed one behind the other without padding.

    Args:
        q: (total_q, heads, head_dim), {dtypes}.
        k: (total_k, heads_k, head_dim), or (num_pages, page_size, heads_k, head_dim) with block_table.
        v: (total_k, heads_k, head_dim_v), or in pages as k.
        {varlen}
        {options}
        block_table: int32 (batch, max_pages); key j of sequence b is row ``j % page_size`` of page
            ``block_table[b, j // page_size]``. Any page size. Forward only.
        seqused_q: int32 (batch,); only the first seqused_q[b] rows of a sequence count, the rest is padding.
        seqused_k: int32 (batch,); only the first seqused_k[b] keys of a sequence count (leftpad_k included).
        leftpad_k: int32 (batch,); the first leftpad_k[b] keys of a sequence are padding. Not with block_table.

    Shapes: out (total_q, heads, head_dim_v), lse (heads, total_q). Positions (causal, windows, ALiBi, attn_bias)
    count from the first row of each sequence; attn_bias is broadcastable to
    (batch, heads, max_seqlen_q, max_seqlen_k).
    """
    layout = _layout(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, leftpad_k, block_table
    )
    return _varlen(
        *(q, k, v, layout, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        *(return_attn_probs, attn_bias, sink, return_lse, backend),
    )


@_public
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """:func:`flash_attn_varlen_func` with keys and values in one tensor; its gradient is one tensor too.

    Args:
        q: (total_q, heads, head_dim), {dtypes}.
        kv: (total_k, 2, heads_k, head_dim).
        {varlen}
        {options}

    Shapes: out (total_q, heads, head_dim), lse (heads, total_q).
    """
    k, v = _parts("kv", kv, 2, 1, "(total_k, 2, heads_k, head_dim)")
    layout = _layout(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _varlen(
        *(q, k, v, layout, (q, kv), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        *(deterministic, return_attn_probs, attn_bias, sink, return_lse, backend),
    )


@_public
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attn_bias: Tensor | None = None,
    sink: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """:func:`flash_attn_varlen_func` with queries, keys and values in one tensor; its gradient is one tensor too.

    Args:
        qkv: (total, 3, heads, head_dim), {dtypes}.
        cu_seqlens: int32 (batch + 1,); sequence b holds the rows cu_seqlens[b] to cu_seqlens[b + 1]. Rows past the
            last offset are padding: out 0, lse -inf, gradients 0. Sequences may be empty.
        max_seqlen: the longest sequence, or more: int, symbolic int or 0-d CPU tensor.
        {options}

    Shapes: out (total, heads, head_dim), lse (heads, total).
    """
    q, k, v = _parts("qkv", qkv, 3, 1, "(total, 3, heads, head_dim)")
    layout = _layout(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _varlen(
        *(q, k, v, layout, (qkv, None), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        *(deterministic, return_attn_probs, attn_bias, sink, return_lse, backend),
    )


@_public
def merge_states(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """One attention state from two that were computed over disjoint sets of keys (ring attention, split prompts).

    lse = log(exp(lse1) + exp(lse2)) and out = exp(lse1 - lse) * out1 + exp(lse2 - lse) * out2. Differentiable in all
    four. A sink belongs to exactly one of the two.

    Args:
        out1, out2: (batch, seqlen, heads, head_dim) or (total, heads, head_dim), any floating dtype.
        lse1, lse2: (batch, heads, seqlen) or (heads, total), float32 or float64, as the attention functions return.

    Returns:
        (out, lse), contiguous; out in the wider dtype of out1 and out2. Rows that neither state has seen (lse -inf)
        stay 0 and -inf.
    """
    return _merge_states(out1, lse1, out2, lse2)


@_public
def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One attention state from n that were computed over disjoint sets of keys (split-KV): merge_states for many.

    The log-sum-exps lie as the attention functions return them, heads before rows. (flash-attn 3 has a function of this
    name that takes them with rows before heads: transpose those first.) A part that has seen nothing (lse -inf) may
    hold anything.

    Args:
        out_partial: (n, batch, seqlen, heads, head_dim) or (n, total, heads, head_dim), any floating dtype: the
            stacked outputs of the attention functions.
        lse_partial: (n, batch, heads, seqlen) or (n, heads, total), float32 or float64: their stacked log-sum-exps.
        out: receives the output, of the output's shape.
        out_dtype: dtype of the output; default out_partial's (out's where out is given).

    Returns:
        (out, lse). Differentiable in out_partial and lse_partial.
    """
    if out is None:
        return _combine(out_partial, lse_partial, out_dtype)
    if out.shape != out_partial.shape[1:]:
        raise ValueError(f"out: expected shape {tuple(out_partial.shape[1:])}, got {tuple(out.shape)}")
    combined, lse = _combine(out_partial, lse_partial, out_dtype or out.dtype)
    return out.copy_(combined), lse


@_public
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    *,
    attn_bias: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> str:
    """What runs for this call on this device, forward and backward, and why. Computes nothing.

    Takes the arguments of :func:`flash_attn_func`, or of :func:`flash_attn_varlen_func` (by name) where
    cu_seqlens_q is given, and raises what they would raise. A backend that is selected, by its argument or by
    :class:`use_backend`, is imported.

    Example::

        >>> print(flash_attn_plus.explain(q, k, v, causal=True))
    """
    # Any state has the right shape; drawing one would change every later random number.
    rng_state = q.new_empty((2,), dtype=torch.int64) if dropout_p > 0.0 else None
    if backend is not None:
        eager.selected(backend, "fwd")  # raises where there is none
    variant = _variant(
        *(softmax_scale, causal, window_size, softcap, alibi_slopes, attn_bias, sink, dropout_p, rng_state),
        deterministic,
    )
    if cu_seqlens_q is None:
        return library.explain(q, k, v, variant, None, backend)
    for name, value in (("cu_seqlens_k", cu_seqlens_k), ("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value is None:
            raise ValueError(f"{name}: expected a value beside cu_seqlens_q, got None")
    assert cu_seqlens_k is not None
    layout = _layout(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, leftpad_k, block_table
    )
    return library.explain(q, k, v, variant, layout, backend)
