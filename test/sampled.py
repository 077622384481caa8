"""The oracle on a sample: a problem too large to compare whole is compared on some query rows of some heads.

A few query rows of one head are a problem of their own, against the same keys, with the diagonal moved: that one goes
to the oracle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from assertions import assert_close_to_oracle, cast, oracle_results, run_op, same_dtype_results
from cases import Problem
from torch import Tensor

from flash_attn_plus.schemas import Varlen

MINUS_INF = float("-inf")


class Sample(NamedTuple):
    sequence: int
    head: int
    rows: slice  # of q, counted from the first row of the sequence


def lengths(problem: Problem) -> list[tuple[int, int]]:
    """(queries, keys) of each sequence."""
    q, k, _, _, varlen = problem
    if varlen is None:
        return [(q.shape[1], k.shape[1])] * q.shape[0]
    queries = varlen.cu_seqlens_q.diff() if varlen.seqused_q is None else varlen.seqused_q
    keys = varlen.cu_seqlens_k.diff() if varlen.seqused_k is None else varlen.seqused_k
    if varlen.leftpad_k is not None:
        keys = (keys - varlen.leftpad_k).clamp(min=0)
    return list(zip(queries.tolist(), keys.tolist(), strict=True))


def samples(problem: Problem, count: int = 64) -> list[Sample]:
    """The first, middle and last ``count`` rows, in the first, middle and last head, of the first, middle, last and
    longest sequence.

    Under dropout all of them begin with row 0: the oracle counts rows from there.
    """
    found = lengths(problem)
    sequences = [b for b, (seqlen_q, _) in enumerate(found) if seqlen_q]
    if not sequences:
        return []
    longest = max(sequences, key=lambda b: found[b][0] * found[b][1])
    heads = problem.q.shape[-2]
    result = []
    for b in sorted({sequences[0], sequences[len(sequences) // 2], sequences[-1], longest}):
        seqlen_q = found[b][0]
        for start in sorted({0, max(0, (seqlen_q - count) // 2), max(0, seqlen_q - count)}):
            rows = slice(0 if problem.variant.dropout_p else start, min(start + count, seqlen_q))
            result += [Sample(b, head, rows) for head in sorted({0, heads // 2, heads - 1})]
    return result


def part(problem: Problem, sample: Sample) -> Problem:
    """The sample as a packed problem of one head, whose out and lse are those of the whole."""
    q, k, v, variant, varlen = problem
    b, head, rows = sample
    heads = q.shape[-2]
    seqlen_q, seqlen_k = lengths(problem)[b]
    used = pad = table = None
    if varlen is None:
        q, k, v = q[b], k[b], v[b]
        start_q, starts_k = 0, _int32(q, 0, seqlen_k)
    else:
        start_q, starts_k = int(varlen.cu_seqlens_q[b]), varlen.cu_seqlens_k[b : b + 2]
        options = varlen.seqused_k, varlen.leftpad_k, varlen.block_table
        used, pad, table = (None if x is None else x[b : b + 1] for x in options)
    key_head = head // (heads // k.shape[-2])
    q = q[start_q + rows.start : start_q + rows.stop, head : head + 1]
    k, v = (x[..., key_head : key_head + 1, :] for x in (k, v))

    # Dropout numbers the pairs of sequence and head: as many empty sequences go before.
    before = b * heads + head if variant.dropout_p else 0
    layout = Varlen(
        _int32(q, *[0] * (before + 1), q.shape[0]),
        torch.cat([starts_k[:1].expand(before), starts_k]),
        q.shape[0],
        seqlen_k,
        seqused_k=None if used is None else F.pad(used, (before, 0)),
        leftpad_k=None if pad is None else F.pad(pad, (before, 0)),
        block_table=None if table is None else table.expand(before + 1, -1),
    )

    def of_head(x: Tensor | None) -> Tensor | None:
        """(heads,) or (batch, heads) -> (1,)"""
        if x is None:
            return None
        return (x if x.dim() == 1 else x[b])[head : head + 1]

    bias = variant.attn_bias
    if bias is not None:
        for axis, wanted in enumerate((slice(b, b + 1), slice(head, head + 1), rows)):
            if bias.shape[axis] > 1:
                bias = bias[(slice(None),) * axis + (wanted,)]
    diagonal = seqlen_k - seqlen_q if variant.diagonal is None else variant.diagonal
    variant = variant._replace(
        diagonal=diagonal + rows.start,
        alibi_slopes=of_head(variant.alibi_slopes),
        sink=of_head(variant.sink),
        attn_bias=bias,
    )
    return Problem(q, k, v, variant, layout)


def results(problem: Problem, out: Tensor, lse: Tensor, sample: Sample) -> dict[str, Tensor]:
    """The sample's part of the whole results, shaped as those of ``part``."""
    b, head, rows = sample
    if problem.varlen is None:
        out, lse = out[b], lse[b]
    else:
        start = int(problem.varlen.cu_seqlens_q[b])
        rows = slice(start + rows.start, start + rows.stop)
    return {"out": out[rows, head : head + 1], "lse": lse[head : head + 1, rows]}


def check_samples(problem: Problem, name: str, count: int = 64) -> None:
    """The operator against the oracle, by the rule of assertions.py, each sample by itself.

    With one thing stricter: what the error of out is held against is the same maths in fp32, rounded to the tested
    dtype at its end. PyTorch's 16-bit maths rounds the scores, and where a few of thousands of keys have most of the
    weight (as they should in a test: otherwise no key matters), that costs more than losing a block of keys.

    Everywhere: nothing is NaN, rows of no sequence have lse -inf, rows with lse -inf have out 0.
    """
    out, lse = run_op(problem)
    assert_no_nan(out, f"{name}: out")
    assert_no_nan(lse, f"{name}: lse")
    assert_dead_rows(problem, out, lse, name)
    for sample in samples(problem, count):
        label = f"{name}, {out.dtype}, sequence {sample.sequence}, head {sample.head}, rows {sample.rows}"
        small = part(problem, sample)
        expected = oracle_results(small, None)
        plain = same_dtype_results(small, None, expected)
        plain["out"] = same_dtype_results(cast(small, torch.float32), None, expected)["out"].to(out.dtype)
        for tensor, value in results(problem, out, lse, sample).items():
            assert_close_to_oracle(value, expected[tensor], plain[tensor], name=f"{label}: {tensor}")


def assert_no_nan(x: Tensor, name: str) -> None:
    """In pieces: a mask of all elements would be large itself."""
    for n, piece in enumerate(x.flatten().split(1 << 28)):
        assert not piece.isnan().any(), f"{name}: NaN, first at element {int(piece.isnan().nonzero()[0]) + (n << 28)}"


def assert_dead_rows(problem: Problem, out: Tensor, lse: Tensor, name: str) -> None:
    if problem.varlen is not None:
        dead = torch.ones(lse.shape[1], dtype=torch.bool, device=lse.device)
        starts = problem.varlen.cu_seqlens_q.tolist()
        for start, (seqlen_q, _) in zip(starts, lengths(problem), strict=False):
            dead[start : start + seqlen_q] = False
        assert (lse[:, dead] == MINUS_INF).all(), f"{name}: a row of no sequence has an lse that is not -inf"
    sees_no_key = (lse == MINUS_INF).transpose(-1, -2)
    if sees_no_key.any():
        assert (out[sees_no_key] == 0).all(), f"{name}: out is not exactly 0 where lse is -inf"


def _int32(like: Tensor, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)
