"""Dropout's random numbers: Philox4x32-10 in tensor arithmetic, on any device.

Philox is counter based: the random word of a score is a function of the score's coordinates and the seed alone. So
forward and backward, every tile size and every backend draw the same pattern, and nothing has to be stored.

Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter.

    ``counter`` is four and ``key`` two int64 tensors that hold unsigned 32-bit words; they broadcast together, and
    dimensions that a round has not mixed yet stay unexpanded.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            high1 ^ c1 ^ ((k0 + step * _KEY_STEPS[0]) & _WORD),
            low1,
            high0 ^ c3 ^ ((k1 + step * _KEY_STEPS[1]) & _WORD),
            low0,
        )
    return c0, c1, c2, c3


def keep_mask(
    rng_state: Tensor, dropout_p: float, heads: Tensor | range, rows: range, columns: range, device: torch.device | str
) -> Tensor:
    """Which scores survive dropout: a bool tensor (len(heads), len(rows), len(columns)), True = keep.

    ``rng_state`` is int64 [2] = (seed, offset) and is never read on the host; ``heads`` holds the numbers
    ``batch * num_heads + head``; ``rows`` and ``columns`` are the query and key numbers, of step 1. Score (head, i, j)
    takes word ``j % 4`` of key (seed low, seed high) and counter (j // 4, i, head, offset), and is kept iff
    ``word >= floor(dropout_p * 2**32)``.
    """
    seed, offset = rng_state.to(device).unbind()
    quads = range(columns.start // 4, -(-columns.stop // 4))  # one counter serves four neighbouring columns
    counter = (
        _numbers(quads, device),
        _numbers(rows, device)[:, None],
        _numbers(heads, device)[:, None, None],
        offset & _WORD,
    )
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    threshold = int(dropout_p * 2**32)
    # Compared before they are interleaved: a stacked tensor of words would take 8 bytes a score, of bools it takes 1.
    keep = torch.stack([word >= threshold for word in words], dim=-1).flatten(-2)
    return keep[..., columns.start % 4 :][..., : len(columns)]


def _multiply(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(high, low) words of a 32 x 32-bit product; int64 wraps modulo 2**64, which leaves all 64 bits in place."""
    product = x * multiplier
    return (product >> 32) & _WORD, product & _WORD


def _numbers(values: Tensor | range, device: torch.device | str) -> Tensor:
    if isinstance(values, range):
        return torch.arange(values.start, values.stop, device=device)
    return values.to(device=device, dtype=torch.int64)
