"""Launching a kernel again at a fraction of the price.

Triton's own launch looks at every argument to find the kernel that was compiled for such arguments; what it then runs
still takes all arguments, constants too, and calls its hooks. The caller here knows: the signature that it was made for
decides which kernel it is, and all of its arguments but the addresses of tensors.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from .. import device, log

# Triton's types -> the letters of PyTorch's launcher.
_LETTERS = {"i1": "i", "i32": "i", "i64": "l", "fp32": "f", "fp64": "d"}

_runtime = triton.knobs.runtime


class _OfThread(threading.local):
    has_context = False  # a kernel was launched from this thread, which binds a context to it


of_thread = _OfThread()


class Launch:
    """A jit function with all that is the same in every call: grid, constants (in order) and options.

    Later calls must agree with the first in everything but where tensors lie, up to alignment: in dtypes, numbers, and
    which arguments are None.
    """

    def __init__(self, function: Callable, programs: int, constants: dict, options: dict[str, int]) -> None:
        names = list(function.arg_names)[len(function.arg_names) - len(constants) :]
        if list(constants) != names:  # they are passed by their places: a wrong order would compile
            raise TypeError(f"constants: expected {names}, got {list(constants)}")
        self.function, self.grid = function, (programs, 1, 1)
        self.constants = tuple(constants.values())
        # Said, because a Triton release changed the default.
        self.options = {**options, "enable_fp_fusion": True}
        self.early = options.get("launch_pdl", False)  # early.py
        self.compiled, self.run, self.stream_of, self.direct = None, None, None, None

    def __call__(self, tensors: tuple[Tensor | None, ...], rest: tuple) -> None:
        """The function's arguments are ``(*tensors, *rest, *constants)``. Runs on the first tensor's device, which must
        be the current one.
        """
        direct = self.direct
        if self.early and device.is_capturing():
            direct = None  # it cannot ask for an early start
        if direct is not None and of_thread.has_context and not is_watched():
            direct(tensors, rest, self.stream_of(tensors[0].get_device()))
        elif self.run is None:
            self._first(tensors, rest)
        else:
            # Tensors as integers: a launcher asks the driver about every tensor that it is given.
            pointers = [None if x is None else x.data_ptr() for x in tensors]
            if self.stream_of is None:
                self.run(*pointers, *rest, *self.constants)
            else:  # it would ask which device is the current one
                self.run(*pointers, *rest, *self.constants, stream=self.stream_of(tensors[0].get_device()))
            of_thread.has_context = True

    def _first(self, tensors: tuple[Tensor | None, ...], rest: tuple) -> None:
        self.compiled = self.function[self.grid](*tensors, *rest, *self.constants, **self.options)
        if self.compiled is None:
            return  # it was interpreted
        of_thread.has_context = True
        self.run = self.compiled[self.grid]
        if "stream" in inspect.signature(self.run).parameters:
            self.stream_of = triton.runtime.driver.active.get_current_stream
            launcher = device.static_launcher(tensors[0].device)
            if launcher is not None:
                self.direct = Direct.of(launcher, self.compiled, self.grid[0], tensors, rest)
            else:
                log.once("this PyTorch has no launcher of Triton kernels: Triton's own, which takes longer on the host")


def is_watched() -> bool:
    """Whether anyone hooked Triton's launches: profilers do."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Direct:
    """A compiled kernel in the hands of PyTorch's launcher of Triton kernels, the one that compiled graphs use: it
    takes what the kernel takes, and nothing else.
    """

    def __init__(self, launcher: Callable, compiled, programs: int, tensors: tuple, rest: tuple) -> None:
        metadata = compiled.metadata
        if metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
            raise NotImplementedError("a kernel that needs more than a grid")
        scratch = [getattr(metadata, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
        if any(scratch):
            raise NotImplementedError("a kernel that needs memory of its own")
        signature = [compiled.src.signature[name] for name in compiled.src.fn.arg_names]
        present = [i for i, x in enumerate(tensors) if x is not None]
        if any(signature[i][0] != "*" for i in present):
            raise NotImplementedError("tensors that are no pointers")
        # Where in ``rest`` the kernel's other arguments are: (place, place in a tuple or None).
        self.places, letters = [], ["O"] * len(present)
        for place, kind in _leaves(signature[len(tensors) : len(tensors) + len(rest)]):
            self.places.append(place)
            letters.append("O" if kind[0] == "*" else _LETTERS[kind])
        self.pointers = [i for i, letter in enumerate(letters[len(present) :]) if letter == "O"]
        self.hidden = (None,) * sum(size is not None for size in scratch)
        self.letters = "".join(letters) + "O" * len(self.hidden)
        self.rest, self.behind = None, ()
        head = (compiled.function, programs, 1, 1, metadata.num_warps, metadata.shared, self.letters)
        self.launch = functools.partial(launcher, *head)

    @classmethod
    def of(cls, launcher: Callable, compiled, programs: int, tensors: tuple, rest: tuple) -> Direct | None:
        """None where this kernel cannot be launched so."""
        try:
            return cls(launcher, compiled, programs, tensors, rest)
        except (AttributeError, KeyError, NotImplementedError):
            return None

    def __call__(self, tensors: tuple[Tensor | None, ...], rest: tuple, stream: int) -> None:
        behind = self.behind if rest is self.rest else self._behind(rest)
        self.launch((*[x.data_ptr() for x in tensors if x is not None], *behind), stream)

    def behind_of(self, rest: tuple) -> tuple | None:
        """What stands behind the tensors, where it is the same in every call."""
        return None if self.pointers else self._behind(rest)

    def _behind(self, rest: tuple) -> tuple:
        """What stands behind the tensors."""
        values = [rest[i] if j is None else rest[i][j] for i, j in self.places]
        for i in self.pointers:
            values[i] = values[i].data_ptr()
        behind = (*values, *self.hidden)
        if not self.pointers:  # the same numbers in every call, in the same tuple if the caller keeps it
            self.behind = behind
            self.rest = rest  # last: another thread may be about to compare it
        return behind


def _leaves(signature: list) -> Iterator[tuple[tuple[int, int | None], str]]:
    """(place, type) of what a kernel is given: not of constants, and of tuples each part."""
    for i, kind in enumerate(signature):
        if not isinstance(kind, tuple):
            if kind != "constexpr":
                yield (i, None), kind
            continue
        for j, part in enumerate(kind):
            if isinstance(part, tuple):
                raise NotImplementedError("tuples in tuples")
            if part != "constexpr":
                yield (i, j), part


class Prepared:
    """Launches that are prepared for arguments of one signature. Calling it runs them with such arguments: on their
    device (``elsewhere`` where ``current_index() != index``).
    """

    only_launches = False  # whether calls do nothing but launch what ``launches`` returns

    def __init__(self, on: torch.device) -> None:
        self.device, self.index, self.current_index = on, on.index, device.current_index(on)

    def elsewhere(self, *args):
        """The call, while another device is the current one."""
        with device.current(self.device):
            return self(*args)
