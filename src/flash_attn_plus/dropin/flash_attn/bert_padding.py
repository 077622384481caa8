"""``flash_attn.bert_padding``: between padded and packed batches (flash_attn_plus/padding.py)."""

from __future__ import annotations

from torch import Tensor

from flash_attn_plus.as_flash_attn import not_served
from flash_attn_plus.padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`index_first_axis`, and ``input`` itself: the gradients of both are added up."""
    return index_first_axis(input, indices), input.view_as(input)


__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]

__getattr__ = not_served(__name__, __all__)
