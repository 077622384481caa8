"""Exact attention in plain PyTorch with O(s) memory: the implementation for devices and options without a kernel.

A block of query rows meets exactly the keys that its band lets it see, as one batched matrix product over sequences and
heads. The query heads that share a key head are folded into its rows, so keys and values are never expanded. Dense
attention is a packed batch whose sequences are all equal, and forward and backward take their scores from one function
(rowblocks_scores.py, which also names the axes).

Runs below autograd, on checked arguments. Lengths are read on the host: on an accelerator that synchronises, the price
of having no kernel there. Reruns are bit-equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .rowblocks_scores import MINUS_INF, Attention, computing_dtype, fold
from .schemas import Variant, Varlen


def forward(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """out (b, sq, h, dv) and lse (b, h, sq) of q (b, sq, h, d), k (b, sk, hk, d) and v (b, sk, hk, dv)."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), MINUS_INF, dtype=computing_dtype(q))
    _forward(Attention.of(q, k, v, variant), out, lse)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    variant: Variant,
    need_dq: bool = True,
    need_dkv: bool = True,
    need_dbias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dsink (b, h) and dbias from the arguments and results of ``forward``; what is not needed is empty.

    Stateless: any ``out`` and ``lse`` will do, so the global ones of a ring give this block's part of the gradients.
    """
    grads = _Gradients.zeros(q, k, v, variant, q.shape[0], need_dq, need_dkv, need_dbias)
    _backward(Attention.of(q, k, v, variant), dout, out, lse, dlse, grads)
    return grads.results(q, variant)


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, variant: Variant) -> tuple[Tensor, Tensor]:
    """out (total_q, h, dv) and lse (h, total_q) of q (total_q, h, d), k (total_k, hk, d) and v (total_k, hk, dv)."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), MINUS_INF, dtype=computing_dtype(q))
    for run in runs(varlen, k):
        attention = Attention.of(run.queries(q), run.keys(k), run.keys(v), variant, run.first)
        _forward(attention, run.queries(out), run.lse(lse))
    return out, lse


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    varlen: Varlen,
    variant: Variant,
    need_dq: bool = True,
    need_dkv: bool = True,
    need_dbias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``backward`` of a packed batch without pages; dsink is (batch, h)."""
    batch = varlen.cu_seqlens_q.numel() - 1
    grads = _Gradients.zeros(q, k, v, variant, batch, need_dq, need_dkv, need_dbias)
    for run in runs(varlen, k):
        attention = Attention.of(run.queries(q), run.keys(k), run.keys(v), variant, run.first)
        of_run = grads._replace(dq=run.queries(grads.dq), dk=run.keys(grads.dk), dv=run.keys(grads.dv))
        _backward(attention, run.queries(dout), run.queries(out), run.lse(lse), run.lse(dlse), of_run)
    return grads.results(q, variant)


def _forward(attention: Attention, out: Tensor, lse: Tensor) -> None:
    """Writes out (b, sq, h, dv) and lse (b, h, sq), which come filled with 0 and -inf."""
    out, lse, sink = attention.query_side(out), attention.per_row(lse), attention.sink
    if sink is not None:
        lse.copy_(sink)  # all that a row has that sees no key
    for chunk in attention.chunks():
        for block in chunk.blocks:
            if block.columns.start == block.columns.stop:
                continue
            queries = attention.load_queries(attention.q, block).mul(attention.scale)
            scores, _ = attention.scores(block, queries, chunk.keys[:, block.local])

            # Safe softmax: a bias may hide every key of any row.
            peak = scores.amax(-1, keepdim=True)
            if sink is not None:
                peak = torch.maximum(peak, block.of_scores(sink))
            peak.masked_fill_(peak == MINUS_INF, 0.0)
            weights = _exp_(scores.sub_(peak))
            total = weights.sum(-1, keepdim=True)
            if sink is not None:
                total += (block.of_scores(sink) - peak).exp_()
            lse[block.of_queries] = peak.add_(total.log())

            if attention.variant.dropout_p > 0:
                weights.mul_(attention.keep(block))
                total *= 1.0 - attention.variant.dropout_p
            total.masked_fill_(total == 0.0, 1.0)  # nothing seen, or everything dropped: 0 / 1
            summed = torch.bmm(fold(weights), chunk.values[:, block.local])
            out[block.of_queries] = summed.view(*weights.shape[:-1], -1).div_(total)


def _backward(
    attention: Attention, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, grads: _Gradients
) -> None:
    """Writes dq, dk and dv and adds to dsink and dbias, all of which come filled with 0.

    With P = exp(scores - lse), the dropped and rescaled P', dP = dropped and rescaled dout v^T, and
    delta = rowsum(dout * out) - dlse:

        dv = P'^T dout,  dS = P * (dP - delta),  dq = scale * dS k,  dk = scale * dS^T q,
        dbias = dS before the softcap's slope,  dsink = -sum over rows of exp(sink - lse) * delta.
    """
    variant, sink = attention.variant, attention.sink
    dout, out, lse = attention.query_side(dout), attention.query_side(out), attention.per_row(lse)
    dlse = None if dlse is None else attention.per_row(dlse)
    dq = None if grads.dq is None else attention.query_side(grads.dq)
    dsink, dbias = attention.per_head(grads.dsink), attention.per_score(grads.dbias)
    need_dkv = grads.dk is not None

    for chunk in attention.chunks():
        if need_dkv:
            chunk_dk, chunk_dv = torch.zeros_like(chunk.keys), torch.zeros_like(chunk.values)
        for block in chunk.blocks:
            block_dout = attention.load_queries(dout, block)
            delta = (block_dout * attention.load_queries(out, block)).sum(-1, keepdim=True)
            if dlse is not None:
                delta -= block.of_scores(dlse)
            # A row that sees no key has lse -inf: with +inf instead, all of its P are exactly 0. Its dlse is often NaN.
            block_lse = block.of_scores(lse)
            block_lse = block_lse.masked_fill(block_lse == MINUS_INF, math.inf)
            delta.masked_fill_(block_lse == math.inf, 0.0)
            if dsink is not None:
                p_sink = (block.of_scores(sink) - block_lse).exp_()
                block.of_scores(dsink).sub_((p_sink * delta).sum(-2, keepdim=True))
            if block.columns.start == block.columns.stop:
                continue

            keys, values = chunk.keys[:, block.local], chunk.values[:, block.local]
            queries = attention.load_queries(attention.q, block).mul(attention.scale)
            scores, slope = attention.scores(block, queries, keys)
            p = _exp_(scores.sub_(block_lse))
            dp = torch.bmm(fold(block_dout), values.transpose(1, 2)).view(p.shape)
            dropped = p
            if variant.dropout_p > 0:
                factor = attention.keep(block).to(p.dtype)
                factor *= 1.0 / (1.0 - variant.dropout_p)
                dp.mul_(factor)
                dropped = factor.mul_(p)
            if need_dkv:
                chunk_dv[:, block.local].baddbmm_(fold(dropped).transpose(1, 2), fold(block_dout))
            ds = dp.sub_(delta).mul_(p)
            if dbias is not None:
                block_dbias = block.of_scores(dbias)
                block_dbias += ds.sum_to_size(block_dbias.shape)
            if slope is not None:
                ds *= slope
            if need_dkv:
                chunk_dk[:, block.local].baddbmm_(fold(ds).transpose(1, 2), fold(queries))
            if dq is not None:
                dq[block.of_queries] = torch.bmm(fold(ds), keys).view(queries.shape).mul_(attention.scale)
        if need_dkv:
            for grad, part in ((grads.dk, chunk_dk), (grads.dv, chunk_dv)):
                target = grad.transpose(1, 2)[chunk.of_keys]
                target.copy_(part.view(target.shape))


def _exp_(x: Tensor) -> Tensor:
    """exp in place, and 0 below e^-80: where exp underflows, as behind a mask or far down an ALiBi slope, it is 3 to 35
    times slower on a CPU, and so are products with denormal numbers."""
    return torch.threshold_(x.clamp_(min=-80.0).exp_(), 2e-35, 0.0)


class _Gradients(NamedTuple):
    """None for what is not needed or does not exist."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dsink: Tensor | None  # (b, h), computing dtype
    dbias: Tensor | None  # attn_bias's shape, computing dtype: broadcast axes are sums of many blocks

    @classmethod
    def zeros(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        variant: Variant,
        batch: int,
        need_dq: bool,
        need_dkv: bool,
        need_dbias: bool,
    ) -> _Gradients:
        bias = variant.attn_bias
        need_dbias = need_dbias and bias is not None and bias.is_floating_point()
        return cls(
            q.new_zeros(q.shape) if need_dq else None,
            k.new_zeros(k.shape) if need_dkv else None,
            v.new_zeros(v.shape) if need_dkv else None,
            None if variant.sink is None else q.new_zeros((batch, q.shape[-2]), dtype=computing_dtype(q)),
            q.new_zeros(bias.shape, dtype=computing_dtype(q)) if need_dbias else None,
        )

    def results(self, q: Tensor, variant: Variant) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As the operators return them: an empty tensor instead of None."""
        dbias = None if self.dbias is None else self.dbias.to(variant.attn_bias.dtype)
        return tuple(q.new_empty(0) if grad is None else grad for grad in self._replace(dbias=dbias))


class _Run(NamedTuple):
    """n neighbouring sequences of a packed batch, all of the same lengths: a dense batch, as views."""

    first: int
    n: int
    start_q: int
    len_q: int
    start_k: int
    len_k: int
    pages: Tensor | None = None  # where a lone sequence's keys lie

    def queries(self, x: Tensor | None) -> Tensor | None:
        """(total_q, ...) -> (n, len_q, ...)"""
        return _rows(x, self.start_q, self.n, self.len_q)

    def lse(self, x: Tensor | None) -> Tensor | None:
        """(h, total_q) -> (n, h, len_q)"""
        return None if x is None else self.queries(x.t()).transpose(1, 2)

    def keys(self, x: Tensor | None) -> Tensor | None:
        """(total_k, ...) -> (n, len_k, ...); or (num_pages, page_size, ...), of which one sequence's are gathered"""
        if self.pages is not None:
            x = x.index_select(0, self.pages).flatten(0, 1)
        return _rows(x, self.start_k, self.n, self.len_k)

    def extended(self, other: _Run) -> _Run | None:
        """Both in one, where ``other`` follows without a gap."""
        following = self._replace(
            first=self.first + self.n,
            n=1,
            start_q=self.start_q + self.n * self.len_q,
            start_k=self.start_k + self.n * self.len_k,
        )
        return self._replace(n=self.n + 1) if self.pages is None and following == other else None


