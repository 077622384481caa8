"""The blocks that rowblocks.py works in, and their scores.

Axes: b sequence, hk key head, g query head within a key head's group (head number = hk * group size + g), sq query row,
sk key column, d. The query side is viewed as (b, hk, g, sq, ...), the key side as (b, hk, sk, ...), and what belongs to
scores (ALiBi slopes, bias, sink, the log-sum-exp) as (b, hk, g, sq, sk), any axis of which may be 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import keep_mask
from .schemas import Variant, band

# More rows waste work at the edges of a window, fewer leave the matrix products thin.
BLOCK_ROWS = 128
# No temporary is larger, but for two that O(s) memory allows: one head's keys (values, or their gradients) in the
# computing dtype, and one row of one head's scores, which is never the larger of the two: columns need no splitting.
BUDGET_BYTES = 8 << 20

MINUS_INF = -math.inf


def computing_dtype(x: Tensor) -> torch.dtype:
    """What is computed and accumulated in; also the dtype of the log-sum-exp."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Block(NamedTuple):
    """Some rows of some heads of some sequences, against the keys that their band lets them see."""

    batch: slice
    heads_k: slice
    group: slice
    rows: slice
    columns: slice
    local: slice  # the columns as rows of the chunk's keys

    @property
    def of_queries(self) -> tuple[slice, ...]:
        return self[:4]

    def of_scores(self, x: Tensor) -> Tensor:
        return x[tuple(part if size > 1 else slice(None) for part, size in zip(self[:5], x.shape, strict=True))]


class Chunk(NamedTuple):
    """Key heads that are loaded together, and the blocks of all rows that meet them."""

    of_keys: tuple[slice, slice, slice]
    keys: Tensor  # (b * hk, columns, d), computing dtype
    values: Tensor  # (b * hk, columns, dv), computing dtype
    blocks: list[Block]


