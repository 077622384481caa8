"""The public functions' way to the operators: past the dispatcher where all it would do is pass the call on.

Crossing it into kernels written in Python takes longer than everything else that a small call does on the host. It has
to be crossed while anything listens there: a mode, a transform, a tracer, the profiler, an autocast that casts; and by
the first call of every signature, which is checked and prepared behind it. Gradients are recorded on this side: what
runs is handed to the same autograd class (autograd.py) that the operators have.

Not seen: kernels that another library registers over this one's, and observers of all calls beside torch.profiler
(ExecutionTraceObserver). Both see every call of the operators themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.autograd.profiler as profiler
from torch import Tensor

from . import autocast, autograd, checks_cache, library
from .memory import Latest, can_guard
from .schemas import Cache, New, Rotation, Variant, Varlen

if TYPE_CHECKING:
    from .kernels.relaunch import Relaunch

# Private names of PyTorch; test/test_eager.py fails when one goes.
_DispatchKey, _DispatchKeySet = torch._C.DispatchKey, torch._C.DispatchKeySet
_count_modes = torch._C._len_torch_dispatch_stack
_included_keys = torch._C._dispatch_tls_local_include_set
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_transforms_active = torch._C._are_functorch_transforms_active
_any_requires_grad = torch._C._any_requires_grad
_any_autocast = torch._C._is_any_autocast_enabled
_profiling = torch.autograd._profiler_enabled

# Keys that every thread sends its calls through. Modes, transforms and tracers add theirs. What a thread excludes makes
# the way shorter; Autograd is asked for where it would record.
_INFERENCE = _DispatchKeySet(_DispatchKey.BackendSelect)
_USUAL = _INFERENCE | _DispatchKeySet(_DispatchKey.ADInplaceOrView)


_PLAIN = (Tensor, torch.nn.Parameter)
Joint = autograd.Joint


def _is_observed() -> bool:
    """Whether a mode, a profiler (of this thread, of all threads) or forward-mode gradients want to see every call."""
    if _count_modes() or _profiling():
        return True
    return profiler._is_profiler_enabled or forward_ad._current_level >= 0


def _only_gradients(x: Tensor) -> bool:
    """Whether calls with this tensor stay what they are, but for gradients, casts and being observed."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if x.is_mps:  # MPS has an autocast that ``_any_autocast`` leaves out
        return False
    return _included_keys() in (_USUAL, _INFERENCE)


def _without_autocast(run: Callable) -> Callable:
    """Kernels never run under autocast."""

    def call(*structured):
        with autocast.excluded():
            return run(*structured)

    return call


class _Backward:
    """The way to a backward operator, for what autograd calls. Gradients that it writes into are new: no one saved
    them, and their version is nobody's business.
    """

    def __init__(self, name: str) -> None:
        self.name, self.op, self.memory = name, library.overload(name), library.memory_of(name)

    def __call__(self, *structured):
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or _is_observed():
            return self.op(*library.flatten(self.name, structured))
        found = self.memory.latest_like(structured)
        if found is None and _only_gradients(structured[0]):
            found = self.memory.recall(structured)
        if found is None:
            return self.op(*library.flatten(self.name, structured))
        return (_without_autocast(found.run) if _any_autocast() else found.run)(*structured)


def _may_be_joint(joint: Joint) -> bool:
    """Whether q, k and v may go on the tape as the tensor that they are views of. A mode, which may be there forward
    and gone in a recomputation, changes nothing: what is saved must not depend on it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    if _transforms_active() or _is_included(_DispatchKey.PreDispatch):
        return False
    return _are_plain(joint)


def _are_plain(tensors: Iterable[Tensor | None]) -> bool:
    return all(x is None or x.__class__ in _PLAIN for x in tensors)


def _may_write(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the backward may write the gradients of joint inputs: nobody sees it, nothing differentiates it."""
    one = tensors[0] if tensors[0] is not None else tensors[-1]
    return not torch.is_grad_enabled() and _are_plain(tensors) and _only_gradients(one)


