"""Two configs of one kernel that give different results, left to flag_gems's libtuner: which one it takes, as JSON.

flag_gems_costs.py runs it twice, with one database.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl
from flag_gems.utils import libtuner

CONFIGS = [triton.Config({"STEPS": steps}) for steps in (200_000, 0)]


@triton.jit
def _approach_two(out, named, unnamed, STEPS: tl.constexpr):
    """2 after many steps, 0 after none."""
    value = 0.0
    for _ in range(STEPS):
        value = value * 0.5 + 1.0
    tl.store(out, value)


tuned, reversed_configs = (
    libtuner(configs=configs, key=["named"])(_approach_two) for configs in (CONFIGS, CONFIGS[::-1])
)


def choice(named: int, unnamed: int, dtype: torch.dtype = torch.float32) -> dict:
    """How many configs it times, which one it takes, and what that gives."""
    out = torch.full((1,), torch.nan, dtype=dtype, device="cuda")
    timed = []
    bench = type(tuned)._bench

    def watched(self, *arguments, config, **options):
        timed.append(config)
        return bench(self, *arguments, config=config, **options)

    type(tuned)._bench = watched
    try:
        tuned[(1,)](out, named, unnamed)
    finally:
        type(tuned)._bench = bench
    return {"timed": len(timed), "steps": tuned.best_config.kwargs["STEPS"], "result": out.item()}


if __name__ == "__main__":
    calls = [(16, 16), (16, 32), (32, 16), (16, 16, torch.float16)]
    found = [choice(*call) for call in calls]
    other_table = tuned.config_table_name != reversed_configs.config_table_name
    json.dump({"choices": found, "configs in the key": other_table}, sys.stdout)
