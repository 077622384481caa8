"""Every argument error, said once: the argument, what was expected, what came.

The checks read shapes, dtypes, strides and devices, never values, so the same functions run in the fake
implementations (symbolic shapes), on the meta device and before every launch. Only ``varlen_values`` reads
values; it is for devices whose tensors the host can read without waiting.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .schemas import Variant, Varlen

MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _fail(check, condition, template: str, args: tuple) -> None:
    """Raise through torch's ``check``: a symbolic condition becomes a guard or a run-time assertion instead."""
    check(condition, lambda: template.format(*(tuple(x.shape) if isinstance(x, Tensor) else x for x in args)))


# What holds costs one call and one comparison: a message is made only to be raised, and shows tensors as their shapes.


def _value(condition, template: str, *args) -> None:
    if condition is not True:
        _fail(torch._check_value, condition, template, args)


def _type(condition, template: str, *args) -> None:
    if condition is not True:
        _fail(torch._check_type, condition, template, args)


def _not_implemented(condition, template: str, *args) -> None:
    if condition is not True:
        _fail(torch._check_not_implemented, condition, template, args)


def _expect_shape(name: str, tensor: Tensor, meaning: str, *expected) -> None:
    """``tensor`` has exactly the expected sizes; ``meaning`` names the axes."""
    _value(
        tensor.dim() == len(expected),
        "{}: expected {} dimensions {}, got {} (shape {})",
        name,
        len(expected),
        meaning,
        tensor.dim(),
        tensor,
    )
    for size, want in zip(tensor.shape, expected, strict=True):
        _value(size == want, "{}: expected shape {} = {}, got {}", name, meaning, expected, tensor)


def _expect_broadcastable(name: str, tensor: Tensor, meaning: str, *full) -> None:
    _value(tensor.dim() == 4, "{}: expected 4 dimensions {}, got shape {}", name, meaning, tensor)
    for size, want in zip(tensor.shape, full, strict=True):
        _value(
            (size == 1) | (size == want),  # not `or`: it would guard on the first of two symbolic conditions
            "{}: expected each dimension of {} = {} or 1, got {}",
            name,
            meaning,
            full,
            tensor,
        )


def _expect_per_head(name: str, tensor: Tensor, batch, heads) -> None:
    """(h,) or (b, h)."""
    _value(tensor.dim() in (1, 2), "{}: expected shape (heads,) or (batch, heads), got {}", name, tensor)
    if tensor.dim() == 1:
        _expect_shape(name, tensor, "(heads,)", heads)
    else:
        _expect_shape(name, tensor, "(batch, heads)", batch, heads)


def _expect_device(name: str, tensor: Tensor, like: Tensor, whose: str = "q") -> None:
    _value(
        tensor.device == like.device, "{}: expected device {} ({}'s), got {}", name, like.device, whose, tensor.device
    )


def _qkv(q: Tensor, k: Tensor, v: Tensor, heads_axis: int, names: tuple[str, str, str] = ("q", "k", "v")) -> None:
    """What dense and varlen share: dtype, device, layout, heads and head dimensions."""
    _type(q.dtype in _DTYPES, "q: expected dtype float16, bfloat16, float32 or float64, got {}", q.dtype)
    for name, tensor in zip(names[1:], (k, v), strict=True):
        _type(tensor.dtype == q.dtype, "{}: expected dtype {} (q's), got {}", name, q.dtype, tensor.dtype)
        _expect_device(name, tensor, q)
    for name, tensor in zip(names, (q, k, v), strict=True):
        _type(tensor.layout is torch.strided, "{}: expected a strided tensor, got layout {}", name, tensor.layout)
    heads, dim = q.shape[heads_axis:]
    for name, tensor in zip(names[::2], (q, v), strict=True):
        size = tensor.shape[-1]
        _value(size >= 1, "{}: expected head_dim of at least 1, got shape {}", name, tensor)
        _not_implemented(size <= MAX_HEAD_DIM, "{}: head_dim up to {} is implemented, got {}", name, MAX_HEAD_DIM, size)
    _value(k.shape[-1] == dim, "{}: expected head_dim {} (q's), got shape {}", names[1], dim, k)
    heads_k = k.shape[-2]
    _value(heads_k >= 1, "{}: expected at least one head, got shape {}", names[1], k)
    _value(heads >= 1, "q: expected at least one head, got shape {}", q)
    _value(
        heads % heads_k == 0,
        "q: expected the number of heads to be a multiple of {}'s ({}), got {} (shape {})",
        names[1],
        heads_k,
        heads,
        q,
    )


