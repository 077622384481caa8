"""``flash_attn.ops.triton.rotary``: the function beneath the rotary embeddings, which rotates back as well."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_plus import library
from flash_attn_plus.as_flash_attn import not_served


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved=False,
    inplace=False,
    conjugate=False,
) -> Tensor:
    """``flash_attn_plus.apply_rotary_emb``; with ``conjugate`` by the opposite angles. In place it is not recorded by
    autograd: what calls it so has a gradient of its own.
    """
    offset, offsets = (0, seqlen_offsets) if isinstance(seqlen_offsets, Tensor) else (seqlen_offsets, None)
    arguments = (x, cos, sin, offset, offsets, cu_seqlens, max_seqlen, interleaved, conjugate)
    if not inplace:
        return library.overload("rotary")(*arguments)
    with torch.no_grad():
        library.overload("rotary_")(*arguments)
    return x


__getattr__ = not_served(__name__, ["apply_rotary"])
