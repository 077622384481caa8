"""Autocast: q, k and v follow the active autocast dtype; bias, sink and slopes stay as they are.

The other operators take what they are given. They have a kernel on these keys all the same, because a device kernel
must never run under autocast: it would cast inside the products, of a backward that is called there too.

``torch.library.register_autocast`` fixes one dtype at registration, also under another autocast.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from .library import LIBRARY, OPERATORS, overload

_DEVICES = ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1", "MTIA", "HPU")


def _device_type(key: str) -> str:
    return torch._C._get_privateuse1_backend_name() if key == "PrivateUse1" else key.lower()


def _keys(*devices: str) -> torch._C.DispatchKeySet:
    # By name: not every one of them is in the Python enumeration of keys.
    sets = (torch._C.DispatchKeySet(torch._C._parse_dispatch_key(f"Autocast{device}")) for device in devices)
    return functools.reduce(operator.or_, sets)


_TYPES = frozenset(device.lower() for device in _DEVICES)
_ALL_KEYS = _keys(*_DEVICES)


def excluded():
    """A context in which nothing is cast."""
    return torch._C._ExcludeDispatchKeyGuard(_ALL_KEYS)


def casts(x: Tensor) -> bool:
    """Whether a q, k or v of this kind would be cast now."""
    if not isinstance(x, Tensor):
        return False  # the operator says what it expected
    kind = x.device.type
    if kind not in _TYPES and kind != _device_type("PrivateUse1"):
        return False
    return (
        torch.is_autocast_enabled(kind)
        and x.is_floating_point()
        and x.dtype not in (torch.float64, torch.get_autocast_dtype(kind))
    )


def _kernel(name: str, device: str) -> Callable:
    op = overload(name)
    autocast_keys = _keys(device)

    def cast_qkv(q, k, v, *rest):
        device_type = _device_type(device)
        dtype = torch.get_autocast_dtype(device_type)
        # While the keys are still there: without them nothing is cast.
        qkv = (x.to(dtype) if x.device.type == device_type and casts(x) else x for x in (q, k, v))
        args = (*qkv, *rest)
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return op(*args)

    def leave_as_it_is(*args):
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return op(*args)

    return cast_qkv if name.endswith("fwd") else leave_as_it_is


def _register() -> None:
    for name in OPERATORS:
        for device in _DEVICES:
            LIBRARY.impl(name, _kernel(name, device), f"Autocast{device}")


_register()
