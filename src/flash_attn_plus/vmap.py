"""``torch.vmap`` of the operators.

Dense attention folds the mapped axis into the batch: one call, no copy of a tensor whose mapped axis comes
first; so does a dense rotation. Whatever a fold would change is mapped one entry at a time: dropout (its counters
hold the batch index), tables of angles and packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .library import LIBRARY, OPERATORS, bind, has_bias_gradient, overload, parse, written_arguments
from .schemas import NAMESPACE, Variant


def _fold(tensor: Tensor, mapped_axis: int | None, size: int) -> Tensor:
    """(..., N, ...) -> (N * b, ...); an entry that is not mapped is repeated without copying where strides allow."""
    if mapped_axis is None:
        tensor = tensor.unsqueeze(0).expand(size, *tensor.shape)
    else:
        tensor = tensor.movedim(mapped_axis, 0)
    return tensor.flatten(0, 1)


def _fold_per_head(tensor: Tensor | None, mapped_axis: int | None, size: int, batch: int) -> Tensor | None:
    """Slopes and sinks, (h,) or (b, h) -> (h,) where that still says it all, else (N * b, h)."""
    if tensor is None or (mapped_axis is None and tensor.dim() == 1):
        return tensor
    if mapped_axis is None:
        tensor = tensor.unsqueeze(0)
    else:
        tensor = tensor.movedim(mapped_axis, 0)
        if tensor.dim() == 2:
            tensor = tensor.unsqueeze(1)
    return tensor.expand(size, batch, tensor.shape[-1]).flatten(0, 1)


def _fold_bias(bias: Tensor | None, mapped_axis: int | None, size: int, batch: int, per_entry: bool) -> Tensor | None:
    """(b or 1, ...) -> (N * b, ...), or as it is where one bias serves all and no gradient is asked per entry."""
    if bias is None or (mapped_axis is None and bias.shape[0] == 1 and not per_entry):
        return bias
    bias = bias.unsqueeze(0) if mapped_axis is None else bias.movedim(mapped_axis, 0)
    return bias.expand(size, batch, *bias.shape[2:]).flatten(0, 1)


def _fold_variant(variant: Variant, axes: Variant, size: int, batch: int, per_entry: bool) -> Variant:
    return variant._replace(
        alibi_slopes=_fold_per_head(variant.alibi_slopes, axes.alibi_slopes, size, batch),
        sink=_fold_per_head(variant.sink, axes.sink, size, batch),
        attn_bias=_fold_bias(variant.attn_bias, axes.attn_bias, size, batch, per_entry),
    )


def _batch_size(q: Tensor, mapped_axis: int | None) -> int:
    """The inner batch, beside the mapped axis."""
    return q.shape[0] if mapped_axis is None or mapped_axis > 0 else q.shape[1]


def _one_by_one(name: str, size: int, in_dims: tuple, args: tuple):
    op = overload(name)

    def entry(i: int):
        return op(*(arg if axis is None else arg.select(axis, i) for arg, axis in zip(args, in_dims, strict=True)))

    if size == 0:  # the shapes of the results, from one entry of zeros
        args = tuple(
            arg if axis is None else arg.new_zeros([1 if i == axis else n for i, n in enumerate(arg.shape)])
            for arg, axis in zip(args, in_dims, strict=True)
        )
    entries = [entry(i) for i in range(max(size, 1))]
    if isinstance(entries[0], Tensor):
        return (torch.stack(entries) if size else entries[0].new_empty((0, *entries[0].shape))), 0
    if size == 0:
        return tuple(part.new_empty((0, *part.shape)) for part in entries[0]), (0,) * len(entries[0])
    return tuple(torch.stack(parts) for parts in zip(*entries, strict=True)), (0,) * len(entries[0])


def _bind(name: str, in_dims: tuple, args: tuple) -> tuple[tuple, tuple]:
    args = bind(name, args)
    return in_dims + (None,) * (len(args) - len(in_dims)), args


def _fwd(info, in_dims, *args):
    in_dims, args = _bind("fwd", in_dims, args)
    *qkv, variant = parse("fwd", args)
    *qkv_axes, axes = parse("fwd", in_dims)
    size = info.batch_size
    if variant.dropout_p > 0.0:
        return _one_by_one("fwd", size, in_dims, args)
    batch = _batch_size(qkv[0], qkv_axes[0])
    folded = (_fold(tensor, axis, size) for tensor, axis in zip(qkv, qkv_axes, strict=True))
    folded_variant = _fold_variant(variant, axes, size, batch, per_entry=False)
    results = overload("fwd")(*folded, **folded_variant._asdict())
    return tuple(result.unflatten(0, (size, batch)) for result in results), (0, 0)


def _bwd(info, in_dims, *args):
    in_dims, args = _bind("bwd", in_dims, args)
    *saved, variant, need_dq, need_dkv, need_dbias = parse("bwd", args)
    *saved_axes, axes, _, _, _ = parse("bwd", in_dims)
    size = info.batch_size
    if variant.dropout_p > 0.0:
        return _one_by_one("bwd", size, in_dims, args)
    batch = _batch_size(saved[1], saved_axes[1])
    need_dbias = need_dbias and has_bias_gradient(variant.attn_bias)
    folded = (
        tensor if tensor is None else _fold(tensor, axis, size) for tensor, axis in zip(saved, saved_axes, strict=True)
    )
    folded_variant = _fold_variant(variant, axes, size, batch, per_entry=need_dbias)
    needs = {"need_dq": need_dq, "need_dkv": need_dkv, "need_dbias": need_dbias}
    *grads, dbias = overload("bwd")(*folded, **folded_variant._asdict(), **needs)
    exists = (need_dq, need_dkv, need_dkv, variant.sink is not None)
    grads = [grad.unflatten(0, (size, batch)) if e else grad for grad, e in zip(grads, exists, strict=True)]
    if need_dbias:
        dbias = dbias.unflatten(0, (size, batch))
        bias_batch_axis = 0 if axes.attn_bias is None or axes.attn_bias > 0 else 1
        if variant.attn_bias.shape[bias_batch_axis] == 1:
            dbias = dbias.sum(1, keepdim=True)
    return (*grads, dbias), tuple(0 if e else None for e in (*exists, need_dbias))


def _rotary(info, in_dims, *args):
    in_dims, args = _bind("rotary", in_dims, args)
    (x, rotation), (x_axis, axes) = parse("rotary", args), parse("rotary", in_dims)
    size = info.batch_size
    if rotation.cu_seqlens is not None or axes.cos is not None or axes.sin is not None:
        return _one_by_one("rotary", size, in_dims, args)
    offsets = rotation.seqlen_offsets
    if offsets is not None:
        rotation = rotation._replace(seqlen_offsets=_fold(offsets, axes.seqlen_offsets, size))
    out = overload("rotary")(_fold(x, x_axis, size), *rotation)
    return out.unflatten(0, (size, _batch_size(x, x_axis))), 0


def _each(name: str) -> Callable:
    def rule(info, in_dims, *args):
        in_dims, args = _bind(name, in_dims, args)
        return _one_by_one(name, info.batch_size, in_dims, args)

    return rule


def _none(name: str) -> Callable:
    def rule(info, in_dims, *args):
        raise NotImplementedError(f"flash_attn_plus::{name} writes into its arguments and has no vmap")

    return rule


def _register() -> None:
    rules = {"fwd": _fwd, "bwd": _bwd, "rotary": _rotary}
    for name in OPERATORS:
        rule = rules.get(name) or (_none(name) if written_arguments(name) else _each(name))
        torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=LIBRARY)


_register()
