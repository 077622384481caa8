"""Kernels that are started before the kernel in front of them has ended: in CUDA graphs.

A decoding step is a few kernels of some microseconds, and starting each takes about one of them. With NVIDIA's
programmatic dependent launch (from Hopper on) a kernel's programs are placed while those of the kernel before it still
run, and wait there until all of it has ended. CUDA C++ Programming Guide, "Programmatic Dependent Launch and
Synchronization". What a program does before it waits costs nothing: it computes addresses, has its instructions
fetched, and asks for the keys that it will read. What it finds in memory then may be about to change: it is read again.

Triton's launcher asks for an early start in every launch, but takes the host longer than PyTorch's, which never does:
launch.py takes the former while a graph is captured, and where the latter cannot be used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import device

try:
    from triton.language.extra import cuda
except ImportError:  # a Triton without NVIDIA's backend
    cuda = None


def allowed(on: torch.device) -> bool:
    if cuda is None or triton.knobs.runtime.interpret:
        return False
    arch = device.architecture(on)
    return arch.startswith("sm_") and int(arch[3:]) >= 90


def options(on: torch.device) -> dict[str, bool]:
    """Of a launch (launch.py)."""
    return {"launch_pdl": True} if allowed(on) else {}


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Places the kernel behind as soon as there is room. It waits, as every kernel here does, in every program: so that
    the end of a kernel is also that of all kernels before it. Others that start early have to wait, too: one that
    writes before it does may overlap with more than the kernel in front of it.
    """
    if EARLY:
        cuda.gdc_launch_dependents()


@triton.jit
def wait(x, EARLY: tl.constexpr):
    """Until the kernel in front has ended: what a program does before it reads what may have been written there, and
    before it writes anything. But not before ``x`` is known: integers, none of them negative. ptxas would wait first
    of all, and compute only then.
    """
    if EARLY:
        tl.inline_asm_elementwise(
            "{ .reg .pred known; setp.ge.s64 known, $1, 0; @known griddepcontrol.wait; mov.u32 $0, 0; }",
            "=r,l",
            [x.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def turns(EARLY: tl.constexpr):
    """Of a short kernel that goes through all that it does twice: once while it waits, masked, so that its instructions
    and arguments are in the caches when it may (``turn``).
    """
    if EARLY:
        # A number that no compiler knows: it would see that nothing happens in the first turn, and leave it out.
        return tl.inline_asm_elementwise("mov.u32 $0, %nctaid.y; add.u32 $0, $0, 1;", "=r", [], tl.int32, False, 1)
    else:
        return 1


@triton.jit
def turn(number, EARLY: tl.constexpr):
    """Whether it may: what a turn loads and stores is masked with this."""
    if EARLY:
        now = number > 0
        if now:
            cuda.gdc_wait()
        return now
    else:
        return True


@triton.jit
def ask(row_ptrs, exist, DIM: tl.constexpr):
    """Brings rows of DIM elements into the L2 cache: pointers and masks (ROWS, 1). Rows begin at multiples of 16 bytes,
    and have as many. Nothing waits for them, and nobody's loads wait behind them: they do not pass through the
    processor's own cache.
    """
    size = tl.full(row_ptrs.shape, DIM * row_ptrs.dtype.element_ty.primitive_bitwidth // 8, tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [row_ptrs, size, exist.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