class Attention(NamedTuple):
    """A dense batch: sequence n of it is number ``first + n`` of the caller's."""

    q: Tensor
    k: Tensor
    v: Tensor
    first: int
    variant: Variant
    scale: float
    left: int
    right: int
    diagonal: int
    alibi: Tensor | None
    bias: Tensor | None
    sink: Tensor | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, variant: Variant, first: int = 0) -> Attention:
        """From q (b, sq, h, d), k (b, sk, hk, d), v (b, sk, hk, dv) and the caller's variant."""
        views = cls(
            q=q.transpose(1, 2).unflatten(1, (k.shape[2], q.shape[2] // k.shape[2])),
            k=k.transpose(1, 2),
            v=v.transpose(1, 2),
            first=first,
            variant=variant,
            scale=q.shape[-1] ** -0.5 if variant.softmax_scale is None else variant.softmax_scale,
            **dict(zip(("left", "right", "diagonal"), band(variant, q.shape[1], k.shape[1]), strict=True)),
            alibi=None,
            bias=None,
            sink=None,
        )
        return views._replace(
            alibi=views.per_head(variant.alibi_slopes),
            bias=views.per_score(variant.attn_bias),
            sink=views.per_head(variant.sink),
        )

    def query_side(self, x: Tensor) -> Tensor:
        """(b, sq, h, ...) -> (b, hk, g, sq, ...)"""
        return x.transpose(1, 2).unflatten(1, self.q.shape[1:3])

    def per_row(self, x: Tensor) -> Tensor:
        """(b, h, sq) -> (b, hk, g, sq, 1)"""
        return x.unflatten(1, self.q.shape[1:3]).unsqueeze(-1)

    def per_head(self, x: Tensor | None) -> Tensor | None:
        """The caller's (h,) or (b, h) -> (b or 1, hk, g, 1, 1)"""
        return None if x is None else self.per_score((x[None] if x.ndim == 1 else x)[..., None, None])

    def per_score(self, x: Tensor | None) -> Tensor | None:
        """The caller's (b, h, sq, sk), any of them 1 -> (b, hk, g, sq, sk), any of them 1"""
        if x is None:
            return None
        if x.shape[0] > 1:
            x = x.narrow(0, self.first, self.q.shape[0])
        return x.unsqueeze(2) if x.shape[1] == 1 else x.unflatten(1, self.q.shape[1:3])

    def visible(self, rows: slice) -> slice:
        """The keys that at least one of the rows sees."""
        seqlen_k = self.k.shape[2]
        start = max(0, rows.start + self.diagonal - self.left) if self.left >= 0 else 0
        stop = min(seqlen_k, rows.stop + self.diagonal + self.right) if self.right >= 0 else seqlen_k
        return slice(start, stop) if start < stop else slice(0, 0)

    def chunks(self) -> Iterator[Chunk]:
        """Every row of every head once: blocks of one chunk share its key heads, and no two chunks share one."""
        batch, heads_k, group, seqlen_q = self.q.shape[:4]
        span = self.visible(slice(0, seqlen_q))
        tile_batch, tile_heads_k, tile_group, tile_rows = self._tile(span.stop - span.start)
        for part, part_k in product(_parts(batch, tile_batch), _parts(heads_k, tile_heads_k)):
            of_keys = (part, part_k, span)
            blocks = []
            for part_g, rows in product(_parts(group, tile_group), _parts(seqlen_q, tile_rows)):
                columns = self.visible(rows)
                local = slice(max(columns.start - span.start, 0), max(columns.stop - span.start, 0))
                blocks.append(Block(part, part_k, part_g, rows, columns, local))
            yield Chunk(of_keys, self._load(self.k[of_keys]), self._load(self.v[of_keys]), blocks)

    def _tile(self, span: int) -> tuple[int, int, int, int]:
        """How many sequences, key heads, query heads of a group, and rows a block has, to stay within the budget."""
        batch, heads_k, group, seqlen_q = self.q.shape[:4]
        dim = max(self.q.shape[-1], self.v.shape[-1])
        budget = BUDGET_BYTES // computing_dtype(self.q).itemsize
        width = span
        if self.left >= 0 and self.right >= 0:
            width = min(span, BLOCK_ROWS + self.left + self.right)
        rows = _clamp(budget // max(width, dim), min(BLOCK_ROWS, seqlen_q))
        per_head = rows * max(width, dim)
        heads = _clamp(budget // per_head, group)
        per_head_k = max(heads * per_head, span * dim)
        # Rounding down leaves no room for a second key head beside part of a group, nor for a second sequence beside
        # part of the key heads: a tile is always a box.
        tile_heads_k = _clamp(budget // per_head_k, heads_k)
        tile_batch = _clamp(budget // (tile_heads_k * per_head_k), batch)
        return tile_batch, tile_heads_k, heads, rows

    def load_queries(self, x: Tensor, block: Block) -> Tensor:
        """A block of q, dout or out, viewed as the query side -> (b, hk, g, rows, d) in the computing dtype"""
        return x[block.of_queries].to(computing_dtype(self.q), memory_format=torch.contiguous_format)

    def _load(self, x: Tensor) -> Tensor:
        return x.to(computing_dtype(x), memory_format=torch.contiguous_format).flatten(0, 1)

    def scores(self, block: Block, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the softmax sees of a block, -inf where a row does not see a key: (b, hk, g, rows, columns).

        ``queries`` (b, hk, g, rows, d) come scaled. With a softcap, also the derivative of the capped score, else None.
        """
        scores = torch.bmm(fold(queries), keys.transpose(1, 2)).view(*queries.shape[:-1], -1)
        slope = None
        if self.variant.softcap > 0:
            scores.div_(self.variant.softcap).tanh_()
            slope = scores.square().neg_().add_(1.0)
            scores.mul_(self.variant.softcap)
        if self.alibi is not None:
            rows, columns = _numbers(block.rows, scores), _numbers(block.columns, scores)
            if abs(self.diagonal) >= 2**30:
                rows = rows.long()
            distances = (rows[:, None] - columns + self.diagonal).abs_().to(scores.dtype)
            scores.addcmul_(block.of_scores(self.alibi).to(scores.dtype), distances, value=-1)
        if self.bias is not None:
            bias = block.of_scores(self.bias)
            if bias.dtype == torch.bool:
                scores.masked_fill_(~bias, MINUS_INF)
            else:
                scores.add_(bias)
        self._hide(block, scores.flatten(0, 2))
        return scores, slope

    def _hide(self, block: Block, scores: Tensor) -> None:
        """-inf where the band of (heads, rows, columns) ends; a block that lies within it pays nothing.

        Each edge is a diagonal across the block, so only the columns that it crosses are touched. They are zeroed
        before -inf is added: that is several times faster than masked_fill_, and clears a hidden NaN too.
        """
        rows, columns = scores.shape[1:]
        ahead = block.rows.start + self.diagonal - block.columns.start  # the first row's place on the columns
        first_hidden = ahead + self.right + 1
        if self.right >= 0 and first_hidden < columns:
            from_column = max(first_hidden, 0)
            edge = scores[..., from_column:]
            hidden = scores.new_full(edge.shape[1:], MINUS_INF).triu_(first_hidden - from_column)
            edge.tril_(first_hidden - from_column - 1).add_(hidden)
        last_hidden = ahead - self.left - 1
        if self.left >= 0 and last_hidden + rows > 0:
            edge = scores[..., : last_hidden + rows]
            hidden = scores.new_full(edge.shape[1:], MINUS_INF).tril_(last_hidden)
            edge.triu_(last_hidden + 1).add_(hidden)

    def keep(self, block: Block) -> Tensor:
        """Dropout's mask of a block: (b, hk, g, rows, columns), True = keep."""
        variant, (batch, heads_k, group, _) = self.variant, self.q.shape[:4]
        numbers = torch.arange(batch * heads_k * group, device=self.q.device).view(batch, heads_k, group)
        numbers = numbers[block.of_queries[:3]] + self.first * heads_k * group
        rows, columns = (range(part.start, part.stop) for part in (block.rows, block.columns))
        mask = keep_mask(variant.rng_state, variant.dropout_p, numbers.flatten(), rows, columns, self.q.device)
        return mask.unflatten(0, numbers.shape)


def fold(x: Tensor) -> Tensor:
    """(b, hk, g, rows, n) -> (b * hk, g * rows, n): one matrix per key head."""
    return x.flatten(0, 1).flatten(1, 2)


def _parts(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _clamp(size: int, limit: int) -> int:
    return max(1, min(size, limit))


def _numbers(part: slice, like: Tensor) -> Tensor:
    return torch.arange(part.start, part.stop, dtype=torch.int32, device=like.device)
