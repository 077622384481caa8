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
    """The compiler's name of a device's architecture: "sm_90", "gfx942". That of a vendor's device begins with the name
    of its backend in Triton: "npu_Ascend910B3". Others: the name of the device type.
    """
    if device.type != "cuda":
        target = _ask_triton(device, lambda driver, index: driver.get_current_target())
        # Some backends put a table of properties where others have a name or a number.
        if target is not None and isinstance(target.arch, str | int):
            return f"{target.backend}_{target.arch}"
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) as CUDA counts; None of other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def processors(device: torch.device) -> int:
    """Its multiprocessors (compute units), each of which runs programs of its own; a guess where nobody says."""
    if device.type == "cpu":
        return 1
    module = torch.get_device_module(device)
    properties = module.get_device_properties(device) if hasattr(module, "get_device_properties") else None
    count = getattr(properties, "multi_processor_count", None)
    if count is None:
        properties = _ask_triton(device, lambda driver, index: driver.utils.get_device_properties(index))
        count = (properties or {}).get("multiprocessor_count")
    return count or 64


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
    if device.type == "cpu":
        return lambda: device.index
    if _is_accelerator(device):
        return torch.accelerator.current_device_index
    return torch.get_device_module(device).current_device


def current(device: torch.device):
    """A context in which kernels are launched there."""
    if _is_accelerator(device):
        return torch.accelerator.device_index(device.index)
    return torch.get_device_module(device).device(device.index)


def _is_accelerator(device: torch.device) -> bool:
    """Whether ``torch.accelerator`` speaks of devices of that type: of one at a time, where several are there."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


# Whether a CUDA graph is captured from the current stream.
is_capturing = torch.cuda.is_current_stream_capturing if torch.version.cuda else lambda: False


def quick_empty(device: torch.device):
    """(shape, strides, dtype) -> tensor on the current device of that type: what compiled graphs allocate with, at
    less than half the price of ``torch.empty_strided``. None where PyTorch has none.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return getattr(guards, f"_empty_strided_{device.type}", None)


def static_launcher(device: torch.device):
    """PyTorch's launcher of compiled Triton kernels: (function, grid of three, warps, shared memory, a letter for the
    type of each argument, arguments, stream). None where PyTorch has none, or one for other devices.
    """
    if device.type != "cuda" or not torch.version.cuda:
        return None
    return getattr(getattr(torch._C, "_StaticCudaLauncher", None), "_launch_kernel", None)


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


@functools.cache
def why_no_driver(device: torch.device) -> str | None:
    """Why Triton, which is there, launches no kernels on a device; None where it does, and where that is not asked: of
    PyTorch's own GPUs, and in Triton's interpreter.
    """
    if device.type in ("cpu", "cuda"):
        return None
    import triton

    if triton.knobs.runtime.interpret:
        return None
    try:
        of_driver = triton.runtime.driver.active.get_active_torch_device().type
    except Exception as error:  # no driver is active, several are, or a vendor's raises anything
        return f"Triton has no driver for device type {device.type!r} ({type(error).__name__}: {error})"
    if of_driver != device.type:
        return f"Triton's driver is for device type {of_driver!r}, not {device.type!r}"
    return None


def _ask_triton(device: torch.device, question: Callable):
    """``question(driver, index)`` with the device as the current one; None where Triton does not know such devices."""
    if device.type in ("cpu", "meta") or why_no_triton() is not None or why_no_driver(device) is not None:
        return None
    import triton

    try:
        with current(device):
            return question(triton.runtime.driver.active, device.index or 0)
    except Exception:  # vendors' drivers differ in what they answer, and in how they refuse
        return None