def _is_recorded(args: tuple) -> bool:
    """Whether autograd, where it is enabled, would record a call with these arguments."""
    # As inside a custom operator, whose own gradient is recorded instead.
    if not _any_requires_grad(*args) or _is_excluded(_DispatchKey.AutogradFunctionality):
        return False
    return not all(x.is_inference() for x in args if isinstance(x, Tensor))


class _Forward:
    """The way to a forward operator."""

    def __init__(self, name: str, classes: autograd.Attention, backward_name: str) -> None:
        self.name, self.op, self.memory = name, library.overload(name), library.memory_of(name)
        self.classes = classes
        self.way = autograd.Way(_Backward(backward_name), _Backward(f"{backward_name}_into"), _may_write)

    def __call__(self, structured: tuple, joint: Joint | None = None) -> tuple[Tensor, Tensor]:
        """out, lse. ``structured`` as library.parse gives it; ``joint`` where q, k and v are views of that."""
        if torch.compiler.is_compiling():
            return self._cross(*structured)
        q = structured[0]
        latest = None if _is_observed() else self.memory.latest_like(structured)
        if latest is None:
            return self._with_care(structured, joint)
        run = latest.run
        if _any_autocast():
            if autocast.casts(q):
                return self._cross(*structured)
            run = _without_autocast(run)
        if not (latest.records and torch.is_grad_enabled()):
            return run(*structured)
        options = [structured[i][j] for i, j in latest.options]
        if joint is None or not _may_be_joint(joint):
            return self.classes.separate.apply(
                run, self.way, structured, latest.skeleton, q, structured[1], structured[2], *options
            )
        return self.classes.joint.apply(
            run, self.way, structured, latest.skeleton, *(x for x in joint if x is not None), *options
        )

    def _with_care(self, structured: tuple, joint: Joint | None) -> tuple[Tensor, Tensor]:
        """Every other call."""
        q, k, v = structured[:3]
        if not isinstance(q, Tensor):
            return self._cross(*structured)
        quick = _only_gradients(q)
        if joint is not None and not _may_be_joint(joint):
            joint = None
        if not quick and joint is None:
            return self._cross(*structured)
        if _any_autocast() and any(autocast.casts(x) for x in (q, k, v)):
            return self._cross(*structured)
        found = self.memory.recall(structured) if quick and not _is_observed() else None
        records = torch.is_grad_enabled() and _is_recorded(library.flatten(self.name, structured))
        if found is None and (joint is None or not records):
            return self._cross(*structured)
        run = self._cross if found is None else _without_autocast(found.run) if _any_autocast() else found.run
        return autograd.apply(self.classes, run, self.way, structured, joint) if records else run(*structured)

    def _cross(self, *structured):
        return self.op(*library.flatten(self.name, structured))


_fwd = _Forward("fwd", autograd.DENSE, "bwd")
_varlen_fwd = _Forward("varlen_fwd", autograd.VARLEN, "varlen_bwd")


def fwd(structured: tuple[Tensor, Tensor, Tensor, Variant], joint: Joint | None = None) -> tuple[Tensor, Tensor]:
    return _fwd(structured, joint)


def varlen_fwd(
    structured: tuple[Tensor, Tensor, Tensor, Varlen, Variant], joint: Joint | None = None
) -> tuple[Tensor, Tensor]:
    return _varlen_fwd(structured, joint)


def _selectable(name: str) -> Callable[[tuple, Joint | None], tuple[Tensor, Tensor]]:
    """Always through the dispatcher: what another library takes on the host is more."""
    op = library.overload(name)
    return lambda structured, joint=None: op(*library.flatten(name, structured))


_SELECTABLE = {"flag_gems": {"fwd": _selectable("flag_gems_fwd"), "varlen_fwd": _selectable("flag_gems_varlen_fwd")}}


def selected(backend: str, name: str) -> Callable[[tuple, Joint | None], tuple[Tensor, Tensor]]:
    """What stands in the place of ``fwd`` or ``varlen_fwd`` where the caller selects a backend."""
    if not isinstance(backend, str) or backend not in _SELECTABLE:
        names = ", ".join(map(repr, _SELECTABLE))
        raise ValueError(f"backend: expected one of {names}, or none, got {backend!r}")
    return _SELECTABLE[backend][name]


