"""Attention on a GPU beside its peers: TFLOP/s, values, peak memory, and host time per call.

Each row runs every implementation (peers.py) in one process. The implementations take turns, and every figure is the
median over rounds of medians. Each result is first compared with attention in float32; a wrong one is shown as
"wrong", never as a speed. TFLOP/s count what the mask leaves (causal: half of `4 * heads * seqlen ** 2 * head_dim` for
each sequence; backward 2.5 times the forward).

Peak memory is what PyTorch's allocator held above the inputs, or for "backward" above the inputs and what the forward
kept. Host time is what a call costs the host alone: a tiny problem, not waiting for the device.

On a CPU the shapes are tiny: that shows that the program works, and measures nothing.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import io
import platform
import re
import statistics
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import FA2, OURS, PEERS, Call, Peer
from torch import Tensor

import flash_attn_plus as fap

TOLERANCE = 2e-2  # ||result - reference|| / ||reference||; bfloat16 results are off by about 3e-3
CHUNK = 2**26  # scores that the reference holds at a time: 256 MiB

COLUMNS = [
    *("problem", "what", "implementation", "TFLOP/s", "us", "peak MiB", "error", "note"),
    *("device", "torch", "triton", "commit"),
]


@dataclass(frozen=True)
class Problem:
    """Self-attention over sequences of these lengths; equal ones are a batch, unless ``varlen`` packs them."""

    dim: int
    lengths: tuple[int, ...]
    causal: bool
    heads: int
    heads_k: int
    varlen: bool = False

    @property
    def name(self) -> str:
        counts = Counter(self.lengths)
        if self.varlen and len(counts) > 2:
            lengths = f"varlen {len(self.lengths)} of {min(counts)}..{max(counts)}"
        elif self.varlen:
            lengths = "varlen " + " + ".join(f"{count}x{length}" for length, count in counts.items())
        else:
            lengths = f"s{self.lengths[0]}"
        gqa = f" heads {self.heads}/{self.heads_k}" if self.heads != self.heads_k else ""
        return f"d{self.dim} {lengths} {'causal' if self.causal else 'full'}{gqa}"

    def flops(self, what: str) -> float:
        """Of the two matrix products of a forward ("forward"), or of the five of a backward ("backward")."""
        pairs = sum(length * length for length in self.lengths) / (2 if self.causal else 1)
        return 4 * self.heads * pairs * self.dim * {"forward": 1.0, "backward": 2.5}[what]

    def offsets(self, device: str) -> Tensor:
        """cu_seqlens."""
        lengths = torch.tensor([0, *self.lengths], device=device)
        return lengths.cumsum(0, dtype=torch.int32)

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output, packed: (tokens, heads, head_dim)."""
        torch.manual_seed(0)
        heads = (self.heads, self.heads_k, self.heads_k, self.heads)
        tokens = sum(self.lengths)
        return tuple(torch.randn(tokens, h, self.dim, device=device, dtype=torch.bfloat16) for h in heads)


