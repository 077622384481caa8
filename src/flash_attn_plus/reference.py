"""The oracle: attention in plain eager PyTorch, written to be obviously right.

O(seqlen_q * seqlen_k) memory, any device, any dtype, differentiable by PyTorch's own autograd. Tests compare every
operator with it; no operator ever runs it, and it shares no code with the kernels (Philox and the band of a window
included), so that a mistake has to be made twice to go unnoticed.

Shapes: q (b, sq, h, d), k (b, sk, hk, d), v (b, sk, hk, dv) give out (b, sq, h, dv) and lse (b, h, sq); a packed
batch has q (total_q, h, d), out (total_q, h, dv), lse (h, total_q).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .schemas import Variant, Varlen

_WORD = 0xFFFFFFFF
_MINUS_INF = float("-inf")
_PLAIN = Variant()


def attention(
    q: Tensor, k: Tensor, v: Tensor, variant: Variant = _PLAIN, *, dtype: torch.dtype | None = torch.float64
) -> tuple[Tensor, Tensor]:
    """softmax(mask(softcap(q k^T * scale) + ALiBi + bias)) v, and the log-sum-exp of each row of scores.

    Args:
        q, k, v: (b, sq, h, d), (b, sk, hk, d), (b, sk, hk, dv); h % hk == 0; any length may be 0.
        variant: see ``Variant``. ALiBi is ``-slope * |i + diagonal - j|``; a sink is one more key with that score
            and a zero value; kept probabilities are scaled by ``1 / (1 - dropout_p)``, lse is without dropout.
        dtype: what is computed in. None is the same maths in plain PyTorch at the inputs' dtype: the error of that
            is what a kernel's error is measured against. In 16 bits each operation runs in fp32 and its result (and,
            going back, its gradient) is rounded, as PyTorch's own 16-bit operations do at hundreds of times the cost.

    Returns:
        out (b, sq, h, dv) and lse (b, h, sq), in ``dtype``. A row that sees no key has out 0, lse -inf (the sink
        where there is one), and gradients of exactly 0.
    """
    return _attention(q, k, v, variant, dtype or q.dtype, batch_start=0)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    varlen: Varlen,
    variant: Variant = _PLAIN,
    *,
    dtype: torch.dtype | None = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``attention`` of each sequence of a packed batch: out (total_q, h, dv), lse (h, total_q).

    ``attn_bias`` is (batch or 1, h or 1, max_seqlen_q or 1, max_seqlen_k or 1), ``alibi_slopes`` and ``sink`` are
    (h,) or (batch, h); they and dropout's counters are indexed by the sequence and by positions local to it.
    Query rows that belong to no sequence (past ``cu_seqlens_q[-1]`` or ``seqused_q``) have out 0 and lse -inf.
    """
    dtype = dtype or q.dtype
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), _MINUS_INF, dtype=dtype, device=q.device)
    # A sum over nothing ties out and lse to the inputs, so that a batch of no rows is differentiable too.
    tie = (q[:0].sum() + k[:0].sum() + v[:0].sum()).to(dtype)
    out, lse = out + tie, lse + tie
    for b, (rows, q_b, k_b, v_b) in enumerate(_sequences(q, k, v, varlen)):
        variant_b = _variant_of(variant, b, q_b.shape[1], k_b.shape[1])
        out_b, lse_b = _attention(q_b, k_b, v_b, variant_b, dtype, batch_start=b)
        out[rows], lse[:, rows] = out_b[0], lse_b[0]
    return out, lse


