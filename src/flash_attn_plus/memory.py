"""What ran for a call, found again by calls like it: those that differ in the values of tensors alone."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from . import device

_MOST_SIGNATURES = 4096
_MOST_LATEST = 8
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


class Memory:
    """What ran for calls of one operator."""

    def __init__(self) -> None:
        self.runs: dict[tuple, Callable] = {}
        self.latest: tuple[_Latest, ...] = ()

    def find(self, of_call: tuple | None) -> Callable | None:
        return self.runs.get(of_call)

    def keep(self, of_call: tuple | None, args: tuple, run: Callable) -> None:
        if of_call is None or any(x != x for x in args if x.__class__ is float):  # NaN would never be found again
            return
        if len(self.runs) >= _MOST_SIGNATURES:
            self.clear()
        self.runs[of_call] = run

    def recall(self, args: tuple) -> Callable | None:
        """``find``, for callers in front of the dispatcher: in a tenth of the time where the call is like one of the
        latest ones.
        """
        for latest in self.latest:
            if latest.is_like(args):
                return latest.run
        run = self.runs.get(signature(args))
        if run is not None and _Latest.GUARDS is not None and args[0].dtype is not torch.float32:
            self.latest = (_Latest(args, run), *self.latest[: _MOST_LATEST - 1])
        return run

    def clear(self) -> None:
        self.runs.clear()
        self.latest = ()


class _Latest:
    """The arguments of a call, compared with those of others by what guards compiled graphs: dispatch keys, dtype,
    device, shape and strides of all tensors at once, in C++. Not for float32, where a global setting counts too.
    """

    GUARDS = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)

    def __init__(self, args: tuple, run: Callable) -> None:
        self.run = run
        # The first place of each tensor, and (place, first place) of those that come again: cu_seqlens often do.
        firsts: dict[int, int] = {}
        at = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
        places = [(i, firsts.setdefault(id(args[i]), i)) for i in at]
        self.again = [(i, first) for i, first in places if i != first]
        self.pick_tensors = operator.itemgetter(*firsts.values())
        self.pick_others = operator.itemgetter(*(i for i in range(len(args)) if i not in at))
        self.others, tensors = self.pick_others(args), self.pick_tensors(args)
        if len(firsts) == 1:  # itemgetter makes no tuple of one
            self.pick_tensors, tensors = (lambda args: (args[at[0]],)), (tensors,)
        sizes, strides = ([list(f(x)) for x in tensors] for f in (Tensor.size, Tensor.stride))
        self.guards = self.GUARDS(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self.alignments = [x.data_ptr() % 16 for x in tensors]

    def is_like(self, args: tuple) -> bool:
        for x, other in zip(self.pick_others(args), self.others, strict=True):
            if x is not other and (x.__class__ is not other.__class__ or x != other):
                return False
        for i, first in self.again:
            if args[i] is not args[first]:
                return False
        tensors = self.pick_tensors(args)
        return self.guards.check(*tensors) and [x.data_ptr() % 16 for x in tensors] == self.alignments