def dense(dim: int, seqlen: int, causal: bool, tokens: int = 16384, hidden: int = 2048) -> Problem:
    return Problem(dim, (seqlen,) * (tokens // seqlen), causal, hidden // dim, hidden // dim)


SHAPES = [(64, 4096), (128, 1024), (128, 4096), (128, 16384), (256, 4096)]
UNEVEN = (1187, 32, 4000, 513, 2504, 177, 3270, 777, 1603, 322, 1999)  # 16384 tokens, in no order
GQA = dict(dim=128, causal=True, heads=32, heads_k=8)
EVEN = (2048,) * 8
GPU = [
    *(dense(dim, seqlen, causal) for dim, seqlen in SHAPES for causal in (False, True)),
    Problem(lengths=EVEN, **GQA),
    Problem(lengths=EVEN, varlen=True, **GQA),
    Problem(lengths=UNEVEN, varlen=True, **GQA),
    Problem(lengths=(8192, *(32,) * 255), varlen=True, **GQA),
]
QUICK = [*(dense(128, 4096, causal) for causal in (False, True)), Problem(lengths=UNEVEN, varlen=True, **GQA)]
CPU = [
    *(dense(64, 64, causal, tokens=128, hidden=128) for causal in (False, True)),
    Problem(32, (16, 16), True, 4, 2),
    Problem(32, (16, 16), True, 4, 2, varlen=True),
    Problem(32, (5, 40, 1), True, 4, 2, varlen=True),
]
HOST = Problem(64, (16,), False, 2, 2)
HOST_NAME = "host b1 s16 h2 d64"


def reference(problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, list[Tensor]]:
    """The output, and the gradients of q, k and v, in float32: every head and row, a block of rows at a time."""
    scale = problem.dim**-0.5
    group = problem.heads // problem.heads_k
    out = torch.empty_like(q, dtype=torch.float32)
    dq, dk, dv = (torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))
    start = 0
    for length in problem.lengths:
        sequence = slice(start, start + length)
        start += length
        heads_first = (x[sequence].transpose(0, 1).float() for x in (q, k, v, dout))
        Q, K, V, dO = (x if len(x) == problem.heads else x.repeat_interleave(group, 0) for x in heads_first)
        dK, dV = torch.zeros_like(K), torch.zeros_like(V)
        columns = torch.arange(length, device=q.device)
        step = max(1, CHUNK // (problem.heads * length))
        for first in range(0, length, step):
            rows = slice(first, min(first + step, length))
            S = Q[:, rows] @ K.mT * scale
            if problem.causal:
                S.masked_fill_(columns > columns[rows, None], -torch.inf)
            P = S.softmax(-1)
            PV = P @ V
            # d softmax: P * (dP - row sum of P * dP), and that row sum is the one of out * dout
            dP = dO[:, rows] @ V.mT
            dS = P * (dP - (PV * dO[:, rows]).sum(-1, keepdim=True)) * scale
            out[sequence][rows] = PV.transpose(0, 1)
            dq[sequence][rows] = (dS @ K).transpose(0, 1)
            dK += dS.mT @ Q[:, rows]
            dV += P.mT @ dO[:, rows]
        for grad, of_heads in ((dk, dK), (dv, dV)):
            grad[sequence] = of_heads.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return {"forward": [out], "backward": [dq, dk, dv]}


class Attempt:
    """One implementation on one problem, with its own inputs in its own layout."""

    def __init__(self, call: Call, problem: Problem, tensors: Iterable[Tensor], grad: bool) -> None:
        self.call, self.problem = call, problem
        q, k, v, self.dout = (self.arranged(x) for x in tensors)
        self.inputs = tuple(x.requires_grad_(grad) for x in (q, k, v))
        self.function = call.prepare(problem, q.device.type)

    def arranged(self, x: Tensor) -> Tensor:
        if not self.problem.varlen:
            x = x.unflatten(0, (len(self.problem.lengths), -1))
        elif self.call.heads_first:
            x = x[None]
        return (x.transpose(1, 2) if self.call.heads_first else x).detach().contiguous()

    def packed(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if self.call.heads_first else x
        return x if x.dim() == 3 else x.flatten(0, 1)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.function(*self.inputs)

    def graph(self) -> Tensor:
        return self.function(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.graph(), self.inputs, self.dout)

    def backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """Runs a forward; what comes back runs its backward, any number of times."""
        out = self.graph()
        return lambda: torch.autograd.grad(out, self.inputs, self.dout, retain_graph=True)


def error_of(attempt: Attempt, results: Tensor | tuple[Tensor, ...], expected: list[Tensor]) -> float:
    """The largest ||result - reference|| / ||reference||; NaN where a result is."""
    pairs = zip(results if isinstance(results, tuple) else (results,), expected, strict=True)
    return torch.stack([(attempt.packed(x).float() - right).norm() / right.norm() for x, right in pairs]).max().item()


def poison(results: Tensor | tuple[Tensor, ...]) -> None:
    """NaN in memory that the next call gets back for its results: rows that nothing writes do not pass as right. The
    largest number where they are integers.
    """
    for x in results if isinstance(results, tuple) else (results,):
        x.detach().fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)


def peak_memory(function: Callable) -> float | None:
    """MiB that one call needs at most above what is held before it; None where the device does not count."""
    if not torch.cuda.is_initialized():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def gpu_clock(function: Callable, seconds: float) -> float:
    """Median seconds of a call by the device's own clock, its L2 cache flushed before each."""
    from triton.testing import do_bench

    return do_bench(function, warmup=200 * seconds, rep=1000 * seconds, return_mode="median") / 1000


def cpu_clock(function: Callable, seconds: float) -> float:
    times = []
    while sum(times) < seconds:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of each over the rounds. Another begins each round: a hot chip would slow the same one down every time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        names = names[1:] + names[:1] if turn else names
        for name in names:
            times[name].append(runs[name]())
    return {name: statistics.median(values) for name, values in times.items()}


def clocks(runs: dict[str, tuple[Call, Callable]], clock: Callable[[Callable], float]) -> dict[str, Callable]:
    """What times each, with the attention that it selects."""

    def timed(call: Call, run: Callable) -> float:
        with call.select():
            return clock(run)

    return {name: functools.partial(timed, *of) for name, of in runs.items()}


def record(problem: str, what: str, name: str, **values: object) -> dict:
    return {**dict.fromkeys(COLUMNS, ""), "problem": problem, "what": what, "implementation": name, **values}


def reason(raised: Exception) -> str:
    return textwrap.shorten(f"{type(raised).__name__}: {raised}".splitlines()[0], 160, placeholder=" ...")


def checked(attempt: Attempt, what: str, expected: list[Tensor]) -> tuple[Callable, float, float | None]:
    """The function to time, the error of its results, and its peak memory."""
    run = attempt.forward if what == "forward" else attempt.backward()
    poison(run())  # compiles and tunes as well
    error = error_of(attempt, run(), expected)
    return run, error, peak_memory(run)


def measure(
    problem: Problem, peers: Iterable[Peer], device: str, backward: bool, rounds: int, clock: Callable
) -> list[dict]:
    tensors = problem.tensors(device)
    expected = reference(problem, *tensors)
    calls = {peer.name: call for peer in peers if (call := peer.call(problem))}
    attempts, records = {}, []
    for what in ("forward", "backward") if backward else ("forward",):
        found, runs = {}, {}
        for name, call in calls.items():
            if what == "backward" and not (call.backward and name in attempts):
                continue
            try:
                with call.select():
                    if name not in attempts:
                        attempts[name] = Attempt(call, problem, tensors, backward and call.backward)
                    run, error, peak = checked(attempts[name], what, expected[what])
            except Exception as raised:  # whatever a peer raises is its result, and the others go on
                found[name] = record(problem.name, what, name, **{"TFLOP/s": "raised", "note": reason(raised)})
                continue
            values = {"error": f"{error:.1e}"}
            if error < TOLERANCE:  # not so where it is NaN
                runs[name] = call, run
                values["peak MiB"] = "" if peak is None else round(peak, 1)
                values["note"] = kernel(attempts[name], what) if name == OURS.name else ""
            else:
                values |= {"TFLOP/s": "wrong", "note": f"relative error {error:.1e}"}
            found[name] = record(problem.name, what, name, **values)
        for name, seconds in in_turn(clocks(runs, clock), rounds).items():
            found[name]["us"] = round(seconds * 1e6, 2)
            found[name]["TFLOP/s"] = float(f"{problem.flops(what) / seconds / 1e12:.4g}")
        records += found.values()
        for name, (call, _) in runs.items() if what == "backward" else ():
            with call.select():
                peak = peak_memory(attempts[name].both)
            if peak is not None:
                records.append(record(problem.name, "forward + backward", name, **{"peak MiB": round(peak, 1)}))
    return records


@torch.no_grad()
def kernel(attempt: Attempt, what: str) -> str:
    """What `explain` says that ours ran."""
    layout = {}
    if attempt.problem.varlen:
        offsets, longest = attempt.problem.offsets(attempt.dout.device.type), max(attempt.problem.lengths)
        layout = dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest, max_seqlen_k=longest)
    explained = fap.explain(*attempt.inputs, causal=attempt.problem.causal, **layout).splitlines()
    return next((line.partition(":")[2].partition(":")[0].strip() for line in explained if line.startswith(what)), "")


def host_times(peers: Iterable[Peer], device: str, batches: int, calls: int) -> list[dict]:
    """Microseconds of the host per call: batches of calls, peers in turn, the device waited for after each batch."""
    tensors = HOST.tensors(device)
    expected = reference(HOST, *tensors)
    records = []
    for what in ("no grad", "with grad", "forward + backward"):
        grad, found, runs = what != "no grad", {}, {}

        def batch(run: Callable, grad: bool = grad) -> float:
            with torch.set_grad_enabled(grad):  # entered here, so that entering it is not part of a call
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                seconds = time.perf_counter() - start
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            return seconds / calls

        for peer in peers:
            try:
                attempt = Attempt(peer.dense, HOST, tensors, grad)
                run, right = attempt.graph, expected["forward"]
                if what == "forward + backward":
                    run, right = attempt.both, expected["backward"]
                with peer.dense.select():
                    error = error_of(attempt, run(), right)
            except Exception as raised:
                found[peer.name] = record(HOST_NAME, what, peer.name, us="raised", note=reason(raised))
                continue
            values = {} if error < TOLERANCE else {"us": "wrong", "note": f"relative error {error:.1e}"}
            found[peer.name] = record(HOST_NAME, what, peer.name, error=f"{error:.1e}", **values)
            if not values:
                runs[peer.name] = peer.dense, run
        for name, seconds in in_turn(clocks(runs, batch), batches).items():
            found[name]["us"] = round(seconds * 1e6, 1)
        records += found.values()
    return records


def markdown(rows: Iterable[Iterable[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]])


def table(records: list[dict], names: list[str], column: str) -> list[list[object]]:
    """A header, and a row for each problem and direction that has anything in this column."""
    found = {(r["problem"], r["what"], r["implementation"]): r[column] for r in records}
    keys = dict.fromkeys((r["problem"], r["what"]) for r in records if r[column] != "")
    return [["problem", "what", *names], *([*key, *(found.get((*key, n), "") for n in names)] for key in keys)]


def speeds(records: list[dict], names: list[str]) -> list[list[object]]:
    """The table of TFLOP/s, with what ours ran and how it stands to fa2 and to the fastest peer."""
    header, *rows = table(records, names, "TFLOP/s")
    notes = {(r["problem"], r["what"]): r["note"] for r in records if r["implementation"] == OURS.name}
    result = [[*header, "kernel", "ours / fa2", "ours / fastest peer"]]
    for row in rows:
        by = {name: value for name, value in zip(names, row[2:], strict=True) if isinstance(value, float)}
        ours, fastest = by.pop(OURS.name, None), max(by.values(), default=None)
        ratios = [f"{ours / other:.2f}" if ours and other else "" for other in (by.get(FA2.name), fastest)]
        result.append([*row, notes.get((row[0], row[1]), "") if ours else "", *ratios])
    return result


def right_speeds(records: list[dict]) -> dict[tuple[str, str, str], float]:
    """TFLOP/s of what is right, by direction, implementation and problem."""
    return {
        (r["what"], r["implementation"], r["problem"]): r["TFLOP/s"] for r in records if isinstance(r["TFLOP/s"], float)
    }


def summary(records: list[dict]) -> list[str]:
    """How ours stands to fa2 over all rows, and packed sequences of one length to the same as a batch."""
    speed = right_speeds(records)
    lines = []
    for direction in ("forward", "backward"):
        pairs = {
            problem: (mine, speed[what, FA2.name, problem])
            for (what, name, problem), mine in speed.items()
            if (what, name) == (direction, OURS.name) and (what, FA2.name, problem) in speed
        }
        ratios = {problem: mine / other for problem, (mine, other) in pairs.items()}
        if ratios:
            least = min(ratios, key=ratios.__getitem__)
            mean = f"geometric mean {statistics.geometric_mean(ratios.values()):.2f} over {len(ratios)} rows"
            lines.append(f"ours / fa2, {direction}: {mean}, smallest {ratios[least]:.2f} ({least})")
    for (what, name, problem), packed in speed.items():
        batch = (what, name, re.sub(r"varlen \d+x(\d+) (?=causal|full)", r"s\1 ", problem))
        if batch[2] != problem and batch in speed:
            ratio = f"{packed / speed[batch]:.2f} ({problem})"
            lines.append(f"varlen / dense of the same sequences, {what}, {name}: {ratio}")
    if rows := failures(records):
        lines.append(f"FAILED: ours is wrong or raised in {len(rows)} rows: {'; '.join(rows)}")
    return lines


def failed(r: dict) -> bool:
    return bool({"wrong", "raised"} & {r["TFLOP/s"], r["us"]})


def failures(records: list[dict]) -> list[str]:
    return [f"{r['problem']}, {r['what']}" for r in records if r["implementation"] == OURS.name and failed(r)]


def reasons(records: list[dict]) -> list[str]:
    """Why there is no figure, said once for each implementation and reason."""
    where: dict[tuple[str, str], list[str]] = {}
    for r in records:
        if failed(r):
            where.setdefault((r["implementation"], r["note"]), []).append(f"{r['problem']}, {r['what']}")
    return [
        f"{name}: {note} ({rows[0]}{f'; and {len(rows) - 1} more' if rows[1:] else ''})"
        for (name, note), rows in where.items()
    ]


def picture(records: list[dict], names: list[str], title: str) -> bytes | None:
    """Bars for each problem and direction; None where matplotlib is not installed or there is nothing to show."""
    speed = right_speeds(records)
    directions = list(dict.fromkeys(what for what, _, _ in speed))
    if importlib.util.find_spec("matplotlib") is None or not speed:
        return None
    from matplotlib.figure import Figure  # not pyplot: no display is asked for

    problems = list(dict.fromkeys(problem for _, _, problem in speed))
    figure = Figure(figsize=(max(6, 1.2 * len(problems)), 4.5 * len(directions)), layout="constrained")
    width = 0.8 / len(names)
    for what, axes in zip(directions, figure.subplots(len(directions), 1, squeeze=False)[:, 0], strict=True):
        for place, name in enumerate(names):
            left = [x + (place - (len(names) - 1) / 2) * width for x in range(len(problems))]
            axes.bar(left, [speed.get((what, name, problem), 0.0) for problem in problems], width, label=name)
        axes.set_xticks(range(len(problems)), problems, rotation=30, ha="right", fontsize=8)
        axes.set(title=f"{what}, {title}", ylabel="TFLOP/s")
        axes.legend(ncols=len(names), fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()


def write_csv(path: Path, records: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)


def checkout() -> str:
    """The commit of this file's checkout, "-dirty" where it has been edited since; "" where there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return run.stdout.strip()


def machine(device: str, commit: str) -> dict[str, str]:
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if has_triton else "",
        "commit": commit,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--backward", action="store_true", help="measure the backward too")
    parser.add_argument("--quick", action="store_true", help="three problems, one round")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="problems with this in their name, or host")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, help="turns that each implementation gets (5; with --quick 1)")
    parser.add_argument("--seconds", type=float, help="spent on each figure, over all rounds (0.05 a round)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write attention.csv and attention.png there")
    parser.add_argument("--commit", default=checkout(), help="what is measured, where there is no git to say so")
    args = parser.parse_args(argv)
    if args.rounds is None:
        args.rounds = 1 if args.quick else 5
    if args.seconds is None:
        args.seconds = args.rounds * (1e-3 if args.device == "cpu" else 0.05)
    for name in ("rounds", "seconds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(args, name)}")
    args.peers = list(dict.fromkeys(args.peers.split(",")))
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"--peers: expected names of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    problems = CPU if args.device == "cpu" else QUICK if args.quick else GPU
    args.problems = [problem for problem in problems if args.only in problem.name]
    args.host = args.only in ("", "host")
    if not args.problems and not args.host:
        parser.error(f"--only: expected a part of a problem's name, got {args.only!r}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)  # now, not after minutes: the path may be wrong
    on_cpu = args.device == "cpu"
    torch.set_float32_matmul_precision("highest")  # the reference's
    facts = machine(args.device, args.commit)
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}")
    if on_cpu:
        print("on a CPU the shapes are tiny: the figures mean nothing")
    chosen = [PEERS[name] for name in args.peers if not (on_cpu and PEERS[name].gpu_only)]
    absent = {peer.name: why for peer in chosen if (why := peer.absence())}
    for name, why in absent.items():
        print(f"{name} is absent: {why}")
    names = [peer.name for peer in chosen]
    present = [peer for peer in chosen if peer.name not in absent]
    timer, seconds = cpu_clock if on_cpu else gpu_clock, args.seconds / args.rounds

    records: list[dict] = []

    def add(more: list[dict]) -> list[dict]:
        records.extend({**r, **facts} for r in more)
        if args.out:
            write_csv(args.out / "attention.csv", records)  # after every problem: what is cut off keeps its rows
        return more

    if args.problems:
        print("\nTFLOP/s\n")
    for place, problem in enumerate(args.problems):
        found = measure(problem, present, args.device, args.backward, args.rounds, lambda run: timer(run, seconds))
        lines = markdown(speeds(add(found), names)).splitlines()
        print("\n".join(lines[2 if place else 0 :]), flush=True)
    if args.host:
        batches, calls = (2, 3) if on_cpu else (20, 100)
        add(host_times([peer for peer in present if peer in (OURS, FA2)], args.device, batches, calls))
    for line in reasons(records):
        print(f"\n{line}")
    measured = [r for r in records if r["problem"] != HOST_NAME]
    host = [r for r in records if r["problem"] == HOST_NAME]
    for title, column, rows in (
        ("Relative error (largest of the results)", "error", records),
        ("Peak memory above the inputs, MiB", "peak MiB", measured),
        ("Host time per call, microseconds", "us", host),
    ):
        lines = table(rows, names if rows is not host else [OURS.name, FA2.name], column)
        if lines[1:]:
            print(f"\n{title}\n\n{markdown(lines)}")
    print("\n" + "\n".join(summary(records)))
    if args.out:
        png = picture(measured, names, facts["device"])
        if png:
            (args.out / "attention.png").write_bytes(png)
        print(f"written: {args.out / 'attention.csv'}" + (f", {args.out / 'attention.png'}" if png else ""))
    return 1 if failures(records) else 0


if __name__ == "__main__":
    sys.exit(main())