class _Undifferentiated:
    """The way to an operator that has no gradient."""

    def __init__(self, name: str) -> None:
        self.name, self.op, self.memory = name, library.overload(name), library.memory_of(name)

    def recalled(self, structured: tuple) -> Callable | None:
        """What runs, where all that the dispatcher would do is pass the call on."""
        found = self.memory.latest_like(structured)
        if found is not None:
            records = found.records
        else:
            one = structured[0]
            found = self.memory.recall(structured) if isinstance(one, Tensor) and _only_gradients(one) else None
            if found is None:
                return None
            records = _is_recorded(library.flatten(self.name, structured))
        if records and torch.is_grad_enabled():
            return None
        return _without_autocast(found.run) if _any_autocast() else found.run

    def cross(self, *structured):
        return self.op(*library.flatten(self.name, structured))


_append, _decode = _Undifferentiated("append_kv"), _Undifferentiated("decode")


def check_step(append: tuple, decode: tuple) -> None:
    """Raise what ``step`` would raise, of both operators, before the first one writes."""
    if torch.compiler.is_compiling():  # the operators' fakes check
        return
    checks_cache.append_kv(*append)
    checks_cache.decode(*decode)
    q = decode[0]
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(q).tangent is not None:
        raise NotImplementedError("q: expected no tangent: flash_attn_plus::decode has no forward-mode gradient")


