"""The operators on a CPU: for each call the fastest of three implementations that computes exactly this.

- **native**: the C++ kernel of csrc/, where the library was built. Forward only.
- **aten**: PyTorch's own CPU flash kernel (``aten::_scaled_dot_product_flash_attention_for_cpu``). It lines causal
  masks up at the top left, knows no windows, takes one head_dim for k and v, gives no gradient through the
  log-sum-exp, and must not be called with an empty sequence.
- **row blocks**: plain PyTorch (rowblocks.py), for everything else.

``choose_forward`` and ``choose_backward`` decide from shapes, dtypes and options, and say why; ``explain`` prints
what they say, and the first call of a signature logs it where it is row blocks.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from . import cache, checks, checks_cache, checks_rotary, into, log, native, rotate, rowblocks, states
from .schemas import Cache, New, Rotation, Variant, Varlen, band
from .strides import contiguous_rows

combine = states.combine
merge_states = states.merge_states

_aten_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_aten_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Choice(NamedTuple):
    implementation: str  # "native", "aten" or "row blocks"
    reason: str


def _feature(variant: Variant) -> str | None:
    """The first option in use that only row blocks compute."""
    for name in ("softcap", "alibi_slopes", "attn_bias", "sink", "dropout_p"):
        value = getattr(variant, name)
        if isinstance(value, Tensor) or value:
            return name
    return None


def _scale(q: Tensor, variant: Variant) -> float:
    return q.shape[-1] ** -0.5 if variant.softmax_scale is None else variant.softmax_scale


def _why_not_aten(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> str | None:
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if 0 in (q.shape[0], seqlen_q, seqlen_k):
        return "it must not be called with an empty sequence"
    if q.shape[3] != v.shape[3]:
        return "it takes one head_dim for k and v"
    left, right, diagonal = band(variant, seqlen_q, seqlen_k)
    if left >= 0 or right > 0:
        return "it has no windows"
    if right == 0 and diagonal != 0:
        return "it lines causal masks up at the top left"
    if right == 0 and not _scale(q, variant) > 0:
        return "it scales after it masks, which makes NaN of -inf times 0 or less"
    return None


def _why_not_native(q: Tensor) -> str | None:
    if q.dtype == torch.float64:
        return "it has no float64"
    if not native.loaded():
        return native.status()
    return None


def _has_16_bit_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies 16-bit matrices in hardware; without, PyTorch's products are 30 times slower."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype != torch.float16


def _has_matrix_units(dtype: torch.dtype) -> bool:
    """AMX multiplies bfloat16 tiles an order faster than the vector units that the native kernel uses."""
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def _only_row_blocks(what: str) -> Choice:
    return Choice("row blocks", f"only they compute {what}")


def choose_forward(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> Choice:
    if feature := _feature(variant):
        return _only_row_blocks(feature)
    not_native, not_aten = _why_not_native(q), _why_not_aten(q, k, v, variant)
    if not_native is None and not (not_aten is None and _has_matrix_units(q.dtype)):
        return Choice("native", "the C++ kernel computes this and is the fastest here")
    if not_aten is None:
        reason = f"native: {not_native}" if not_native else "its 16-bit products run on matrix units"
        return Choice("aten", f"PyTorch's CPU flash kernel computes exactly this ({reason})")
    return Choice("row blocks", f"native: {not_native}; aten: {not_aten}")


def choose_backward(q: Tensor, k: Tensor, v: Tensor, dlse: Tensor | None, variant: Variant) -> Choice:
    if feature := _feature(variant):
        return _only_row_blocks(feature)
    not_aten = _why_not_aten(q, k, v, variant)
    if not_aten is None and dlse is not None:
        not_aten = "it has no gradient through lse"
    if not_aten is None and not _has_16_bit_products(q.dtype):
        not_aten = f"this CPU has no fast {q.dtype} products and row blocks compute in float32"
    if not_aten is None:
        return Choice("aten", "PyTorch's CPU flash kernel computes exactly this")
    return Choice("row blocks", f"native: it has no backward; aten: {not_aten}")


def forward(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    implementation = choose_forward(q, k, v, variant).implementation
    if implementation == "row blocks":
        return rowblocks.forward(q, k, v, variant)
    q, k, v, scale = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), _scale(q, variant)
    left, right, diagonal = band(variant, q.shape[1], k.shape[1])
    if implementation == "native":
        return torch.ops.flash_attn_plus._cpu_forward.default(q, k, v, scale, left, right, diagonal)
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, lse = _aten_forward(*heads_first, 0.0, right == 0, scale=scale)
    return _own(out.transpose(1, 2)), _own(lse)


def _own(x: Tensor) -> Tensor:
    """Contiguous and no view: a view that was made without gradients must not be changed in place later."""
    x = x.contiguous()
    return x.clone() if x._is_view() else x


def backward(dout, q, k, v, out, lse, dlse, variant: Variant, need_dq: bool, need_dkv: bool, need_dbias: bool):
    if choose_backward(q, k, v, dlse, variant).implementation == "row blocks":
        return rowblocks.backward(dout, q, k, v, out, lse, dlse, variant, need_dq, need_dkv, need_dbias)
    _, right, _ = band(variant, q.shape[1], k.shape[1])
    heads_first = (contiguous_rows(tensor.to(q.dtype)).transpose(1, 2) for tensor in (dout, q, k, v, out))
    # Rows that the caller marks as padding have lse -inf; with +inf all of their weights are exactly 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    grads = _aten_backward(*heads_first, lse, 0.0, right == 0, scale=_scale(q, variant))
    needs = (need_dq, need_dkv, need_dkv)
    dq, dk, dv = (
        g.transpose(1, 2).contiguous() if need else q.new_empty(0) for g, need in zip(grads, needs, strict=True)
    )
    return dq, dk, dv, q.new_empty(0), q.new_empty(0)


def _dense_by_sequence(layout: Varlen, variant: Variant) -> bool:
    """Whether sequences may run as dense problems, by the native or the ATen kernel."""
    return layout.block_table is None and _feature(variant) is None


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, variant: Variant) -> tuple[Tensor, Tensor]:
    checks.varlen_values(q, k, layout)
    if not _dense_by_sequence(layout, variant):
        return rowblocks.varlen_forward(q, k, v, layout, variant)
    total, heads, _ = q.shape
    out = q.new_zeros((total, heads, v.shape[-1]))
    lse = q.new_full((heads, total), -torch.inf, dtype=checks.lse_dtype(q))
    for run in rowblocks.runs(layout, k):
        of_run = forward(run.queries(q), run.keys(k), run.keys(v), variant)
        run.queries(out).copy_(of_run[0])
        run.lse(lse).copy_(of_run[1])
    return out, lse


def varlen_backward(
    dout, q, k, v, out, lse, dlse, layout: Varlen, variant: Variant, need_dq: bool, need_dkv: bool, need_dbias: bool
):
    checks.varlen_values(q, k, layout)
    needs = (need_dq, need_dkv, need_dbias)
    if dlse is not None or not _dense_by_sequence(layout, variant):
        return rowblocks.varlen_backward(dout, q, k, v, out, lse, dlse, layout, variant, *needs)
    dq = q.new_zeros(q.shape if need_dq else 0)
    dk, dv = (t.new_zeros(t.shape if need_dkv else 0) for t in (k, v))
    for run in rowblocks.runs(layout, k):
        saved = (run.queries(dout), run.queries(q), run.keys(k), run.keys(v), run.queries(out), run.lse(lse))
        of_run = backward(*saved, None, variant, *needs)
        if need_dq:
            run.queries(dq).copy_(of_run[0])
        if need_dkv:
            run.keys(dk).copy_(of_run[1])
            run.keys(dv).copy_(of_run[2])
    return dq, dk, dv, q.new_empty(0), q.new_empty(0)


backward_into = into.copying(backward)
varlen_backward_into = into.copying(varlen_backward)


def rotary(x: Tensor, rotation: Rotation) -> Tensor:
    checks_rotary.values(x, rotation)
    return rotate.rotary(x, rotation)


def rotary_(x: Tensor, rotation: Rotation) -> None:
    checks_rotary.values(x, rotation)
    rotate.rotary_(x, rotation)


def append_kv(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, new: New) -> None:
    checks_cache.values(k_cache, new.cache_seqlens, k.shape[1], new.cache_batch_idx, None, new.block_table)
    cache.append_kv(k_cache, v_cache, k, v, new)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, where: Cache, variant: Variant, num_splits: int
) -> tuple[Tensor, Tensor]:
    checks_cache.values(k_cache, *where)
    return cache.decode(q, k_cache, v_cache, where, variant, num_splits, forward)


def _choices(
    q: Tensor, k: Tensor, v: Tensor, dlse: Tensor | None, variant: Variant, layout: Varlen | None
) -> tuple[Choice, Choice, str]:
    """What runs forward and backward, and a note on packed sequences."""
    note = ""
    if layout is not None:
        checks.varlen_values(q, k, layout)
        if layout.block_table is not None:
            backward = Choice("none", "the backward of paged keys is not implemented")
            return _only_row_blocks("pages"), backward, note
        run = next(iter(rowblocks.runs(layout, k)), None)
        if run is None:
            nothing = Choice("none", "there are no sequences")
            return nothing, nothing, note
        q, k, v = run.queries(q), run.keys(k), run.keys(v)
        if _dense_by_sequence(layout, variant):
            note = "sequences: as dense problems, neighbours of equal lengths together (above: the first)\n"
    return choose_forward(q, k, v, variant), choose_backward(q, k, v, dlse, variant), note


def explain(q: Tensor, k: Tensor, v: Tensor, variant: Variant, layout: Varlen | None = None) -> str:
    forward, backward, note = _choices(q, k, v, None, variant, layout)
    return (
        f"forward:  {forward.implementation}: {forward.reason}\n"
        f"backward: {backward.implementation}: {backward.reason}\n"
        f"{note}native library: {native.status()}"
    )


def say(kernel: str, *structured) -> None:
    """Log what the signature of these arguments rules out (library.py calls it when a signature is new)."""
    if not native.loaded():
        # One that is there and does not load is a fault; one that was never built is a choice.
        level = logging.INFO if native.find() is None else logging.WARNING
        log.once("native CPU library: %s", native.status(), level=level)
    if kernel == "decode":
        if feature := _feature(next(x for x in structured if isinstance(x, Variant))):
            log.once("CPU, cache: row blocks in plain PyTorch: %s", _only_row_blocks(feature).reason)
        return
    variant, layout = (next((x for x in structured if isinstance(x, part)), None) for part in (Variant, Varlen))
    direction = "backward" if "backward" in kernel else "forward"
    if direction == "backward":
        _, choice, _ = _choices(*structured[1:4], structured[6], variant, layout)
    else:
        choice, _, _ = _choices(*structured[:3], None, variant, layout)
    if choice.implementation == "row blocks":
        log.once("CPU, %s: row blocks in plain PyTorch: %s", direction, choice.reason)
