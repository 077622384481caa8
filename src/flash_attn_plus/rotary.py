"""Rotary position embedding: the names, arguments and results of flash-attn 2.8.3's ``layers.rotary``.

The functions make views of packed tensors and choose the operator, ``rotary`` or ``rotary_``; the operators check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checks_rotary, library
from .interface import _length, _public
from .schemas import Rotation

_rotary, _rotary_ = library.overload("rotary"), library.overload("rotary_")


def _rotation(
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    seqlen_offsets: Any,
    cu_seqlens: Tensor | None = None,
    max_seqlen: Any = None,
) -> Rotation:
    per_sequence = isinstance(seqlen_offsets, Tensor)
    return Rotation(
        *(cos, sin, 0 if per_sequence else seqlen_offsets, seqlen_offsets if per_sequence else None),
        *(cu_seqlens, _length(max_seqlen), interleaved),
    )


def _rotate_(x: Tensor, rotation: Rotation) -> None:
    if torch.compiler.is_compiling():
        # The compiler writes in place where it can. What an operator writes into, Inductor takes for the start of a
        # view whose offset is symbolic (checks_rotary.py refuses those).
        x.copy_(_rotary(x, *rotation))
    else:
        _rotary_(x, *rotation)


@_public
def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first rotary_dim columns of each row by the angles of its position (Su et al. 2021, RoFormer).

    A pair of columns (a, b) becomes (a cos - b sin, a sin + b cos), computed in float32 (float64 for float64); the
    columns behind rotary_dim are passed on unchanged. Differentiable in x, any number of times, forward-mode included.

    Args:
        x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens; float16, bfloat16, float32 or
            float64, any strides.
        cos: (seqlen_ro, rotary_dim / 2), a floating dtype, rotary_dim at most head_dim; row p is position p.
        sin: as cos.
        interleaved: a pair are columns 2j and 2j + 1 (GPT-J); else columns j and j + rotary_dim / 2 (GPT-NeoX).
        inplace: write into x and return it. As other in-place functions, not for a leaf that requires a gradient.
        seqlen_offsets: the position of a sequence's first row: int, or int32 or int64 (batch,) for each sequence its
            own. It is never read on the host; rows at positions that cos and sin do not have are passed on unchanged.
        cu_seqlens: int32 (batch + 1,); sequence b holds the rows cu_seqlens[b] to cu_seqlens[b + 1] of x. Rows of no
            sequence are passed on unchanged.
        max_seqlen: the longest sequence, or more; beside cu_seqlens. Not needed: no kernel depends on it.

    Returns:
        x's shape and dtype, contiguous; x itself with ``inplace``.

    Raises:
        ValueError, TypeError, NotImplementedError: before anything runs, naming the argument, what was expected and
            what came. Among them: an int offset with which a row of a dense batch lies past seqlen_ro.
    """
    rotation = _rotation(cos, sin, interleaved, seqlen_offsets, cu_seqlens, max_seqlen)
    if not inplace:
        return _rotary(x, *rotation)
    _rotate_(x, rotation)
    return x


@_public
def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """:func:`apply_rotary_emb` of the queries and the keys of a packed tensor, in place; the values stay.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, num_heads_q + 2 * heads_k, head_dim), any strides.
        cos, sin, interleaved, seqlen_offsets: as there.
        cos_k, sin_k: of the keys, where they are others (XPos).
        num_heads_q: the heads of the queries, where all heads lie on one axis.

    Returns:
        qkv itself.
    """
    q, k, both = _queries_and_keys(qkv, num_heads_q)
    rotation = _rotation(cos, sin, interleaved, seqlen_offsets)
    if cos_k is None and sin_k is None and both is not None:
        _rotate_(both, rotation)
        return qkv
    of_keys = rotation._replace(cos=cos if cos_k is None else cos_k, sin=sin if sin_k is None else sin_k)
    if not torch.compiler.is_compiling():
        checks_rotary.rotary(k, of_keys)  # before the queries are changed
    _rotate_(q, rotation)
    _rotate_(k, of_keys)
    return qkv


