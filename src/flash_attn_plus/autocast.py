"""Autocast: q, k and v follow the active autocast dtype; bias, sink and slopes stay as they are.

The other operators take what they are given. They have a kernel on these keys all the same, because a device kernel
must never run under autocast: it would cast inside the products, of a backward that is called there too.

``torch.library.register_autocast`` fixes one dtype at registration, also under another autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .library import overload

_DEVICES = ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1")


def _device_type(key: str) -> str:
    return torch._C._get_privateuse1_backend_name() if key == "PrivateUse1" else key.lower()


def _kernel(name: str, device: str) -> Callable:
    op = overload(name)
    autocast_keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def cast(tensor: Tensor, device_type: str, dtype: torch.dtype) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device_type
        return tensor.to(dtype) if eligible else tensor

    def cast_qkv(q, k, v, *rest):
        device_type = _device_type(device)
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return op(*(cast(tensor, device_type, dtype) for tensor in (q, k, v)), *rest)

    def leave_as_it_is(*args):
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return op(*args)

    return cast_qkv if name in ("fwd", "varlen_fwd") else leave_as_it_is


def register(library: torch.library.Library) -> None:
    for name in ("fwd", "bwd", "varlen_fwd", "varlen_bwd", "merge_states", "combine"):
        for device in _DEVICES:
            library.impl(name, _kernel(name, device), f"Autocast{device}")
