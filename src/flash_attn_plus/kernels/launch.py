"""Launching a kernel again at a fraction of the price.

Triton's own launch looks at every argument to find the kernel that was compiled for such arguments. The caller here
knows: the signature that it was made for decides that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from .. import device


class Launch:
    """A jit function with all that is the same in every call: grid, constants (in order) and options.

    Later calls must agree with the first in everything that Triton specialises on: dtypes, alignments, which
    arguments are None, and the integers that are not in ``do_not_specialize``.
    """

    def __init__(self, function: Callable, programs: int, constants: dict, options: dict[str, int]) -> None:
        self.function, self.grid = function, (programs, 1, 1)
        self.constants = tuple(constants.values())
        # Said, because a Triton release changed the default.
        self.options = {**options, "enable_fp_fusion": True}
        self.compiled, self.run, self.stream_of = None, None, None

    def __call__(self, tensors: tuple[Tensor | None, ...], rest: tuple) -> None:
        """The function's arguments are ``(*tensors, *rest, *constants)``. Runs on the first tensor's device, which must
        be the current one.
        """
        if self.run is None:
            self.compiled = self.function[self.grid](*tensors, *rest, *self.constants, **self.options)
            if self.compiled is not None:  # None if it was interpreted
                self.run = self.compiled[self.grid]
                if "stream" in inspect.signature(self.run).parameters:
                    self.stream_of = triton.runtime.driver.active.get_current_stream
            return
        # Tensors as integers: a launcher asks the driver about every tensor that it is given.
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        if self.stream_of is None:
            self.run(*pointers, *rest, *self.constants)
        else:  # it would ask which device is the current one
            self.run(*pointers, *rest, *self.constants, stream=self.stream_of(tensors[0].get_device()))


class Prepared:
    """Launches that are prepared for arguments of one signature; ``run`` runs them with such arguments."""

    def __init__(self, on: torch.device) -> None:
        self.device = on

    def __call__(self, *args):
        if device.is_current(self.device):
            return self.run(*args)
        with device.current(self.device):
            return self.run(*args)
