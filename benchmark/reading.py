"""What decoding is held against: kernels that read as many bytes, and do no more than add them up.

As decoding does, they start before the kernel in front has ended and may ask for their first block then, each program
reads a share, and a second kernel adds up what these came to. Which shape reads fastest depends on how much there is:
all that fit are timed, and the fastest is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.kernels import early


class Shape(NamedTuple):
    """Of the kernel that reads."""

    programs: int  # per processor
    block: int  # words of 4 bytes that a program reads at once, of k and of v
    warps: int
    stages: int  # blocks in flight, and the one that is added up
    ahead: bool  # the first block is asked for before the kernel in front has ended


SHAPES = (
    *(Shape(1, 4096, 4, 4, ahead) for ahead in (False, True)),
    *(Shape(1, 8192, 8, 3, ahead) for ahead in (False, True)),
    *(Shape(2, 4096, 4, 3, ahead) for ahead in (False, True)),
    *(Shape(2, 2048, 4, 4, False), Shape(4, 2048, 4, 3, False)),
)
PROGRAMS = 1024  # at most
ROW = tl.constexpr(64)  # words that are asked for at once


@triton.jit
def read_kernel(
    k_ptr,
    v_ptr,
    sums_ptr,
    count,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    early.let_next_start(EARLY)
    program = tl.program_id(0)
    if AHEAD:
        rows = program * BLOCK + tl.arange(0, BLOCK // ROW)[:, None] * ROW
        early.ask(k_ptr + rows, rows + ROW <= count, ROW)
        early.ask(v_ptr + rows, rows + ROW <= count, ROW)
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.int32)
    early.wait(program, EARLY)
    for start in tl.range(program * BLOCK, count, tl.num_programs(0) * BLOCK, num_stages=STAGES):
        exist = start + offsets < count
        k = tl.load(k_ptr + start + offsets, mask=exist, other=0)
        v = tl.load(v_ptr + start + offsets, mask=exist, other=0)
        sums += k + v
    tl.store(sums_ptr + program, tl.sum(sums.to(tl.int64)).to(tl.int32))


@triton.jit
def add_up_kernel(sums_ptr, out_ptr, count, PROGRAMS: tl.constexpr, EARLY: tl.constexpr):
    early.let_next_start(EARLY)
    programs = tl.arange(0, PROGRAMS)
    early.wait(programs, EARLY)
    sums = tl.load(sums_ptr + programs, mask=programs < count, other=0)
    tl.store(out_ptr, tl.sum(sums.to(tl.int64)).to(tl.int32))


def add_up(k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """The sum of all words of k and v, contiguous and equally large: int32, as it wraps."""
    k, v = (x.view(-1).view(torch.int32) for x in (k, v))
    programs = min(shape.programs * device.processors(k.device), PROGRAMS, triton.cdiv(len(k), shape.block))
    sums, out = k.new_empty(programs), k.new_empty(())
    starts_early, options = early.allowed(k.device), early.options(k.device)
    constants = (shape.block, shape.stages, starts_early, shape.ahead and starts_early)
    read_kernel[(programs,)](k, v, sums, len(k), *constants, num_warps=shape.warps, **options)
    add_up_kernel[(1,)](sums, out, programs, PROGRAMS, starts_early, num_warps=4, **options)
    return out


def expected(k: Tensor, v: Tensor) -> Tensor:
    """The same with PyTorch."""
    return sum(x.view(-1).view(torch.int32).sum() for x in (k, v)).to(torch.int32)