def merge_states(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two disjoint sets of keys from the attention over each, in fp64.

    out is (b, s, h, d) with lse (b, h, s), or (total, h, d) with lse (h, total). lse = logaddexp(lse1, lse2) and
    out = sum_i exp(lse_i - lse) out_i; a row that neither set has a key for is 0 with lse -inf.
    """
    return combine(torch.stack([out1, out2]), torch.stack([lse1, lse2]))


def combine(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """``merge_states`` of the n leading entries of out_partial (n, ...) and lse_partial (n, ...), in fp64."""
    lses = lse_partial.double()
    peak = lses.detach().amax(0)
    peak = peak.masked_fill(peak == _MINUS_INF, 0.0)
    weights = (lses - peak).exp()
    total = weights.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (peak + total.log()).masked_fill(nothing, _MINUS_INF)
    weights = _rows_first(weights / total)
    # An empty partial may hold anything, NaN included: it is not multiplied by 0 but left out.
    outs = out_partial.double().masked_fill(_rows_first(lses) == _MINUS_INF, 0.0)
    return (weights * outs).sum(0), lse


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random words from a counter of four and a key of two.

    Words are int64 tensors in [0, 2^32), broadcast together. Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3" (SC'11).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def dropout_keep_mask(
    rng_state: Tensor,
    dropout_p: float,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    batch_start: int = 0,
    total_heads: int | None = None,
) -> Tensor:
    """Which probabilities dropout keeps: bool (batch, heads, seqlen_q, seqlen_k).

    ``rng_state`` is int64 (2,): seed and offset. Entry (b, h, i, j) is kept iff word ``j % 4`` of Philox at counter
    ``(j // 4, i, b * total_heads + h, offset)`` under key ``(seed low, seed high)`` is >= floor(p * 2^32), b counted
    from ``batch_start``. Nothing else enters: not the order, the tile or the device that computes it.
    """
    device = rng_state.device
    seed, offset = rng_state[0], rng_state[1]
    b = torch.arange(batch_start, batch_start + batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=device).view(-1, 1, 1)
    i = torch.arange(seqlen_q, device=device).view(-1, 1)
    quad = torch.arange((seqlen_k + 3) // 4, device=device)
    counter = torch.broadcast_tensors(quad, i, b * (total_heads or heads) + h, offset & _WORD)
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=-1)
    return words.flatten(-2)[..., :seqlen_k] >= int(dropout_p * 2**32)


def s_dmask(q: Tensor, k: Tensor, variant: Variant, block_n: int | None = None) -> Tensor:
    """The probabilities before normalisation with dropout in their sign, for tests of dropout.

    Args:
        block_n: how many columns a key block has; None is one block as wide as the row.

    Returns:
        (b, h, ceil128(sq), ceil128(sk)) in q's dtype. The sign bit is set where dropout drops; the magnitude is
        exp(s - running max), key blocks visited from the right, each seeing the maximum up to and including itself
        (of keys alone: a sink does not enter). Masked entries and the padding to multiples of 128 are 0.
    """
    return _pad(_s_dmask(q, k, variant, block_n, batch_start=0), _ceil128(q.shape[1]), _ceil128(k.shape[1]))


def varlen_s_dmask(q: Tensor, k: Tensor, varlen: Varlen, variant: Variant, block_n: int | None = None) -> Tensor:
    """``s_dmask`` of each sequence: (batch, h, ceil128(max_seqlen_q), ceil128(max_seqlen_k)) in q's dtype."""
    rows, columns = _ceil128(varlen.max_seqlen_q), _ceil128(varlen.max_seqlen_k)
    blocks = [torch.zeros(0, q.shape[1], rows, columns, dtype=q.dtype, device=q.device)]
    for b, (_, q_b, k_b, _) in enumerate(_sequences(q, k, k, varlen)):
        variant_b = _variant_of(variant, b, q_b.shape[1], k_b.shape[1])
        blocks.append(_pad(_s_dmask(q_b, k_b, variant_b, block_n, batch_start=b), rows, columns))
    return torch.cat(blocks)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, variant: Variant, dtype: torch.dtype, batch_start: int
) -> tuple[Tensor, Tensor]:
    compute, rounded = _arithmetic(dtype)
    scores = _scores(q, k, variant, compute, rounded)
    sink = torch.full((), _MINUS_INF, dtype=compute, device=q.device)
    if variant.sink is not None:
        sink = _per_head(variant.sink.to(compute))
    sink = sink.expand(*scores.shape[:3], 1)

    # The maximum only keeps exp in range: neither out nor lse depends on it, so it carries no gradient.
    peak = torch.cat([scores, sink], dim=-1).detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == _MINUS_INF, 0.0)
    weights = rounded(rounded(scores - peak).exp())
    total = rounded(weights.sum(-1, keepdim=True) + rounded(sink - peak).exp())
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = rounded(peak + rounded(total.log())).masked_fill(nothing, _MINUS_INF)

    if variant.dropout_p > 0:
        keep = _keep(variant, scores, batch_start)
        weights = rounded(weights * keep / (1.0 - variant.dropout_p))
    values = _to_query_heads(v, q.shape[2]).to(compute).transpose(1, 2)
    # Normalised after the product with v, as every flash kernel does: the gradient then is P * (dP - delta) with
    # delta = rowsum(dout * out), and its rounding at the tested dtype is that of the same maths.
    out = rounded(rounded(weights @ values) / total)
    return out.transpose(1, 2).to(dtype), lse.squeeze(-1).to(dtype)