def _queries_and_keys(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views of q, of k, and of the heads of both on one axis; None where strides do not allow that."""
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ValueError(f"qkv: expected shape (batch, seqlen, 3, heads, head_dim), got {tuple(qkv.shape)}")
        heads = qkv.shape[3]
        both = None
        if qkv.stride(2) == heads * qkv.stride(3):
            both = qkv[:, :, :2].view(*qkv.shape[:2], 2 * heads, qkv.shape[4])
        return qkv[:, :, 0], qkv[:, :, 1], both
    if qkv.dim() != 4:
        raise ValueError(
            "qkv: expected shape (batch, seqlen, 3, heads, head_dim) or (batch, seqlen, num_heads_q + 2 * heads_k, "
            f"head_dim), got {tuple(qkv.shape)}"
        )
    if num_heads_q is None:
        raise ValueError(f"num_heads_q: expected the number of query heads beside qkv {tuple(qkv.shape)}, got None")
    of_keys_and_values = qkv.shape[2] - num_heads_q
    if num_heads_q < 0 or of_keys_and_values < 0 or of_keys_and_values % 2:
        raise ValueError(
            f"num_heads_q: expected {qkv.shape[2]} = num_heads_q + 2 * heads_k heads in all, got {num_heads_q}"
        )
    last = num_heads_q + of_keys_and_values // 2
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:last], qkv[:, :, :last]


@_public
def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """:func:`apply_rotary_emb` of the keys of a packed tensor, in place; the values stay.

    Args:
        kv: (batch, seqlen, 2, heads, head_dim), any strides.
        cos, sin, interleaved, seqlen_offsets: as there.

    Returns:
        kv itself.
    """
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv: expected shape (batch, seqlen, 2, heads, head_dim), got {tuple(kv.shape)}")
    _rotate_(kv[:, :, 0], _rotation(cos, sin, interleaved, seqlen_offsets))
    return kv


class RotaryEmbedding(nn.Module):
    """Rotary position embedding with its tables of cos and sin, made when they are needed and kept.

    Pair j of position p is turned by the angle ``p * base ** (-2j / dim)`` (Su et al. 2021, RoFormer). With
    ``scale_base`` queries are also scaled by ``zeta_j ** ((p - length // 2) / scale_base)`` and keys by its inverse,
    where ``zeta_j = (2j + 0.4 dim) / (1.4 dim)`` and length is that of the tables (Sun et al. 2022, XPos, where
    scale_base is 512).

    The frequencies stay float32 when the module is cast: in 16 bits, angles of far positions would be noise.

    Args:
        dim: rotary_dim, even.
        base: as above; larger ones turn more slowly.
        interleaved: which columns are a pair, as in :func:`apply_rotary_emb`.
        scale_base: as above; None is no scaling.
        device: of the frequencies.
    """

    inv_freq: Tensor  # (dim / 2,)
    scale: Tensor | None  # (dim / 2,): zeta

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", self._compute_scale(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        # Of the keys, where they are scaled otherwise.
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        # Divided like this, bit by bit the frequencies that models were trained with.
        return 1.0 / self.base ** (self._even_columns(device) / self.dim)

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor | None:
        if self.scale_base is None:
            return None
        return (self._even_columns(device) + 0.4 * self.dim) / (1.4 * self.dim)

    def _even_columns(self, device: torch.device | str | None) -> Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        """Moves the frequencies with the module, and keeps them in float32."""
        before = {"inv_freq": self.inv_freq, "scale": self.scale}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            now = getattr(self, name)
            if kept is None:
                continue
            if kept.is_meta and not now.is_meta:  # there were no values to move
                setattr(self, name, getattr(self, f"_compute_{name}")(now.device))
            elif now.dtype != torch.float32:
                setattr(self, name, kept.to(now.device))
        return self

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | None, ...]:
        """Tables of at least ``seqlen`` positions, on that device and of that dtype: cos and sin of queries, and of
        keys, None where they are the same. They are kept, but for those that a compiled graph makes, which would keep
        what its modes make.
        """
        device = self.inv_freq.device if device is None else torch.device(device)
        dtype = self.inv_freq.dtype if dtype is None else dtype
        cached, compiling = self._cos_cached, torch.compiler.is_compiling()
        if (
            cached is None
            or seqlen > self._seq_len_cached
            or cached.device != device
            or cached.dtype != dtype
            # What a mode made, as fake tensors, has no values for others.
            or not (compiling or cached.__class__ is Tensor)
        ):
            if compiling:
                return self._make_tables(seqlen, device, dtype)
            with torch.inference_mode(False):  # autograd refuses to save what was made in it
                tables = self._make_tables(seqlen, device, dtype)
            self._seq_len_cached = seqlen
            self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached = tables
        return self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached

    def _make_tables(self, seqlen: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = positions[:, None] * self.inv_freq.to(device=device, dtype=torch.float32)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            return cos.to(dtype), sin.to(dtype), None, None
        power = (positions - seqlen // 2) / self.scale_base
        scale = self.scale.to(device=device, dtype=torch.float32) ** power[:, None]
        return (cos * scale).to(dtype), (sin * scale).to(dtype), (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate queries and keys, in place.

        Args:
            qkv: as in :func:`apply_rotary_emb_qkv_`; beside kv the queries alone, (batch, seqlen, heads, head_dim).
            kv: (batch, seqlen_k, 2, heads_k, head_dim).
            seqlen_offset: the position of the first rows, int or int32 or int64 (batch,): the length of a key cache.
            max_seqlen: the positions that the tables must have. Needed where seqlen_offset is a tensor: rows at
                positions past the tables are passed on unchanged.
            num_heads_q: as in :func:`apply_rotary_emb_qkv_`.

        Returns:
            qkv, or (q, kv).
        """
        if max_seqlen is not None:
            length = _length(max_seqlen)
        elif not isinstance(seqlen_offset, Tensor):
            length = max(qkv.shape[1], 0 if kv is None else kv.shape[1]) + seqlen_offset
        else:
            length = self._seq_len_cached
            if self._cos_cached is None:
                raise ValueError(
                    "max_seqlen: expected a length beside a tensor seqlen_offset in the first call, got None"
                )
        cos, sin, cos_k, sin_k = self._update_cos_sin_cache(length, device=qkv.device, dtype=qkv.dtype)
        assert cos is not None
        assert sin is not None
        if kv is None:
            return apply_rotary_emb_qkv_(
                *(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q),
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        of_keys = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, *of_keys, self.interleaved, seqlen_offset)
