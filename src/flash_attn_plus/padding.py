"""From a padded batch to a packed one and back, for the ``varlen`` functions.

A padded batch is ``(batch, seqlen, ...)`` with a mask that says which positions hold tokens. The packed form lays
those tokens end to end, ``(total, ...)``, beside ``cu_seqlens``, the offsets at which each sequence starts.

Names, arguments and results are those of flash-attn 2.8's ``bert_padding``. Everything here is a few differentiable
PyTorch calls (of any order, on any device). How many tokens a mask holds is known only to the device, so the two
``unpad`` functions wait for it; the results can be reused by every layer of a model, and should be. Under
``torch.compile`` without graph breaks they need ``torch._dynamo.config.capture_dynamic_output_shape_ops`` and
``capture_scalar_outputs``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` of ``input``; differentiable in ``input``.

    Args:
        input: (rows, ...), any dtype, any number of trailing dimensions.
        indices: (n,) int32 or int64, each in ``[0, rows)``; may repeat (the gradients of a repeated row add up).

    Returns:
        (n, ...), contiguous, dtype of ``input``.

    Raises:
        ValueError: ``input`` is a scalar or ``indices`` is not one-dimensional.
        TypeError: ``indices`` is not int32 or int64.
    """
    if input.dim() < 1:
        raise ValueError("input: expected (rows, ...), got a 0-d tensor")
    _check_indices(indices)
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros with ``values`` written to the rows ``indices``: the inverse of :func:`index_first_axis`.

    Args:
        values: (n, ...), any dtype, any number of trailing dimensions; differentiable.
        indices: (n,) int32 or int64, each in ``[0, first_axis_dim)`` and different from the others.
        first_axis_dim: how many rows the result has.

    Returns:
        (first_axis_dim, ...), contiguous, dtype of ``values``.

    Raises:
        ValueError: ``indices`` is not one-dimensional, or ``values`` does not have one row for each of them.
        TypeError: ``indices`` is not int32 or int64.
    """
    _check_indices(indices)
    _check_rows("values", values, indices)
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy_(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Lay the tokens of a padded batch end to end.

    Args:
        hidden_states: (batch, seqlen, ...), any number of trailing dimensions; differentiable.
        attention_mask: (batch, seqlen), bool or number; a token stands where it is not 0. The padding may lie
            left, right or in between.
        unused_mask: (batch, seqlen), bool or number; marks further positions that are allocated (they get a row in the
            packed tensor) and take no part in attention. They should follow the tokens of their sequence, because
            ``seqused`` counts from its start. A position marked by both masks is one row, and counts as used.

    Returns:
        hidden: (total, ...), the rows where either mask is set.
        indices: (total,) int64, where those rows lie in the flattened (batch * seqlen); :func:`pad_input` takes them.
        cu_seqlens: (batch + 1,) int32, where each sequence starts in ``hidden``, and at last ``total``.
        max_seqlen_in_batch: int, the longest sequence (unused positions included); 0 for a batch without tokens.
        seqused: (batch,) int32, the tokens of each sequence that ``attention_mask`` alone marks.

    Raises:
        ValueError: a shape does not fit.

    Example::

        hidden = torch.randn(2, 4, 64)                      # two sentences, padded to 4 positions
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
        x, indices, cu_seqlens, max_seqlen, _ = unpad_input(hidden, mask)
        # x (5, 64), indices [0, 1, 2, 4, 5], cu_seqlens [0, 3, 5], max_seqlen 3
        qkv = to_qkv(x).view(-1, 3, heads, head_dim)
        out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen)
        out = pad_input(out, indices, batch=2, seqlen=4)    # (2, 4, heads, head_dim), zeros at the padding
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    used = attention_mask != 0
    allocated = used
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        allocated = used | (unused_mask != 0)
    seqlens = allocated.sum(dim=1, dtype=torch.int32)
    seqused = seqlens if unused_mask is None else used.sum(dim=1, dtype=torch.int32)
    indices = _positions(allocated)
    hidden = index_first_axis(hidden_states.flatten(0, 1), indices)
    return hidden, indices, _cumulative(seqlens), _longest(seqlens), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Lay the tokens of a batch end to end whose rows each hold several sequences.

    In supervised fine-tuning, short samples are often concatenated into rows of one length. Each sample must attend to
    itself only: it becomes one sequence of the packed batch.

    Args:
        hidden_states: (batch, seqlen, ...), any number of trailing dimensions; differentiable.
        attention_mask_in_length: (batch, seqlen) int32 or int64. Row i begins with the lengths of the sequences that
            follow each other from the start of row i of ``hidden_states``; zeros fill the rest.

    Returns:
        hidden: (total, ...), the rows of all sequences.
        indices: (total,) int64, where those rows lie in the flattened (batch * seqlen); :func:`pad_input` takes them.
        cu_seqlens: (sequences + 1,) int32, where each sequence starts in ``hidden``, and at last ``total``.
        max_seqlen_in_batch: int, the longest sequence; 0 for a batch without tokens.

    Raises:
        ValueError: a shape does not fit, or the lengths of a row add up to more than ``seqlen`` (read where the
            function waits for the device anyway; not checked inside ``torch.compile``).
        TypeError: ``attention_mask_in_length`` is not int32 or int64.

    Example::

        hidden = torch.randn(3, 6, 64)
        lengths = torch.tensor([[2, 3, 0, 0, 0, 0],     # two sequences and one position of padding
                                [3, 2, 0, 0, 0, 0],
                                [6, 0, 0, 0, 0, 0]])    # one sequence fills the row
        x, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(hidden, lengths)
        # x (16, 64), cu_seqlens [0, 2, 5, 8, 10, 16], max_seqlen 6
        # indices [0, 1, 2, 3, 4,  6, 7, 8, 9, 10,  12, 13, 14, 15, 16, 17]
    """
    lengths = attention_mask_in_length
    _check_mask("attention_mask_in_length", lengths, hidden_states)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attention_mask_in_length: expected int32 or int64 lengths, got {lengths.dtype}")
    seqlen = lengths.shape[1]
    tokens_in_row = lengths.sum(dim=1)
    if not torch.compiler.is_compiling() and _longest(tokens_in_row) > seqlen:
        raise ValueError(
            f"attention_mask_in_length: expected the lengths of a row to add up to at most seqlen = {seqlen}, "
            f"got {_longest(tokens_in_row)}"
        )
    indices = _positions(torch.arange(seqlen, device=lengths.device) < tokens_in_row[:, None])
    hidden = index_first_axis(hidden_states.flatten(0, 1), indices)
    cu_seqlens = _cumulative(lengths.flatten()[_positions(lengths != 0)])
    return hidden, indices, cu_seqlens, _longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put packed rows back where :func:`unpad_input` took them from; zeros elsewhere.

    Args:
        hidden_states: (total, ...), any number of trailing dimensions; differentiable.
        indices: (total,) int32 or int64, from one of the ``unpad`` functions.
        batch: the batch size of the padded tensor.
        seqlen: the padded sequence length.

    Returns:
        (batch, seqlen, ...), contiguous, dtype of ``hidden_states``.

    Raises:
        ValueError: ``hidden_states`` does not have one row for each of the ``indices``.
        TypeError: ``indices`` is not int32 or int64.
    """
    _check_indices(indices)
    _check_rows("hidden_states", hidden_states, indices)
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _positions(mask: Tensor) -> Tensor:
    """(n,) int64: where a bool mask is set, counted over the flattened mask."""
    return mask.flatten().nonzero().flatten()


def _cumulative(lengths: Tensor) -> Tensor:
    """(n,) lengths -> (n + 1,) int32 offsets, the first one 0."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: Tensor) -> int:
    # A host read, as flash-attn's: callers want an int, and nonzero has already waited for the device.
    return int(lengths.max().item()) if lengths.numel() else 0


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if hidden_states.dim() < 2:
        raise ValueError(f"hidden_states: expected (batch, seqlen, ...), got shape {tuple(hidden_states.shape)}")
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name}: expected shape {tuple(hidden_states.shape[:2])}, the first two dimensions of hidden_states, "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != hidden_states.device:
        raise ValueError(f"{name}: expected device {hidden_states.device} as hidden_states, got {mask.device}")


def _check_indices(indices: Tensor) -> None:
    if indices.dim() != 1:
        raise ValueError(f"indices: expected one dimension, got shape {tuple(indices.shape)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: expected int32 or int64, got {indices.dtype}")


def _check_rows(name: str, rows: Tensor, indices: Tensor) -> None:
    if rows.dim() < 1 or rows.shape[0] != indices.shape[0]:
        raise ValueError(
            f"{name}: expected one row for each of the {indices.shape[0]} indices, got shape {tuple(rows.shape)}"
        )
