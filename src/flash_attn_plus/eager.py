"""The public functions' way to the operators: past the dispatcher where all it would do is pass the call on.

Crossing it into kernels written in Python takes longer than everything else that a small call does on the host. It has
to be crossed while anything listens there: gradients, autocast, a mode, a transform, a tracer, the profiler; and by the
first call of every signature, which is checked and prepared behind it.

Not seen: kernels that another library registers over this one's, and observers of all calls beside torch.profiler
(ExecutionTraceObserver). Both see every call of the operators themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
import torch.autograd.profiler as profiler
from torch import Tensor

from . import library
from .schemas import Variant, Varlen

_fwd = library.overload("fwd")
_varlen_fwd = library.overload("varlen_fwd")

# Private names of PyTorch; test/test_eager.py fails when one goes.
_DispatchKey, _DispatchKeySet = torch._C.DispatchKey, torch._C.DispatchKeySet
_included_keys = torch._C._dispatch_tls_local_include_set
_any_requires_grad = torch._C._any_requires_grad
_any_autocast = torch._C._is_any_autocast_enabled
_profiling = torch.autograd._profiler_enabled

# Keys that every thread sends its calls through. Modes, transforms and tracers add theirs; what a thread excludes can
# only make the way shorter.
_INFERENCE = _DispatchKeySet(_DispatchKey.BackendSelect)
_USUAL = _INFERENCE | _DispatchKeySet(_DispatchKey.ADInplaceOrView)


def _dispatcher_is_idle(args: tuple) -> bool:
    """Whether the dispatcher would lead these arguments straight to the kernel of their device."""
    if torch.compiler.is_compiling():
        return False
    if (torch.is_grad_enabled() and _any_requires_grad(*args)) or forward_ad._current_level >= 0:
        return False
    if _any_autocast() or args[0].is_mps:  # MPS has an autocast that the question leaves out
        return False
    if _profiling() or profiler._is_profiler_enabled:  # in this thread, in all threads
        return False
    return _included_keys() in (_USUAL, _INFERENCE)


def fwd(q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    args = (q, k, v, *variant)
    run = _shortcut("fwd", args)
    return _fwd(*args) if run is None else run(q, k, v, variant)


def varlen_fwd(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, variant: Variant) -> tuple[Tensor, Tensor]:
    args = (q, k, v, *layout[:4], *variant, *layout[4:])
    run = _shortcut("varlen_fwd", args)
    return _varlen_fwd(*args) if run is None else run(q, k, v, layout, variant)


def _shortcut(name: str, args: tuple) -> Callable | None:
    return library.recall(name, args) if isinstance(args[0], Tensor) and _dispatcher_is_idle(args) else None
