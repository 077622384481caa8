"""The native CPU library (csrc/): where it lies, whether it is loaded, and why not.

The library is optional: a wheel built without a compiler or without torch's headers has none. It implements operators
whose schemas are defined in Python, so ``load`` must run after the definitions.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

_NOT_BUILT = (
    "not built; to build it, install the package with pip's --no-build-isolation where GCC or Clang (C++20) and "
    "torch 2.11 or newer are present"
)
_library: ctypes.CDLL | None = None
_status = "not loaded yet"


def find() -> Path | None:
    """The library's file, or None.

    An editable install spreads the package over several directories; a library built in the source tree may lie in
    another than an installed one: the newest is taken.
    """
    files = [Path(directory) / "_native.so" for directory in sys.modules[__package__].__path__]
    return max(filter(Path.is_file, files), key=lambda file: file.stat().st_mtime, default=None)


def load() -> bool:
    """Load the library, once; whether its operators are there. Never raises: ``status`` says what went wrong."""
    global _library, _status
    if _library is not None:
        return True
    path = find()
    if path is None:
        _status = _NOT_BUILT
        return False
    try:
        torch.ops.load_library(path)
        _library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        _status = f"{path} failed to load: {error}"
        return False
    _status = f"loaded, {select_kernel('')} kernel"
    return True


def loaded() -> bool:
    """Whether the library's operators can be called."""
    return _library is not None


def status() -> str:
    """Where the library stands, for people: loaded, not built, or failed to load, and why."""
    return _status


def select_kernel(name: str | None) -> str | None:
    """Choose the kernel of one instruction set, for the whole process: for tests and measurements.

    ``name`` is "baseline", "avx2" or "avx512"; None takes the fastest that runs here, which is also the state after
    loading, and "" leaves things as they are. Returns the name of the kernel in use; None where this machine cannot
    run the wanted one or the library is not loaded, and then nothing changes.
    """
    if _library is None:
        return None
    select = _library.flash_attn_plus_select_kernel
    select.argtypes, select.restype = [ctypes.c_char_p], ctypes.c_char_p
    selected: bytes | None = select(None if name is None else name.encode())
    return None if selected is None else selected.decode()