def _variant(q: Tensor, variant: Variant, batch, heads, max_q, max_k) -> None:
    softcap, dropout_p = variant.softcap, variant.dropout_p
    _value(0.0 <= softcap < float("inf"), "softcap: expected 0 (off) or a positive number, got {}", softcap)
    _value(0.0 <= dropout_p < 1.0, "dropout_p: expected a probability in [0, 1), got {}", dropout_p)
    if dropout_p > 0.0:
        rng_state = variant.rng_state
        _value(
            rng_state is not None,
            "rng_state: expected an int64 tensor (seed, offset) because dropout_p is {}, got None",
            dropout_p,
        )
        _type(rng_state.dtype == torch.int64, "rng_state: expected dtype torch.int64, got {}", rng_state.dtype)
        _expect_shape("rng_state", rng_state, "(seed, offset)", 2)
        _expect_device("rng_state", rng_state, q)
    if (slopes := variant.alibi_slopes) is not None:
        _type(slopes.dtype == torch.float32, "alibi_slopes: expected dtype torch.float32, got {}", slopes.dtype)
        _expect_per_head("alibi_slopes", slopes, batch, heads)
        _expect_device("alibi_slopes", slopes, q)
    if (sink := variant.sink) is not None:
        _type(sink.dtype in _DTYPES, "sink: expected a floating dtype of 16, 32 or 64 bits, got {}", sink.dtype)
        _expect_per_head("sink", sink, batch, heads)
        _expect_device("sink", sink, q)
    if (bias := variant.attn_bias) is not None:
        _type(
            bias.dtype == torch.bool or bias.dtype in _DTYPES,
            "attn_bias: expected a floating dtype of 16, 32 or 64 bits or torch.bool (True keeps), got {}",
            bias.dtype,
        )
        _expect_broadcastable("attn_bias", bias, "(batch, heads, seqlen_q, seqlen_k)", batch, heads, max_q, max_k)
        _expect_device("attn_bias", bias, q)


