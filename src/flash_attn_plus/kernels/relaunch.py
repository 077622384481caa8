"""What a call of several operators launches, launched again with nothing looked at but where its tensors lie.

A step of decoding is three launches of some microseconds. What comes before them takes longer: telling two operators
their arguments, asking for each launch whether it may be made, asking every tensor for its address more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from torch import Tensor

from .. import device
from . import arguments
from .launch import Launch, Prepared, is_watched, of_thread

# A launch, which tensors it is given (their numbers; None for one that is not there), and its other arguments.
Numbered = tuple[Launch, Sequence[int | None], tuple | None]


class Relaunch:
    """Launches in a row, on the device of what was prepared for them. Tensors are numbered: those whose addresses are
    told from 0 on, then the results.
    """

    def __init__(
        self, prepared: Prepared, results: Sequence[arguments.Result | None], launches: Sequence[Numbered]
    ) -> None:
        """NotImplementedError: a launch takes more than addresses."""
        self.index, self.current_index, self.results = prepared.index, prepared.current_index, results
        self.stream_of = launches[0][0].stream_of
        self.launches = []
        for launch, tensors, rest in launches:
            behind = launch.direct and rest and launch.direct.behind_of(rest)
            if behind is None:
                raise NotImplementedError("no such launcher, or arguments that differ from call to call")
            numbers = itemgetter(*[x for x in tensors if x is not None])  # a kernel has two pointers at least
            self.launches.append((launch.direct.launch, numbers, behind))

    def is_possible(self) -> bool:
        """Here and now."""
        if self.current_index() != self.index or not of_thread.has_context or is_watched():
            return False
        return not device.is_capturing()  # early starts are launched in another way: launch.py

    def __call__(self, addresses: list[int]) -> list[Tensor | None]:
        """The results."""
        results = arguments.empty(*self.results)
        addresses = addresses + [0 if x is None else x.data_ptr() for x in results]
        stream = self.stream_of(self.index)
        for launch, numbers, behind in self.launches:
            launch((*numbers(addresses), *behind), stream)
        return results
