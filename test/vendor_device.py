"""A vendor's device without a vendor: PyTorch's PrivateUse1 with host memory, from Python alone.

Its tensors have their own device type and dispatch key, and PyTorch's CPU operators do not take them. DLPack lends the
same memory to a CPU tensor, and back: so every ATen operator runs that no one else implements here, and Triton's
interpreter finds numbers behind the addresses. What is renamed is so for the whole process: import this in one of its
own.
"""

from __future__ import annotations

import ctypes

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "vendor"
_CPU, _PRIVATE_USE = 1, 12  # DLPack's numbers

ran: list[str] = []  # the ATen operators that ran there, by name


class _Module:
    """What PyTorch expects as ``torch.vendor``."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


class _DLTensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _lent(x: torch.Tensor, to: int) -> torch.Tensor:
    """The same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(x)
    _DLTensor.from_address(_address(capsule, b"dltensor")).device_type = to
    return torch._C._from_dlpack(capsule)


def on_host(x):
    if isinstance(x, torch.Tensor) and x.device.type == NAME:
        return _lent(x.detach(), _CPU)
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def _on_device(x):
    return _lent(x, _PRIVATE_USE) if isinstance(x, torch.Tensor) else x


def _run(op, *args, **kwargs):
    """Every operator without a kernel for the device."""
    if op.namespace != "aten":
        raise NotImplementedError(f"{op} has no kernel for {NAME}")
    ran.append(op.name())
    # A number that stands for a tensor comes as a number.
    tensors = [isinstance(argument.type, torch.TensorType) for argument in op._schema.arguments]
    host = [torch.tensor(x) if wanted and isinstance(x, bool | int | float) else x for wanted, x in zip(tensors, args)]  # noqa: B905
    host, host_kwargs = pytree.tree_map(on_host, host), pytree.tree_map(on_host, kwargs)
    # What an operator must make larger is not lent: it takes over the memory of the result.
    grown = {name: torch.empty_like(host_kwargs[name]) for name in _outs(op, kwargs) if not kwargs[name].numel()}
    result = op(*host, **host_kwargs | grown)
    for name, x in grown.items():
        x = _on_device(x)
        kwargs[name].set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
    names = [argument.name for argument in op._schema.arguments]
    written = [name for name in names if _is_written(op, name)]
    if not written:
        return pytree.tree_map(_on_device, result)
    given = dict(zip(names, args, strict=False)) | kwargs  # those tensors, and not others in the same memory
    return given[written[0]] if len(written) == 1 else tuple(given[name] for name in written)


def _outs(op, kwargs) -> list[str]:
    return [name for name in kwargs if _is_written(op, name)]


def _is_written(op, name: str) -> bool:
    info = next(argument.alias_info for argument in op._schema.arguments if argument.name == name)
    return info is not None and info.is_write


def _copy_from(source, into, non_blocking=False):
    on_host(into).copy_(on_host(source))
    return into


def _of_cpu(name: str, overload: str = "default") -> None:
    """Of what only changes shapes and strides: the CPU's own kernel takes any device."""
    op = getattr(getattr(torch.ops.aten, name), overload)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    _aten.impl(op.name().removeprefix("aten::"), lambda *args: op.redispatch(keys, *args), "PrivateUse1")


_setup_privateuseone_for_python_backend(NAME, _Module())
_aten, _all = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
_all.fallback(_run, "PrivateUse1")
_all.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # as every vendor does
_aten.impl("_copy_from", _copy_from, "PrivateUse1")
for _view in ("as_strided", "view", "_reshape_alias"):
    _of_cpu(_view)
_of_cpu("set_", "source_Storage")
_of_cpu("set_", "source_Storage_storage_offset")
