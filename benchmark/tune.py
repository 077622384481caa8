"""Measures the forward's tiles on this machine's GPU and prints the fastest, for plan.py.

    python benchmark/tune.py                                     # bfloat16, plain and with options
    python benchmark/tune.py --head-dim 128 --dtype float32 --seqlen 4096 --csv tiles.csv

Each candidate is compiled in a pool of processes, checked against the plan that is there, and timed: the median over
rounds in which all candidates of a problem take turns. What spills registers or does not fit is shown and not timed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch
from attention import checkout, machine

from flash_attn_plus import plan
from flash_attn_plus.kernels.forward import Forward
from flash_attn_plus.plan import Plan
from flash_attn_plus.schemas import Variant

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Problem(NamedTuple):
    head_dim: int
    seqlen: int
    causal: bool
    option: str  # "" is none
    dtype: str

    def make(self):
        batch, heads = max(1, 16384 // self.seqlen), max(1, 2048 // self.head_dim)
        tensor = dict(device="cuda", dtype=DTYPES[self.dtype])
        q, k, v = (torch.randn(batch, self.seqlen, heads, self.head_dim, **tensor) for _ in range(3))
        chosen = {
            "": {},
            "softcap": {"softcap": 30.0},
            "alibi": {"alibi_slopes": torch.rand(heads, device="cuda")},
            "bias": {"attn_bias": torch.randn(1, heads, self.seqlen, self.seqlen, **tensor)}
            if self.option == "bias"
            else {},
            "dropout": {"dropout_p": 0.1, "rng_state": torch.tensor([1, 2], device="cuda")},
            "window": {"window_left": 512},
        }[self.option]
        return q, k, v, Variant(causal=self.causal, **chosen)

    def flops(self) -> float:
        whole = 4 * 16384 * self.seqlen * 2048
        return whole / 2 if self.causal else whole


def candidates(dtype: str) -> list[Plan]:
    if dtype == "float32":  # on the ordinary units, whose operands are registers
        rows, columns, stages = (16, 32, 64), (16, 32, 64), (1, 2)
    else:
        rows, columns, stages = (64, 128), (32, 64, 128), (1, 2, 3, 4)
    return [Plan(*x) for x in itertools.product(rows, columns, (4, 8), stages)]


def forward_with(tiles: Plan, inputs) -> Forward:
    chosen, plan.forward = plan.forward, lambda problem: tiles
    try:
        return Forward(*inputs)
    finally:
        plan.forward = chosen


def compiled(work: tuple[Problem, Plan]) -> str:
    """Fills the compiler's cache in a process of its own; says why a candidate cannot run, or nothing."""
    problem, tiles = work
    try:
        inputs = problem.make()
        forward = forward_with(tiles, inputs)
        forward(*inputs)
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler raises rules the candidate out
        return f"{type(error).__name__}: {str(error)[:60]}".replace("\n", " ")
    spilled = 4 * forward.launch.compiled.n_spills
    return f"spills {spilled} bytes" if spilled > 64 else ""


def milliseconds(run, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def measure(problem: Problem, rivals: list[Plan], rounds: int) -> list[tuple[float, Plan]]:
    """(TFLOP/s, plan), the fastest first."""
    inputs = problem.make()
    expected = Forward(*inputs)(*inputs)[0].float()
    runs, times = {}, {}
    for tiles in rivals:
        runs[tiles] = forward_with(tiles, inputs)
        error = ((runs[tiles](*inputs)[0].float() - expected).norm() / expected.norm()).item()
        if error < 1e-2:
            times[tiles] = []
        else:
            print(f"  wrong: {tiles}: {error:.2g}")
    for _ in range(rounds):
        for tiles, measured in times.items():
            run = functools.partial(runs[tiles], *inputs)
            repeats = max(1, int(4 / milliseconds(run, 1)))
            measured.append(milliseconds(run, repeats))
    rates = [(problem.flops() / statistics.median(taken) / 1e9, tiles) for tiles, taken in times.items()]
    return sorted(rates, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seqlen", type=int, nargs="+", default=[4096])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--mask", choices=("full", "causal"), nargs="+", default=["full", "causal"])
    parser.add_argument("--option", nargs="+", default=["", "alibi"], help="softcap, alibi, bias, dropout, window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--top", type=int, default=6, help="how many to show of each problem")
    parser.add_argument("--csv", help="write every measurement there")
    parser.add_argument("--commit", default=checkout(), help="what is measured, where there is no git to say so")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("a GPU is needed to measure tiles on")

    problems = [
        Problem(head_dim, seqlen, mask == "causal", option, args.dtype)
        for head_dim, seqlen, mask, option in itertools.product(args.head_dim, args.seqlen, args.mask, args.option)
    ]
    work = [(problem, tiles) for problem in problems for tiles in candidates(args.dtype)]
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        reasons = dict(zip(work, pool.map(compiled, work, chunksize=2), strict=True))

    rows = []
    for problem in problems:
        rivals = [tiles for p, tiles in work if p == problem and not reasons[p, tiles]]
        measured = measure(problem, rivals, args.rounds)
        name = f"d{problem.head_dim} s{problem.seqlen} {'causal' if problem.causal else 'full'} {problem.option}"
        print(f"{name}: {len(rivals)} of {len(work) // len(problems)} run")
        for (p, tiles), reason in reasons.items():
            if p == problem and reason:
                print(f"  not timed: {tuple(tiles)}: {reason}")
        for rate, tiles in measured[: args.top]:
            print(f"  {rate:6.0f} TFLOP/s  {tiles}")
        rows += [(*problem, *tiles, f"{rate:.1f}") for rate, tiles in measured]
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.writer(file)
            facts = machine("cuda", args.commit)
            writer.writerow([*Problem._fields, *Plan._fields, "tflops", *facts])
            writer.writerows((*row, *facts.values()) for row in rows)


if __name__ == "__main__":
    main()
