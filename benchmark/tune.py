"""Measures tiles on this machine's GPU and prints the fastest, for plan.py.

    python benchmark/tune.py                                     # the forward; bfloat16, plain and with options
    python benchmark/tune.py --kernel dq dk_dv dk dv             # the passes of the backward
    python benchmark/tune.py --head-dim 128 --dtype float32 --seqlen 4096 --csv tiles.csv

Each candidate is compiled in a pool of processes, checked against the plan that is there, and timed: the median over
rounds in which all candidates of a problem take turns. What spills registers or does not fit is shown and not timed.
"""

from __future__ import annotations

import argparse
import csv
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
from flash_attn_plus.kernels.backward import Backward
from flash_attn_plus.kernels.forward import Forward
from flash_attn_plus.plan import Plan
from flash_attn_plus.schemas import Variant

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# Matrix products of each kernel, of which the forward's two are its FLOP. dk and dv come from one pass, or from two.
PRODUCTS = {"forward": 2, "dq": 3, "dk_dv": 4, "dk": 3, "dv": 2}
PASSES = {"dq": "queries", "dk_dv": "keys", "dk": "keys", "dv": "values"}


class Problem(NamedTuple):
    kernel: str
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
        whole = 2 * PRODUCTS[self.kernel] * 16384 * self.seqlen * 2048
        return whole / 2 if self.causal else whole


def candidates(kernel: str, dtype: str) -> list[Plan]:
    if dtype == "float32":  # on the ordinary units, whose operands are registers
        rows, columns, stages = (16, 32, 64), (16, 32, 64), (1, 2)
    elif kernel == "forward":
        rows, columns, stages = (64, 128), (32, 64, 128), (1, 2, 3, 4)
    elif kernel == "dq":
        rows, columns, stages = (64, 128), (32, 64, 128), (1, 2, 3)
    else:
        rows, columns, stages = (32, 64, 128), (64, 128), (1, 2, 3)
    return [Plan(*x) for x in itertools.product(rows, columns, (4, 8), stages)]


def _skip(*args) -> None:
    pass


class Run:
    """One kernel with given tiles (None: those of plan.py), which can be run alone."""

    def __init__(self, kernel: str, inputs, tiles: Plan | None = None) -> None:
        function = "forward" if kernel == "forward" else "backward"
        chosen = getattr(plan, function)

        def instead(problem):
            if kernel == "forward":
                return tiles or chosen(problem)
            row = chosen(problem)
            row = row._replace(values=None if kernel == "dk_dv" else row.values or row.keys)
            return row._replace(**{PASSES[kernel]: tiles}) if tiles else row

        setattr(plan, function, instead)
        try:
            self.forward = Forward(*inputs)
            if kernel != "forward":
                out, lse = self.forward(*inputs)
                q, k, v, variant = inputs
                dout = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
                self.inputs = (dout.to(q.dtype), q, k, v, out, lse, None, variant, True, True, False)
                self.backward = Backward(*self.inputs)
        finally:
            setattr(plan, function, chosen)
        self.kernel, self.of_forward = kernel, inputs

    def result(self) -> torch.Tensor:
        if self.kernel == "forward":
            return self.forward(*self.of_forward)[0].float()
        dq, dk, dv = self.backward(*self.inputs)[:3]
        return torch.cat([x.float().flatten() for x in {"dq": [dq], "dk": [dk], "dv": [dv]}.get(self.kernel, [dk, dv])])

    def alone(self) -> None:
        if self.kernel == "forward":
            self.forward(*self.of_forward)
        else:
            self.backward(*self.inputs)

    def isolate(self) -> Run:
        if self.kernel != "forward":
            for other in {"queries", "keys", "values"} - {PASSES[self.kernel]}:
                if getattr(self.backward, other) is not None:
                    setattr(self.backward, other, _skip)
        return self

    def spilled(self) -> int:
        launch = self.forward.launch if self.kernel == "forward" else getattr(self.backward, PASSES[self.kernel])
        return 4 * launch.compiled.n_spills


def compiled(work: tuple[Problem, Plan, int]) -> str:
    """Fills the compiler's cache in a process of its own; says why a candidate is not timed, or nothing."""
    problem, tiles, most_spilled = work
    try:
        run = Run(problem.kernel, problem.make(), tiles)
        run.alone()
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler raises rules the candidate out
        return f"{type(error).__name__}: {str(error)[:60]}".replace("\n", " ")
    return f"spills {run.spilled()} bytes" if run.spilled() > most_spilled else ""


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
    expected = Run(problem.kernel, inputs).result()
    runs, times = {}, {}
    for tiles in rivals:
        runs[tiles] = Run(problem.kernel, inputs, tiles)
        error = ((runs[tiles].result() - expected).norm() / expected.norm()).item()
        runs[tiles].isolate()
        if error < 1e-2:
            times[tiles] = []
        else:
            print(f"  wrong: {tiles}: {error:.2g}")
    for _ in range(rounds):
        for tiles, measured in times.items():
            run = runs[tiles].alone
            repeats = max(1, int(4 / milliseconds(run, 1)))
            measured.append(milliseconds(run, repeats))
    rates = [(problem.flops() / statistics.median(taken) / 1e9, tiles) for tiles, taken in times.items()]
    return sorted(rates, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=PRODUCTS, nargs="+", default=["forward"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seqlen", type=int, nargs="+", default=[4096])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--mask", choices=("full", "causal"), nargs="+", default=["full", "causal"])
    parser.add_argument("--option", nargs="+", default=["", "alibi"], help="softcap, alibi, bias, dropout, window")
    parser.add_argument("--most-spilled", type=int, default=64, help="bytes of registers; more is not timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--top", type=int, default=6, help="how many to show of each problem")
    parser.add_argument("--csv", help="write every measurement there")
    parser.add_argument("--commit", default=checkout(), help="what is measured, where there is no git to say so")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("a GPU is needed to measure tiles on")

    problems = [
        Problem(kernel, head_dim, seqlen, mask == "causal", option, args.dtype)
        for kernel, head_dim, seqlen, mask, option in itertools.product(
            args.kernel, args.head_dim, args.seqlen, args.mask, args.option
        )
    ]
    work = [(problem, tiles) for problem in problems for tiles in candidates(problem.kernel, args.dtype)]
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        told = pool.map(compiled, [(*item, args.most_spilled) for item in work], chunksize=2)
        reasons = dict(zip(work, told, strict=True))

    rows = []
    for problem in problems:
        rivals = [tiles for p, tiles in work if p == problem and not reasons[p, tiles]]
        measured = measure(problem, rivals, args.rounds)
        mask = "causal" if problem.causal else "full"
        name = f"{problem.kernel} d{problem.head_dim} s{problem.seqlen} {mask} {problem.option}"
        print(f"{name}: {len(rivals)} of {sum(p == problem for p, _ in work)} run")
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