class Step(NamedTuple):
    """The arguments of ``flash_attn_with_kvcache``, but for what it returns."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    cache_seqlens: int | Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    softmax_scale: float | None
    causal: bool
    window_size: Sequence[int]
    softcap: float
    rotary_interleaved: bool
    alibi_slopes: Tensor | None
    num_splits: int
    sink: Tensor | None


class _Ways(NamedTuple):
    """What ran in place of the operators of a step, and what it was told that no tensor is."""

    rotary: Callable | None
    append_kv: Callable | None
    decode: Callable
    variant: Variant
    num_splits: int
    relaunch: Relaunch | None  # the whole step, if it was only kernel launches


_steps, _rotary = library.memory_of("decode").recent_callers, library.overload("rotary")


def again(step: Step) -> tuple[Tensor, Tensor] | None:
    """out, lse of a step like one that was kept; None where there is none, or where someone has to see the operators.

    For a step is three operators, and to check and describe the arguments of each takes longer than to launch them.
    """
    if torch.compiler.is_compiling() or _is_observed():
        return None
    found = _steps.find(step)
    if found is None:
        return None
    latest, addresses = found
    if latest.records and torch.is_grad_enabled():
        return None
    rotary, append_kv, decode, variant, num_splits, relaunch = latest.run
    if append_kv is not None:
        # Inference tensors look like others where the thread excludes autograd.
        if not _may_write_into(step.k_cache, step.v_cache):
            return None
        _rise((step.k_cache, step.v_cache))
    if relaunch is not None and relaunch.is_possible():
        out, lse, _ = relaunch(addresses)
        return out, lse
    q, k_cache, v_cache, k, v, cos, sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, *_ = step
    if rotary is not None:
        x, *rotation = _rotation(step, cache_seqlens, variant)
        q = rotary(x, Rotation(*rotation)).view(q.shape)
    seqlen_new = 0
    if append_kv is not None:
        seqlen_new = k.shape[1]
        new = New(cache_seqlens, cache_batch_idx, block_table, cos, sin, step.rotary_interleaved)
        append_kv(k_cache, v_cache, k, v, new)
    cache = Cache(cache_seqlens, seqlen_new, cache_batch_idx, cache_leftpad, block_table)
    return decode(q, k_cache, v_cache, cache, variant, num_splits)


# The dispatcher's part in writing into tensors. It passes over inference tensors, which have no version.
_rise = torch.autograd.graph.increment_version


def step(of_call: Step, append: tuple | None, decode: tuple) -> tuple[Tensor, Tensor]:
    """The operator ``append_kv`` where there are arguments for it, ``rotary`` where there are tables, and ``decode``;
    arguments as library.parse gives them.
    """
    # Tables that are wrong are told by their own names, not by those of ``rotary``.
    checked = of_call.rotary_cos is not None or of_call.rotary_sin is not None
    if checked:
        check_step(append, decode)
        decode = _with_rotated(of_call, decode)  # before anything is looked up by its layout
    if torch.compiler.is_compiling():
        if append is not None:
            _append.cross(*append)
        return _decode.cross(*decode)
    quick = not _is_observed()
    attend = _decode.recalled(decode) if quick else None
    write = None
    if append is not None:
        write = _append.recalled(append) if quick and _may_write_into(*append[:2]) else None
        if not checked and (attend is None or write is None):
            check_step(append, decode)
        if _looks_at_lengths(decode[0]):
            checks_cache.values(decode[1], *decode[3])
        if write is None:
            _append.cross(*append)
        else:
            _rise(append[:2])
            write(*append)
    if attend is None:
        return _decode.cross(*decode)
    if append is None or write is not None:
        _keep(of_call, write, attend, decode)
    return attend(*decode)


def _looks_at_lengths(q: Tensor) -> bool:
    """Whether lengths, and numbers of caches and pages, are checked in every call: they are on the host."""
    return q.is_cpu


def _with_rotated(of_call: Step, decode: tuple) -> tuple:
    """The arguments of ``decode`` with rotated queries, where there are tables."""
    if of_call.rotary_cos is None:
        return decode
    q, k_cache, v_cache, cache, variant, num_splits = decode
    q = _rotary(*_rotation(of_call, cache.cache_seqlens, variant)).view(q.shape)
    return q, k_cache, v_cache, cache, variant, num_splits


def _rotation(step: Step, cache_seqlens: Tensor, variant: Variant) -> tuple:
    """The arguments of ``rotary``: queries by the angles of their positions; where there is no mask, all by those of
    the first one, as heads of one row are.
    """
    q, cos, sin = step.q, step.rotary_cos, step.rotary_sin
    by_row = variant.causal or variant.window_left >= 0 or variant.window_right >= 0
    rows = q if by_row or q.shape[1] <= 1 else q.flatten(1, 2).unsqueeze(1)
    return rows, cos, sin, 0, cache_seqlens, None, None, step.rotary_interleaved


def _keep(step: Step, write: Callable | None, attend: Callable, decode: tuple) -> None:
    """For ``again``. Only where types, numbers and the layout of tensors decide everything: no lengths that were told
    as a number, no numbers in tensors, no device where lengths are looked at.
    """
    q, _, _, cache, variant, num_splits = decode
    if _looks_at_lengths(q) or not can_guard(q) or _any_autocast() or cache.cache_seqlens is not step.cache_seqlens:
        return
    numbers = step.softmax_scale, *step.window_size, step.num_splits
    if any(isinstance(x, Tensor) for x in (*variant, *numbers)) or step.window_size.__class__ is not tuple:
        return
    rotary = None
    if step.rotary_cos is not None:
        rotary = library.recalled("rotary", library.bind("rotary", _rotation(step, cache.cache_seqlens, variant)))
        if rotary is None:
            return
    latest = Latest(step, None)
    if latest.records and torch.is_grad_enabled():
        return  # ``again`` would not take it
    relaunch = None if rotary is not None else _relaunch(latest, step, write, attend, cache)
    latest.run = _Ways(rotary, write, attend, variant, num_splits, relaunch)
    _steps.add(latest)


def _relaunch(latest: Latest, step: Step, write: Callable | None, attend: Callable, cache: Cache) -> Relaunch | None:
    if not hasattr(attend, "relaunch"):
        return None
    numbers = {id(x): i for i, x in enumerate(latest.tensors_of(step))}
    at = Step(*[numbers[id(x)] if isinstance(x, Tensor) else x for x in step])
    return attend.relaunch(write, at, cache.seqlen_new, len(numbers))


def _may_write_into(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether caches may be written into without asking the dispatcher, which refuses it for some."""
    return not (k_cache.is_inference() or v_cache.is_inference()) or torch.is_inference_mode_enabled()
