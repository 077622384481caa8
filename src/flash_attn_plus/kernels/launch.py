"""Launching a kernel again at a fraction of the price.

Triton's own launch looks at every argument to find the kernel that was compiled for such arguments. The caller here
knows: the signature that it was made for decides that.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


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
        self.compiled, self.run = None, None

    def __call__(self, tensors: tuple[Tensor, ...], rest: tuple) -> None:
        """The function's arguments are ``(*tensors, *rest, *constants)``. Runs on the current device."""
        if self.run is not None:
            # As integers: a launcher asks the driver about every tensor that it is given.
            self.run(*[x.data_ptr() for x in tensors], *rest, *self.constants)
            return
        self.compiled = self.function[self.grid](*tensors, *rest, *self.constants, **self.options)
        if self.compiled is not None:  # None if it was interpreted
            self.run = self.compiled[self.grid]
