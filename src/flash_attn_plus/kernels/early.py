"""Kernels that are started before the kernel in front of them has ended: in CUDA graphs.

A decoding step is a few kernels of some microseconds, and starting each takes about one of them. With NVIDIA's
programmatic dependent launch (from Hopper on) a kernel's programs are placed while the last ones of the kernel before
it still run; they wait there, and touch no memory until all of it has ended. CUDA C++ Programming Guide, "Programmatic
Dependent Launch and Synchronization".

Triton's launcher asks for it in every launch, but takes the host longer than PyTorch's, which never does: launch.py
takes the former while a graph is captured, and where the latter cannot be used.
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
def wait(EARLY: tl.constexpr):
    """Until the kernel in front has ended: what a kernel does first, in every program. As every program waits, the end
    of a kernel is also that of all kernels before it, and the next one may be placed at once.
    """
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