def _scores(
    q: Tensor, k: Tensor, variant: Variant, compute: torch.dtype, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """(b, h, sq, sk): what the softmax sees, -inf where the query does not see the key."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if variant.softmax_scale is None else variant.softmax_scale
    queries = q.to(compute).transpose(1, 2)
    keys = _to_query_heads(k, q.shape[2]).to(compute).transpose(1, 2)
    scores = rounded(rounded(queries @ keys.mT) * scale)
    if variant.softcap > 0:
        scores = rounded(rounded(rounded(scores / variant.softcap).tanh()) * variant.softcap)

    i = torch.arange(seqlen_q, device=q.device).view(-1, 1)
    j = torch.arange(seqlen_k, device=q.device)
    diagonal = seqlen_k - seqlen_q if variant.diagonal is None else variant.diagonal
    ahead = j - (i + diagonal)
    if variant.alibi_slopes is not None:
        distances = ahead.abs().to(compute)
        scores = rounded(scores - rounded(_per_head(variant.alibi_slopes.to(compute)) * distances))
    bias = variant.attn_bias
    if bias is not None and bias.dtype != torch.bool:
        scores = rounded(scores + bias.to(compute))

    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if variant.causal:
        hidden |= ahead > 0
    elif variant.window_right >= 0:
        hidden |= ahead > variant.window_right
    if variant.window_left >= 0:
        hidden |= ahead < -variant.window_left
    if bias is not None and bias.dtype == torch.bool:
        hidden = hidden | ~bias
    return scores.masked_fill(hidden, _MINUS_INF)


def _s_dmask(q: Tensor, k: Tensor, variant: Variant, block_n: int | None, batch_start: int) -> Tensor:
    compute = torch.float64
    scores = _scores(q, k, variant, compute, lambda x: x)
    if scores.numel() == 0:
        return scores.to(q.dtype)
    seqlen_k = k.shape[1]
    block_n = block_n or seqlen_k
    peak = scores.flip(-1).cummax(-1).values.flip(-1)[..., ::block_n].repeat_interleave(block_n, dim=-1)[..., :seqlen_k]
    magnitude = (scores - peak.masked_fill(peak == _MINUS_INF, 0.0)).exp().to(q.dtype)
    if variant.dropout_p == 0:
        return magnitude
    dropped = ~_keep(variant, scores, batch_start) & (scores > _MINUS_INF)
    return torch.where(dropped, -magnitude, magnitude)


def _keep(variant: Variant, scores: Tensor, batch_start: int) -> Tensor:
    if variant.rng_state is None:
        raise ValueError("rng_state: expected an int64 tensor (2,) with dropout_p > 0, got None")
    return dropout_keep_mask(variant.rng_state, variant.dropout_p, *scores.shape, batch_start=batch_start)


def _sequences(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen):
    """Each sequence's rows of q, and its q, k, v as a batch of one."""
    starts_q, starts_k = varlen.cu_seqlens_q.tolist(), varlen.cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        seqlen_q = starts_q[b + 1] - starts_q[b] if varlen.seqused_q is None else int(varlen.seqused_q[b])
        end_k = starts_k[b + 1] - starts_k[b] if varlen.seqused_k is None else int(varlen.seqused_k[b])
        begin_k = 0 if varlen.leftpad_k is None else int(varlen.leftpad_k[b])
        if varlen.block_table is None:
            keys = slice(starts_k[b] + begin_k, starts_k[b] + max(begin_k, end_k))
            k_b, v_b = k[keys], v[keys]
        else:
            pages = varlen.block_table[b, : -(-end_k // k.shape[1])].long()
            k_b, v_b = (pool[pages].flatten(0, 1)[begin_k:end_k] for pool in (k, v))
        rows = slice(starts_q[b], starts_q[b] + seqlen_q)
        yield rows, q[rows][None], k_b[None], v_b[None]


def _variant_of(variant: Variant, b: int, seqlen_q: int, seqlen_k: int) -> Variant:
    """The variant of sequence b alone, as a batch of one."""

    def row(per_head: Tensor | None) -> Tensor | None:
        return per_head if per_head is None or per_head.ndim == 1 else per_head[b]

    bias = variant.attn_bias
    if bias is not None:
        bias = bias if bias.shape[0] == 1 else bias[b : b + 1]
        bias = bias if bias.shape[2] == 1 else bias[:, :, :seqlen_q]
        bias = bias if bias.shape[3] == 1 else bias[..., :seqlen_k]
    return variant._replace(alibi_slopes=row(variant.alibi_slopes), sink=row(variant.sink), attn_bias=bias)


def _arithmetic(dtype: torch.dtype) -> tuple[torch.dtype, Callable[[Tensor], Tensor]]:
    """The dtype that operations run in, and the rounding of their results to ``dtype`` (of gradients too)."""
    if dtype in (torch.float32, torch.float64):
        return dtype, lambda x: x
    return torch.float32, lambda x: x.to(dtype).to(torch.float32)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit words, by 16-bit halves: nothing leaves int64."""
    below, above = a * (b & 0xFFFF), a * (b >> 16)
    high = (above + (below >> 16)) >> 16
    low = (below + ((above & 0xFFFF) << 16)) & _WORD
    return high, low


def _per_head(x: Tensor) -> Tensor:
    """(h,) or (b, h) to what broadcasts with (b, h, sq, sk)."""
    return x[..., None, None]


def _to_query_heads(x: Tensor, heads: int) -> Tensor:
    """(b, s, hk, d) to (b, s, h, d): query heads [n * h/hk, (n + 1) * h/hk) share key head n."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _rows_first(lse: Tensor) -> Tensor:
    """(..., h, s) to what broadcasts with out (..., s, h, d)."""
    return lse.transpose(-1, -2).unsqueeze(-1)


def _ceil128(length: int) -> int:
    return -(-length // 128) * 128


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2]))