def _rows(x: Tensor | None, start: int, n: int, length: int) -> Tensor | None:
    return None if x is None else x.narrow(0, start, n * length).unflatten(0, (n, length))


def runs(varlen: Varlen, k: Tensor) -> Iterator[_Run]:
    """All sequences; neighbours of equal lengths together: many short ones cost what they cost in a dense batch."""
    run: _Run | None = None
    for sequence in _sequences(varlen, k):
        longer = None if run is None else run.extended(sequence)
        if run is not None and longer is None:
            yield run
        run = sequence if longer is None else longer
    if run is not None:
        yield run


def _sequences(varlen: Varlen, k: Tensor) -> Iterator[_Run]:
    starts_q, starts_k = varlen.cu_seqlens_q.tolist(), varlen.cu_seqlens_k.tolist()
    batch = len(starts_q) - 1
    used_q = None if varlen.seqused_q is None else varlen.seqused_q.tolist()
    used_k = None if varlen.seqused_k is None else varlen.seqused_k.tolist()
    leftpad_k = [0] * batch if varlen.leftpad_k is None else varlen.leftpad_k.tolist()
    for b in range(batch):
        len_q = starts_q[b + 1] - starts_q[b] if used_q is None else used_q[b]
        end_k = starts_k[b + 1] - starts_k[b] if used_k is None else used_k[b]
        len_k = max(0, end_k - leftpad_k[b])
        if varlen.block_table is None:
            yield _Run(b, 1, starts_q[b], len_q, starts_k[b] + leftpad_k[b] if len_k else 0, len_k)
        else:
            pages = varlen.block_table[b, : -(-len_k // k.shape[1])]
            yield _Run(b, 1, starts_q[b], len_q, 0, len_k, pages)