def dense(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> None:
    """q (b, sq, h, d), k (b, sk, hk, d), v (b, sk, hk, dv)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _value(
            tensor.dim() == 4,
            "{}: expected 4 dimensions (batch, seqlen, heads, head_dim), got shape {}",
            name,
            tensor,
        )
    _qkv(q, k, v, 2)
    batch, seqlen_q, heads, _ = q.shape
    _, seqlen_k, heads_k, dim = k.shape
    _expect_shape("k", k, "(batch, seqlen_k, heads_k, head_dim)", batch, seqlen_k, heads_k, dim)
    _expect_shape("v", v, "(batch, seqlen_k, heads_k, head_dim_v)", batch, seqlen_k, heads_k, v.shape[3])
    _variant(q, variant, batch, heads, seqlen_q, seqlen_k)


def _int32(name: str, tensor: Tensor, like: Tensor, whose: str = "q") -> None:
    _type(tensor.dtype == torch.int32, "{}: expected dtype torch.int32, got {}", name, tensor.dtype)
    _expect_device(name, tensor, like, whose)


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, variant: Variant) -> None:
    """q (total_q, h, d), k (total_k, hk, d), v (total_k, hk, dv); k and v in pages where block_table is given."""
    _value(q.dim() == 3, "q: expected 3 dimensions (total_q, heads, head_dim), got shape {}", q)
    paged = layout.block_table is not None
    axes = "(num_pages, page_size, heads_k, head_dim)" if paged else "(total_k, heads_k, head_dim)"
    for name, tensor in (("k", k), ("v", v)):
        want = 4 if paged else 3
        _value(tensor.dim() == want, "{}: expected {} dimensions {}, got shape {}", name, want, axes, tensor)
    _qkv(q, k, v, 1)
    _expect_shape("v", v, axes, *k.shape[:-1], v.shape[-1])

    _value(
        layout.cu_seqlens_q.dim() == 1,
        "cu_seqlens_q: expected shape (batch + 1,), got {}",
        layout.cu_seqlens_q,
    )
    _value(
        layout.cu_seqlens_q.shape[0] >= 1,
        "cu_seqlens_q: expected shape (batch + 1,) with at least one entry, got {}",
        layout.cu_seqlens_q,
    )
    batch = layout.cu_seqlens_q.shape[0] - 1
    _int32("cu_seqlens_q", layout.cu_seqlens_q, q)
    _int32("cu_seqlens_k", layout.cu_seqlens_k, q)
    _expect_shape("cu_seqlens_k", layout.cu_seqlens_k, "(batch + 1,)", batch + 1)
    for name, length in (("max_seqlen_q", layout.max_seqlen_q), ("max_seqlen_k", layout.max_seqlen_k)):
        _value(length >= 0, "{}: expected a length of at least 0, got {}", name, length)
    for name in ("seqused_q", "seqused_k", "leftpad_k"):
        tensor = getattr(layout, name)
        if tensor is not None:
            _int32(name, tensor, q)
            _expect_shape(name, tensor, "(batch,)", batch)
    if paged:
        _int32("block_table", layout.block_table, q)
        _value(
            layout.block_table.dim() == 2,
            "block_table: expected shape (batch, max_pages), got {}",
            layout.block_table,
        )
        _expect_shape("block_table", layout.block_table, "(batch, max_pages)", batch, layout.block_table.shape[1])
        _value(k.shape[1] >= 1, "k: expected a page_size of at least 1, got shape {}", k)
        _not_implemented(layout.leftpad_k is None, "leftpad_k: expected None beside block_table, got a tensor")
    _variant(q, variant, batch, q.shape[1], layout.max_seqlen_q, layout.max_seqlen_k)


def _saved(dout: Tensor, q: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, lse_shape) -> None:
    shape = (*q.shape[:-1], v.shape[-1])
    for name, tensor in (("dout", dout), ("out", out)):
        _expect_shape(name, tensor, "of the output", *shape)
        _expect_device(name, tensor, q)
        _type(
            tensor.dtype == q.dtype or tensor.dtype == torch.float32,  # merged states are often kept in float32
            "{}: expected dtype {} (q's) or torch.float32, got {}",
            name,
            q.dtype,
            tensor.dtype,
        )
    want = lse_dtype(q)
    for name, tensor in (("lse", lse), ("dlse", dlse)):
        if tensor is not None:
            _type(tensor.dtype == want, "{}: expected dtype {}, got {}", name, want, tensor.dtype)
            _expect_shape(name, tensor, "of the log-sum-exp", *lse_shape)
            _expect_device(name, tensor, q)


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def dense_backward(dout, q, k, v, out, lse, dlse, variant: Variant, *needs: bool) -> None:
    dense(q, k, v, variant)
    _saved(dout, q, v, out, lse, dlse, (q.shape[0], q.shape[2], q.shape[1]))


def varlen_backward(dout, q, k, v, out, lse, dlse, layout: Varlen, variant: Variant, *needs: bool) -> None:
    varlen(q, k, v, layout, variant)
    _not_implemented(
        layout.block_table is None,
        "block_table: the backward of paged keys is not implemented; expected None, got a tensor",
    )
    _saved(dout, q, v, out, lse, dlse, (q.shape[1], q.shape[0]))


def _expect_writable(name: str, tensor: Tensor, instead: str = "give it memory of its own") -> None:
    """What an operator writes into."""
    # Inductor (at least to 2.13) drops such offsets of what an operator writes into: wrong without a word. Not "not
    # implemented", which Dynamo takes for a graph break, to go on inside of what is called here.
    _value(
        isinstance(tensor.storage_offset(), int),
        "{}: expected a tensor whose place in its memory does not depend on symbolic sizes, got offset {}; {}, or "
        "compile with dynamic=False",
        name,
        tensor.storage_offset(),
        instead,
    )
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        _value(
            (size <= 1) | (stride != 0),
            "{}: expected a place of its own for every element, got shape {} with strides {}",
            name,
            tensor,
            tensor.stride(),
        )


def _into(q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> None:
    """Tensors that receive gradients. That they share no memory with others is the caller's to see to."""
    for name, grad, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        if grad is not None:
            _expect_shape(name, grad, f"of {name[1]}", *like.shape)
            _expect_device(name, grad, q)
            _type(grad.dtype == q.dtype, "{}: expected dtype {} (q's), got {}", name, q.dtype, grad.dtype)
            _type(grad.layout is torch.strided, "{}: expected a strided tensor, got layout {}", name, grad.layout)
            _expect_writable(name, grad)


def dense_backward_into(dout, q, k, v, out, lse, dlse, dq, dk, dv, variant: Variant, need_dbias: bool) -> None:
    dense_backward(dout, q, k, v, out, lse, dlse, variant)
    _into(q, k, v, dq, dk, dv)


def varlen_backward_into(
    dout, q, k, v, out, lse, dlse, dq, dk, dv, layout: Varlen, variant: Variant, need_dbias: bool
) -> None:
    varlen_backward(dout, q, k, v, out, lse, dlse, layout, variant)
    _into(q, k, v, dq, dk, dv)


def _state(index: str, out: Tensor, lse: Tensor) -> None:
    """One attention state: out (b, s, h, d) with lse (b, h, s), or out (total, h, d) with lse (h, total)."""
    out_name, lse_name = f"out{index}", f"lse{index}"
    _type(out.is_floating_point(), "{}: expected a floating dtype, got {}", out_name, out.dtype)
    _type(
        lse.dtype in (torch.float32, torch.float64),
        "{}: expected dtype torch.float32 or torch.float64, got {}",
        lse_name,
        lse.dtype,
    )
    _value(
        out.dim() in (3, 4),
        "{}: expected shape (batch, seqlen, heads, head_dim) or (total, heads, head_dim), got {}",
        out_name,
        out,
    )
    if out.dim() == 4:
        _expect_shape(lse_name, lse, "(batch, heads, seqlen)", out.shape[0], out.shape[2], out.shape[1])
    else:
        _expect_shape(lse_name, lse, "(heads, total)", out.shape[1], out.shape[0])
    _value(lse.device == out.device, "{}: expected device {}, got {}", lse_name, out.device, lse.device)


def merge_states(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> None:
    _state("1", out1, lse1)
    _state("2", out2, lse2)
    _expect_shape("out2", out2, "of out1", *out1.shape)
    _value(out2.device == out1.device, "out2: expected device {} (out1's), got {}", out1.device, out2.device)


def combine(out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None) -> None:
    _value(
        out_partial.dim() in (4, 5),
        "out_partial: expected shape (splits, batch, seqlen, heads, head_dim) or (splits, total, heads, head_dim), "
        "got {}",
        out_partial,
    )
    _value(
        lse_partial.dim() == out_partial.dim() - 1,
        "lse_partial: expected {} dimensions beside out_partial {}, got shape {}",
        out_partial.dim() - 1,
        out_partial,
        lse_partial,
    )
    splits = out_partial.shape[0]
    _value(splits >= 1, "out_partial: expected at least one split, got shape {}", out_partial)
    _value(
        lse_partial.shape[0] == splits,
        "lse_partial: expected {} splits (out_partial's), got shape {}",
        splits,
        lse_partial,
    )
    _state("_partial", out_partial[0], lse_partial[0])
    if out_dtype is not None:
        _type(out_dtype.is_floating_point, "out_dtype: expected a floating dtype, got {}", out_dtype)


def varlen_values(q: Tensor, k: Tensor, layout: Varlen) -> None:
    """Lengths and page numbers, where the host can read them: nothing outside q, k and v is ever touched."""
    paged = layout.block_table is not None
    for side, cu_seqlens, used, longest, total in (
        ("q", layout.cu_seqlens_q, layout.seqused_q, layout.max_seqlen_q, q.shape[0]),
        ("k", layout.cu_seqlens_k, layout.seqused_k, layout.max_seqlen_k, k.shape[0]),
    ):
        starts = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(starts)]
        in_pages = paged and side == "k"
        _value(
            starts[0] >= 0 and all(length >= 0 for length in lengths),
            "cu_seqlens_{}: expected offsets that are not negative and never fall, got {}",
            side,
            starts,
        )
        _value(
            in_pages or starts[-1] <= total,
            "cu_seqlens_{}: expected to end at or before the {} rows of {}, got {}",
            side,
            total,
            side,
            starts[-1],
        )
        if used is not None:
            values = used.tolist()
            for length, value in zip(lengths, values, strict=True):
                _value(
                    value >= 0 and (in_pages or value <= length),
                    "seqused_{}: expected lengths between 0 and the segment's {}, got {}",
                    side,
                    length,
                    values,
                )
            lengths = values
        _value(
            max(lengths, default=0) <= longest,
            "max_seqlen_{}: expected at least the longest sequence ({}), got {}",
            side,
            max(lengths, default=0),
            longest,
        )
        if side == "k" and layout.leftpad_k is not None:
            pads = layout.leftpad_k.tolist()
            for length, pad in zip(lengths, pads, strict=True):
                _value(
                    0 <= pad <= length,
                    "leftpad_k: expected padding between 0 and the sequence's {} keys, got {}",
                    length,
                    pads,
                )
        if in_pages:
            pages, page_size = k.shape[:2]
            table = layout.block_table.tolist()
            for row, length in zip(table, lengths, strict=True):
                used_pages = row[: -(-length // page_size)]
                _value(
                    length <= len(row) * page_size,
                    "block_table: expected enough pages of {} for {} keys, got {} pages",
                    page_size,
                    length,
                    len(row),
                )
                _value(
                    all(0 <= page < pages for page in used_pages),
                    "block_table: expected page numbers between 0 and {}, got {}",
                    pages - 1,
                    used_pages,
                )
