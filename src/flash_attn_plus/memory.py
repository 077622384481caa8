"""What ran for a call, found again by calls like it: those that differ in the values of tensors alone."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_, itemgetter

import torch
from torch import Tensor

from . import device

_MOST_SIGNATURES = 4096
_MOST_LATEST = 4
_MOST_OF_ONE = 4
_VALUES = frozenset((type(None), bool, int, torch.dtype))


def _description(x: Tensor | float) -> tuple:
    if x.__class__ is float:
        return (x,)  # not equal to an int of the same value, which the dispatcher would convert, or refuse
    if x.__class__ is not Tensor and torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python):
        raise TypeError("its class has a __torch_dispatch__, which must be asked every time")
    address = x.data_ptr()
    if address == 0:
        raise TypeError("no elements, or zeros without memory: the dispatcher tells them apart")
    # The negative bit: no tensor has it that came to a device through the dispatcher.
    return x.shape, x.stride(), x.dtype, x.device, address % 16, x.is_neg()


def signature(args: tuple) -> tuple | None:
    """All that checks and the choice of a kernel depend on, of all arguments of a call. Values of tensors are not: they
    are never read there.

    None where nothing can be remembered: tensors without strides, elements or storage, and what only the dispatcher
    understands.
    """
    try:
        described = [x if x.__class__ in _VALUES else _description(x) for x in args]
    except (RuntimeError, TypeError):
        return None
    if args[0].dtype is torch.float32:
        described.append(device.allows_tf32())
    return tuple(described)


class Found:
    """What ran for a call of the same signature."""

    __slots__ = ("run",)

    def __init__(self, run: Callable) -> None:
        self.run = run


class Recent:
    """The last few calls of a kind, the last one first."""

    def __init__(self) -> None:
        self.latest: tuple[Latest, ...] = ()

    def like(self, args: tuple) -> Latest | None:
        found = self.find(args)
        return None if found is None else found[0]

    def find(self, args: tuple) -> tuple[Latest, list[int]] | None:
        """``like``, and where the tensors of ``args`` lie."""
        for latest in self.latest:
            addresses = latest.addresses_of(args)
            if addresses is not None:
                return latest, addresses
        return None

    def add(self, latest: Latest) -> None:
        self.latest = (latest, *self.latest[: _MOST_LATEST - 1])


class Memory:
    """What ran for calls of one operator. ``flatten`` makes all its arguments of structured ones (library.parse)."""

    def __init__(self, flatten: Callable) -> None:
        self.flatten = flatten
        self.runs: dict[tuple, Callable] = {}
        self.recent = Recent()
        # By what the caller in front of the operator was given (eager.py).
        self.recent_callers = Recent()
        # Of each signature. There are few: to make one takes longer than to find what ran without it.
        self.guarded: dict[tuple, list[Latest]] = {}

    def find(self, of_call: tuple | None) -> Callable | None:
        return self.runs.get(of_call)

    def keep(self, of_call: tuple | None, args: tuple, run: Callable) -> None:
        if of_call is None or any(x != x for x in args if x.__class__ is float):  # NaN would never be found again
            return
        if len(self.runs) >= _MOST_SIGNATURES:
            self.clear()
        self.runs[of_call] = run

    def latest_like(self, structured: tuple) -> Latest | None:
        """``recall`` in a fraction of the time, where the call is like one of the latest ones that it was asked for.

        Its tensors had the same keys of the dispatcher, with those that this thread included and without those that it
        excluded: the same transforms, C++ tracers and autocasts were there, or none. Modes are not seen.
        """
        return self.recent.like(structured)

    def recall(self, structured: tuple) -> Found | None:
        """``find``, for callers in front of the dispatcher."""
        of_call = signature(self.flatten(*structured))
        run = self.runs.get(of_call)
        if run is None:
            return None
        if not can_guard(structured[0]):
            return Found(run)
        # Several of one signature differ in what it leaves out: who requires a gradient, autocast, one tensor twice.
        known = self.guarded.setdefault(of_call, [])
        found = next((latest for latest in known if latest.is_like(structured)), None)
        if found is None:
            if len(known) == _MOST_OF_ONE:
                return Found(run)
            found = Latest(structured, run)
            known.append(found)
        self.recent.add(found)
        return found

    def clear(self) -> None:
        self.runs.clear()
        self.guarded.clear()
        self.recent.latest = self.recent_callers.latest = ()


def can_guard(x: Tensor) -> bool:
    """Whether calls with such a tensor can be ``Latest``. Not float32, where a global setting counts too."""
    return _GUARDS is not None and x.dtype is not torch.float32


class Latest(Found):
    """The arguments of a call, some of which are structured, compared with those of others by what guards compiled
    graphs: dispatch keys (with those that this thread includes and excludes), dtype, device, shape, strides and
    requires_grad of all tensors at once, in C++.
    """

    __slots__ = (
        *("again", "alignments", "guards", "numbers", "numbers_of", "options", "parts", "records", "skeleton"),
        "tensors_of",
    )

    def __init__(self, structured: tuple, run: Callable) -> None:
        super().__init__(run)
        # What stands for the parts on the tape (autograd.Skeleton), and the places of the tensors that it leaves out.
        self.skeleton, self.options = [], []
        # (place, None) of a tensor, (place, place in a part) of a tensor in Varlen or Variant.
        at, self.parts, numbers = [], [], []
        for i, x in enumerate(structured):
            if isinstance(x, Tensor):
                at.append((i, None))
            elif hasattr(x, "_fields"):
                names = tuple([name for name, y in zip(x._fields, x, strict=True) if isinstance(y, Tensor)])
                self.options += [(i, x._fields.index(name)) for name in names]
                # The object itself where it can be: the next one is often the same.
                self.parts.append((i, x._replace(**dict.fromkeys(names, Tensor)) if names else x, bool(names)))
                self.skeleton.append((x._replace(**dict.fromkeys(names)) if names else x, names))
            else:
                numbers.append((i, None))
        self.skeleton = tuple(self.skeleton)
        self.numbers_of = _picking(numbers)
        self.numbers = self.numbers_of(structured)
        at += self.options
        # The first place of each tensor, and those where it comes again, as cu_seqlens often do.
        firsts: dict[int, tuple] = {}
        tensors = _picking(at)(structured)
        places = [(place, firsts.setdefault(id(x), place)) for place, x in zip(at, tensors, strict=True)]
        self.again = [(place, first) for place, first in places if place != first]
        self.tensors_of = _picking(list(firsts.values()))
        tensors = self.tensors_of(structured)
        sizes, strides = ([list(f(x)) for x in tensors] for f in (Tensor.size, Tensor.stride))
        self.guards = _GUARDS(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self.alignments = [x.data_ptr() % 16 for x in tensors]
        # Whether autograd would record such a call where it is enabled. Inference tensors look like others where the
        # thread excludes autograd; both are not recorded.
        seen = not _is_excluded(_AUTOGRAD) and not all(x.is_inference() for x in tensors)
        self.records = seen and any(x.requires_grad for x in tensors)

    def is_like(self, structured: tuple) -> bool:
        return self.addresses_of(structured) is not None

    def addresses_of(self, structured: tuple) -> list[int] | None:
        """Where the tensors of a call like this one lie (``tensors_of``); None where it is not like it."""
        numbers = self.numbers_of(structured)
        # Most often they are the same objects: None, False, small integers, what the caller's code has in it.
        if not all(map(is_, numbers, self.numbers)) and not all(map(_are_equal, numbers, self.numbers)):
            return None
        for i, part, has_tensors in self.parts:
            if structured[i] is not part and not _are_like(structured[i], part, has_tensors):
                return None
        for place, first in self.again:
            if _at(structured, place) is not _at(structured, first):
                return None
        tensors = self.tensors_of(structured)
        if not self.guards.check(*tensors):
            return None
        addresses = [x.data_ptr() for x in tensors]
        if 0 in addresses or [address % 16 for address in addresses] != self.alignments:
            return None
        return addresses


def _picking(places: list[tuple[int, int | None]]) -> Callable[[tuple], tuple]:
    """What takes these out of structured arguments: in C, where none is in a part."""
    if len(places) > 1 and all(j is None for _, j in places):
        return itemgetter(*[i for i, _ in places])
    return lambda structured: tuple([structured[i] if j is None else structured[i][j] for i, j in places])


_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_GUARDS = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)


def _at(structured: tuple, place: tuple[int, int | None]):
    i, j = place
    return structured[i] if j is None else structured[i][j]


def _are_equal(x, y) -> bool:
    """Equal values of equal types, in tuples too."""
    if x is y:
        return True
    if x.__class__ is not y.__class__ or x != y:
        return False
    return x.__class__ is not tuple or all(map(_are_equal, x, y))


def _are_like(part: tuple, other: tuple, has_tensors: bool) -> bool:
    """Equal values of equal types; ``Tensor`` stands for any, which are compared elsewhere."""
    for x, y in zip(part, other, strict=True):
        if x is not y and (x.__class__ is not y.__class__ or x != y):
            if has_tensors and y is Tensor and isinstance(x, Tensor):
                continue
            return False
    return True
