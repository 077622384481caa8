"""The device's own time of calls, in CUDA graphs."""

from __future__ import annotations

import math

import torch
from attention import poison
from decode_cases import Case
from torch import Tensor

LAUNCHES = 20  # in a graph, at least: starting one takes the device some microseconds


class Captured:
    """The launches of a case in a CUDA graph."""

    def __init__(self, case: Case, launches: int = LAUNCHES) -> None:
        self.case = case
        self.repeats = -(-launches // len(case.calls))
        self.graph = torch.cuda.CUDAGraph()
        self.outs: dict[int, Tensor] = {}  # what is judged; it has memory that no other launch of the graph writes to
        with case.select():
            for call in case.calls:  # kernels are compiled, or loaded, by their first call
                call()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                for _ in range(self.repeats):
                    self._launch()
        for out in self.outs.values():
            poison(out)  # rows that nothing writes do not pass as right
        self.seconds_once = self.clock(1)

    def _launch(self) -> None:
        for i, call in enumerate(self.case.calls):
            out = call()
            if i in (0, len(self.case.calls) - 1):
                self.outs[i] = out

    def clock(self, replays: int) -> float:
        """Seconds of a launch by the device's own clock."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / (replays * self.repeats * len(self.case.calls))

    def seconds(self, at_least: float) -> float:
        one = self.seconds_once * self.repeats * len(self.case.calls)
        self.clock(1)  # not timed: the device has waited for the host
        return self.clock(max(1, math.ceil(at_least / one)))

    def error(self) -> float:
        return torch.tensor([self.case.error(i, out) for i, out in self.outs.items()]).max().item()
