"""What hardware this is: the only place that asks."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch


@functools.cache
def architecture(device: torch.device) -> str:
    """The compiler's name of a device's architecture: "sm_90", "gfx942". Others: the name of the device type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def processors(device: torch.device) -> int:
    """Its multiprocessors (compute units), each of which runs programs of its own; a guess where nobody says."""
    if device.type == "cpu":
        return 1
    module = torch.get_device_module(device)
    properties = module.get_device_properties(device) if hasattr(module, "get_device_properties") else None
    return getattr(properties, "multi_processor_count", 64)


def accelerators() -> list[torch.device]:
    """The devices beside the CPU that this PyTorch can use."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type
    return [torch.device(kind, i) for i in range(torch.accelerator.device_count())]


def name(device: torch.device) -> str:
    """What its maker calls it; the device type where nobody says."""
    if device.type == "cpu":
        return _cpu_name()
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cores() -> int:
    """The CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(device: torch.device) -> int | None:
    """Bytes of memory; None where nobody says."""
    if device.type == "cpu":
        known = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= getattr(os, "sysconf_names", {}).keys()
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else None
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return None
    return getattr(module.get_device_properties(device), "total_memory", None)


@functools.cache
def has_tf32(device: torch.device) -> bool:
    """Whether Triton multiplies float32 matrices in TF32 there."""
    return device.type == "cuda" and not torch.version.hip


def allows_tf32() -> bool:
    """Whether float32 matrix products may be rounded to TF32: ``torch.set_float32_matmul_precision`` and its heirs."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set per backend (torch.backends.*.fp32_precision), where the old question has no answer
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


# Without asking whether CUDA is initialized: there is a tensor.
_current_cuda_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def current_index(device: torch.device) -> Callable[[], int | None]:
    """What tells the index of the device of that type where kernels are launched now."""
    if device.type == "cuda":
        return _current_cuda_device
    return (lambda: device.index) if device.type == "cpu" else torch.accelerator.current_device_index


def current(device: torch.device):
    """A context in which kernels are launched there."""
    return torch.accelerator.device_index(device.index)


def quick_empty(device: torch.device):
    """(shape, strides, dtype) -> tensor on the current device of that type: what compiled graphs allocate with, at
    less than half the price of ``torch.empty_strided``. None where PyTorch has none.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return getattr(guards, f"_empty_strided_{device.type}", None)


def static_launcher():
    """PyTorch's launcher of compiled Triton kernels: (function, grid of three, warps, shared memory, a letter for the
    type of each argument, arguments, stream). None where PyTorch has none, or one for other devices.
    """
    launcher = getattr(torch._C, "_StaticCudaLauncher", None) if torch.version.cuda else None
    return getattr(launcher, "_launch_kernel", None)


@functools.cache
def why_no_triton() -> str | None:
    """Why Triton kernels cannot be compiled here, or None."""
    try:
        import triton
    except Exception as error:  # a broken installation raises anything
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"Triton {triton.__version__} is older than 3.6"
    return None
