"""Two numbers of every query row, which the backward computes once and every pass reads: shift and delta.

They lie side by side, and twice: (rows, 4). Triton lets every thread load for itself what has fewer elements than there
are threads, which would be most of what a pass over the rows issues. A tile of these is loaded once, asynchronously,
and each thread takes its rows out of shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDTH = tl.constexpr(4)


@triton.jit
def _pointers(ptr, first, BLOCK_M: tl.constexpr):
    return ptr + first * WIDTH + (tl.arange(0, BLOCK_M)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def store(ptr, first, shift, delta, exist, BLOCK_M: tl.constexpr):
    """``first`` is the number of the first of BLOCK_M rows, counted in 64 bits as in a contiguous log-sum-exp."""
    pairs = tl.join(tl.join(shift, shift), tl.join(delta, delta))
    tl.store(_pointers(ptr, first, BLOCK_M), tl.reshape(pairs, [BLOCK_M, WIDTH]), mask=exist[:, None])


@triton.jit
def load(ptr, first, exist, BLOCK_M: tl.constexpr, MASK: tl.constexpr):
    """(shift, delta) of BLOCK_M rows. Rows that do not exist have weights of 0: shift +inf, delta 0."""
    pointers = _pointers(ptr, first, BLOCK_M)
    if MASK:
        pairs = tl.load(pointers, mask=exist[:, None], other=float("inf"))
    else:
        pairs = tl.load(pointers)
    shifts, deltas = tl.split(tl.reshape(pairs, [BLOCK_M, 2, 2]))
    shift, delta = tl.split(shifts)[0], tl.split(deltas)[0]
    if MASK:
        delta = tl.where(exist, delta, 0.0)
    return shift, delta


@triton.jit
def load_rows(ptr, first, exist, BLOCK_M: tl.constexpr):
    """What ``load`` returns, each thread loading its rows for itself: for blocks that are not transposed.

    Beside those, Triton (3.6, 3.7) does not compile ``load`` for RDNA: it carries the layout of the products backwards
    through the split, to a tile of two columns, which that layout cannot have (triton-lang/triton#8931).
    """
    pointers = ptr + first * WIDTH + tl.arange(0, BLOCK_M) * WIDTH
    return tl.load(pointers, mask=exist, other=float("inf")), tl.load(pointers + 1, mask=exist, other=0.0)
