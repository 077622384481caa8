"""Decoding from a KV cache on a GPU: bytes of keys and values per second, beside a copy of as many bytes and SDPA.

    python benchmark/decode.py                                  # everything, in about a minute
    python benchmark/decode.py --rows 1,4,step --csv decode.csv --png decode.png
    python benchmark/decode.py --tune --rows 1,5 --block-n 64 128 --programs 2 4

One query token, bfloat16, head dimension 128. Every implementation is captured in a CUDA graph, so that no figure
contains the host; they take turns, and every figure is the median of the rounds. A graph goes through several caches,
or several places of one, so that 200 MB pass before the same keys are read again: nothing stays in the L2 cache. The
keys and values are random numbers in one memory, of which each implementation has its own view: rows of a sequence,
pages in no order, or (SDPA) sequences of a head. What is timed is compared with attention in float32, for the first and
the last sequence of the first and the last cache; a wrong result is shown as "wrong", never as a speed.

Bytes are those of the keys and values that are seen: with random lengths, of the lengths; with a window, of the window.
Beside the window stand caches that have no more keys than it.
A copy reads half as many bytes as there are keys and values, and writes the other half. "read" are kernels that only
add up as many bytes (reading.py): of the row, of the random lengths, of the window.

"step" is one token: append its key and value, then attend. The host's time is that of an eager call in torch.no_grad,
which does not wait for the device; the device's time is that of a CUDA graph. "prefill" are many queries against a
cache whose lengths are on the device, beside flash_attn_func on the same keys.

--tune runs the first rows with every combination of the values that it is given, and prints the fastest, for plan.py.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import io
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import reading
import torch
from attention import checkout, in_turn, machine, markdown, poison, reason
from captured import LAUNCHES, Captured
from decode_cases import (
    OPTIONS,
    PAGES,
    WINDOW,
    Case,
    Option,
    Row,
    Store,
    copy_of,
    dense,
    our_prefill,
    our_step,
    ours,
    read,
    sdpa,
    step_cases,
)
from torch import Tensor
from triton.runtime.errors import OutOfResources

from flash_attn_plus import library, plan

READING = 1e-3  # seconds that each of the kernels that only read is tried for
HOST_CALLS = 50  # before the device is waited for: so few that its queue never fills
# ||result - reference|| / ||reference||; bfloat16 results are off by about 3e-3. Scores have a deviation of 1, so that
# every key counts: the lack of one in 2000 is seen.
TOLERANCE = 1e-2

COLUMNS = [
    *("problem", "what", "implementation", "TB/s", "TFLOP/s", "us", "error", "note"),
    *("device", "torch", "triton", "commit"),
]

ROWS = [
    Row(1, 32, 8, 8192),
    Row(8, 32, 8, 8192),
    Row(1, 32, 8, 131072),
    Row(256, 32, 8, 1024),
    Row(64, 32, 8, 8192),
    Row(8, 64, 8, 65536),
    Row(16, 32, 32, 8192),
]
TINY, STEP = Row(1, 2, 2, 64), Row(1, 32, 8, 8192)
PREFILL = Row(2, 32, 8, 8192)
PREFILL_QUERIES = (2048, 4096)
SECTIONS = ("step", "prefill")
# option, field of plan.DecodePlan, default values
AXES = (
    ("block-n", "BLOCK_N", [32, 64, 128]),
    ("warps", "num_warps", [2, 4, 8]),
    ("stages", "num_stages", [2, 3, 4]),
    ("programs", "programs", [2, 4, 8]),
    ("shortest", "shortest", [128]),
)


def record(problem: str, what: str, name: str, **values: object) -> dict:
    return {**dict.fromkeys(COLUMNS, ""), "problem": problem, "what": what, "implementation": name, **values}


def measure(
    problem: str, what: str, cases: dict[str, Callable[[], Case]], rounds: int, seconds: float, launches: int = LAUNCHES
) -> list[dict]:
    """A record of each case: checked, then timed in turn."""
    found, runs = {}, {}
    for name, make in cases.items():
        try:
            captured = Captured(make(), launches)
            error = captured.error()
        except Exception as raised:  # whatever one raises is its result, and the others go on
            found[name] = record(problem, what, name, us="raised", note=reason(raised))
            continue
        found[name] = record(problem, what, name, error=f"{error:.1e}")
        if error < TOLERANCE:  # not so where it is NaN
            runs[name] = captured
        else:
            found[name] |= {"us": "wrong", "note": f"relative error {error:.1e}"}
    clocks = {name: functools.partial(captured.seconds, seconds / rounds) for name, captured in runs.items()}
    for name, median in in_turn(clocks, rounds).items():
        case = runs[name].case
        found[name]["us"] = round(median * 1e6, 2)
        if case.bytes:
            found[name]["TB/s"] = float(f"{case.bytes / median / 1e12:.4g}")
        if case.flops:
            found[name]["TFLOP/s"] = float(f"{case.flops / median / 1e12:.4g}")
    return list(found.values())


def fastest_read(store: Store, keys: int) -> Case:
    found = []
    for shape in reading.SHAPES:
        case = read(store, shape, keys)
        try:
            found.append((Captured(case).seconds(READING), case))
        except OutOfResources:  # more shared memory than the device has
            continue
    return min(found, key=lambda timed: timed[0])[1]


def decode(row: Row, rounds: int, seconds: float) -> list[dict]:
    store = Store(row)
    cases = {"copy": lambda: copy_of(store), "SDPA": lambda: sdpa(store)}
    keys = {"read": store.full, "read lengths": store.random, "read window": torch.full_like(store.full, WINDOW)}
    for name, of_each in keys.items():
        cases[name] = functools.partial(fastest_read, store, int(of_each.sum()))
    for name, option in OPTIONS.items():
        cases[name] = functools.partial(ours, store, option)
    return measure(row.name, "decode", cases, rounds, seconds)


def host_clock(call: Callable[[], Tensor]) -> float:
    """Seconds of the host for one call."""
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / HOST_CALLS


def steps(rounds: int, seconds: float) -> list[dict]:
    """The host's time of an eager step, and the device's in a CUDA graph."""
    records = []
    for row in (TINY, STEP):
        store = Store(row, copies=1)
        found, runs = {}, {}
        for name, make in step_cases(store).items():
            try:
                case = make()
                poison(case.calls[0]())
                error = case.error(0, case.calls[0]())
            except Exception as raised:
                found[name] = record(row.name, "step, host", name, us="raised", note=reason(raised))
                continue
            found[name] = record(row.name, "step, host", name, error=f"{error:.1e}")
            if error < TOLERANCE:
                runs[name] = functools.partial(host_clock, case.calls[0])
            else:
                found[name] |= {"us": "wrong", "note": f"relative error {error:.1e}"}
        for run in runs.values():  # what a first call makes and keeps is no part of a later one
            run()
        for name, median in in_turn(runs, 8 * rounds).items():
            found[name]["us"] = round(median * 1e6, 1)
        records += found.values()
    return records + measure(STEP.name, "step, CUDA graph", step_cases(Store(STEP)), rounds, seconds)


def prefill(queries: int, rounds: int, seconds: float) -> list[dict]:
    store = Store(PREFILL, queries, copies=1)  # limited by arithmetic: where the keys come from hardly counts
    cases = {"flash_attn_func": functools.partial(dense, store, None)}
    for page in (None, *PAGES):
        cases[f"page {page}" if page else "contiguous"] = functools.partial(our_prefill, store, page)
    return measure(f"{PREFILL.name} q{queries}", "prefill", cases, rounds, seconds, launches=2)


@contextmanager
def planned(candidate: dict[str, int]) -> Iterator[None]:
    """Decode with these values in place of those of plan.py."""
    chosen = plan.decode

    def instead(*args, **kwargs):
        return plan.DecodeRow(*(tiles._replace(**candidate) for tiles in chosen(*args, **kwargs)))

    def forget() -> None:
        library.memory_of("decode").clear()  # of calls that were like it, it recalls what ran, and asks no plan

    plan.decode = instead
    forget()
    try:
        yield
    finally:
        plan.decode = chosen
        forget()


class Work(NamedTuple):
    """A case whose kernels are to be compiled."""

    make: Callable[[Store, Any], Case]
    row: Row
    option: Option | reading.Shape | int | None
    queries: int = 1
    candidate: dict[str, int] | None = None


@torch.no_grad()
def compiled(work: Work) -> None:
    """Fill the compiler's cache in a process of its own. What raises there raises again where it is measured."""
    try:
        with planned(work.candidate or {}):
            work.make(Store(work.row, work.queries, copies=1), work.option).calls[0]()
            torch.cuda.synchronize()
    except Exception as raised:
        print(f"compiling ahead: {work.row.name}, {work.option}, {work.candidate}: {reason(raised)}", flush=True)


def compile_ahead(work: list[Work]) -> None:
    """Several at a time. The largest caches take 2 GB in each process."""
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(compiled, work))


def kinds(rows: list[Row]) -> list[Row]:
    """One of all rows that run the same kernels: other sizes are arguments of them."""
    return list({(row.heads, row.heads_k, row.batch == 1): row for row in rows}.values())


def work_of(rows: list[Row], sections: list[str]) -> list[Work]:
    work = [Work(ours, row, option) for row, option in itertools.product(kinds(rows), OPTIONS.values())]
    work += [Work(read, STEP, shape) for shape in reading.SHAPES]
    if "step" in sections:
        work += [Work(our_step, row, page) for row in (TINY, STEP) for page in (None, 16)]
    if "prefill" in sections:
        queries = PREFILL_QUERIES[0]
        work += [Work(our_prefill, PREFILL, page, queries) for page in (None, *PAGES)]
        work.append(Work(dense, PREFILL, None, queries))
    return work


def sweep(rows: list[Row], axes: dict[str, list[int]], rounds: int, seconds: float) -> list[dict]:
    """TB/s of every combination of the axes' values on every row, contiguous and on pages of 16.

    {} is what plan.py says now. A record's "candidate" is a dict of plan.DecodePlan's fields.
    """
    axes = {name: values for name, values in axes.items() if name in plan.DecodePlan._fields}
    candidates = [{}, *(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))]
    options = {name: OPTIONS[name] for name in ("contiguous", "page 16")}
    # How many programs run is no part of a kernel.
    kernels = {tuple(v for name, v in c.items() if name != "programs"): c for c in candidates}
    of_all = itertools.product(kinds(rows), options.values(), kernels.values())
    compile_ahead([Work(ours, row, option, 1, candidate) for row, option, candidate in of_all])

    records = []
    for row in rows:
        store = Store(row)
        for name, option in options.items():

            def case(candidate: dict[str, int], store: Store = store, option: Option = option) -> Case:
                return replace(ours(store, option), select=functools.partial(planned, candidate))

            cases = {str(candidate): functools.partial(case, candidate) for candidate in candidates}
            found = measure(row.name, name, cases, rounds, seconds)
            records += ({**r, "candidate": c} for r, c in zip(found, candidates, strict=True))
            best = sorted((r for r in found if r["TB/s"] != ""), key=lambda r: -r["TB/s"])
            print(f"{row.name} {name}: {len(best)} of {len(found)} are right")
            for r in [*best[:6], *(r for r in found[:1] if r not in best[:6])]:
                print(f"  {r['TB/s'] or r['us']} TB/s  {r['implementation']}", flush=True)
            for note in sorted({r["note"] for r in found} - {""}):
                print(f"  not timed: {note}")
        del store, cases
        torch.cuda.empty_cache()
    return records


def overall(records: list[dict], count: int = 12) -> list[str]:
    """The candidates whose speed is nearest to each row's fastest: geometric mean, and the smallest, over all rows."""
    fastest: dict[tuple[str, str], float] = {}
    for r in records:
        if r["TB/s"] != "":
            place = r["problem"], r["what"]
            fastest[place] = max(fastest.get(place, 0.0), r["TB/s"])
    ratios: dict[str, dict] = {}
    for r in records:
        if r["TB/s"] != "":
            place = r["problem"], r["what"]
            ratios.setdefault(r["implementation"], {})[place] = r["TB/s"] / fastest[place]
    everywhere = {name: of for name, of in ratios.items() if len(of) == len(fastest)}
    means = {name: statistics.geometric_mean(of.values()) for name, of in everywhere.items()}
    lines = []
    for name in sorted(means, key=means.__getitem__, reverse=True)[:count]:
        of = everywhere[name]
        least = min(of, key=of.__getitem__)
        lines.append(f"  {means[name]:.3f}, smallest {of[least]:.3f} ({', '.join(least)})  {name}")
    return lines


def ratio(by: dict, name: str, other: str) -> str:
    """Of the speeds of two implementations: how many times as fast."""
    times = [by[x]["us"] for x in (name, other) if x in by]
    speeds = [by[x]["TB/s"] for x in (name, other) if x in by]
    if len(times) < 2 or not all(isinstance(x, float) for x in times):
        return ""
    # Bytes differ where the keys that are seen do.
    return f"{speeds[0] / speeds[1] if all(speeds) else times[1] / times[0]:.2f}"


# Kind of figure -> title, column, and of which speeds to show how many times as fast the first one is.
TABLES = {
    "decode": (
        "Decoding, TB/s of keys and values",
        "TB/s",
        [
            *(("contiguous", "SDPA"), ("contiguous", "read"), ("page 16", "contiguous")),
            *(("lengths", "read lengths"), (f"window {WINDOW}", "read window")),
        ],
    ),
    "step, host": ("Host time of an eager step, microseconds", "us", []),
    "step, CUDA graph": ("Device time of a step in a CUDA graph, microseconds", "us", []),
    "prefill": ("Prefill, TFLOP/s", "TFLOP/s", [(name, "flash_attn_func") for name in ("contiguous", "page 16")]),
}


def tables(records: list[dict]) -> dict[str, list[str]]:
    """Of each kind of figure that there is: the lines of its table."""
    parts = {}
    for what, (_, column, ratios) in TABLES.items():
        rows = [r for r in records if r["what"] == what]
        if not rows:
            continue
        names = list(dict.fromkeys(r["implementation"] for r in rows))
        lines = [["problem", *names, *(f"{a} / {b}" for a, b in ratios)]]
        for problem in dict.fromkeys(r["problem"] for r in rows):
            by = {r["implementation"]: r for r in rows if r["problem"] == problem}
            figures = [by[name][column] or by[name]["us"] if name in by else "" for name in names]
            lines.append([problem, *figures, *(ratio(by, *pair) for pair in ratios)])
        parts[what] = markdown(lines).splitlines()
    return parts


def failures(records: list[dict]) -> list[dict]:
    return [r for r in records if r["us"] in ("wrong", "raised")]


def is_ours(r: dict) -> bool:
    return not r["implementation"].startswith(("copy", "SDPA", "index_copy_ + SDPA", "read"))


def picture(records: list[dict], title: str) -> bytes | None:
    """Bars of TB/s for each problem; None where matplotlib is not installed or there is nothing to show."""
    shown = [r for r in records if r["what"] == "decode" and r["TB/s"] and not r["implementation"].startswith("read ")]
    speed = {(r["problem"], r["implementation"]): r["TB/s"] for r in shown}
    if importlib.util.find_spec("matplotlib") is None or not speed:
        return None
    from matplotlib.figure import Figure  # not pyplot: no display is asked for

    problems, names = (list(dict.fromkeys(key[i] for key in speed)) for i in range(2))
    figure = Figure(figsize=(max(6, 1.8 * len(problems)), 5), layout="constrained")
    axes, width = figure.subplots(), 0.85 / len(names)
    for place, name in enumerate(names):
        left = [x + (place - (len(names) - 1) / 2) * width for x in range(len(problems))]
        grey = {"copy": {"color": "0.8"}, "read": {"color": "0.6"}, "SDPA": {"color": "black"}}.get(name, {})
        axes.bar(left, [speed.get((problem, name), 0.0) for problem in problems], width, label=name, **grey)
    axes.set_xticks(range(len(problems)), problems, rotation=20, ha="right", fontsize=8)
    axes.set(title=f"decoding, {title}", ylabel="TB/s of keys and values")
    figure.legend(ncols=6, fontsize=8, loc="outside lower center")
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()


def write_csv(path: Path, records: list[dict], columns: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = ", ".join(f"{i} {row.name}" for i, row in enumerate(ROWS, 1))
    everything = ",".join([*(str(i) for i in range(1, len(ROWS) + 1)), *SECTIONS])
    parser.add_argument(
        "--rows", default=everything, metavar="ROWS", help=f"any of {numbers}, step, prefill (default: {everything})"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that each implementation gets (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.1, help="of each figure, over all rounds (%(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the rows there")
    parser.add_argument("--commit", default=checkout(), help="what is measured, where there is no git to say so")
    parser.add_argument("--tune", action="store_true", help="measure every combination of these, and nothing else:")
    for option, name, values in AXES:
        wanted = {"type": int, "nargs": "+", "default": values, "metavar": "N"}
        parser.add_argument(f"--{option}", **wanted, help=f"{name}; (default: {' '.join(map(str, values))})")
    args = parser.parse_args(argv)
    for name in ("rounds", "seconds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(args, name)}")
    chosen = list(dict.fromkeys(args.rows.split(",")))
    if unknown := set(chosen) - set(everything.split(",")):
        parser.error(f"--rows: expected any of {everything}, got {','.join(sorted(unknown))}")
    args.sections = [name for name in SECTIONS if name in chosen]
    args.rows = [row for i, row in enumerate(ROWS, 1) if str(i) in chosen]
    args.axes = {name: getattr(args, option.replace("-", "_")) for option, name, _ in AXES}
    return args


def tune(args: argparse.Namespace, facts: dict[str, str]) -> int:
    records = [{**r, **r["candidate"], **facts} for r in sweep(args.rows, args.axes, args.rounds, args.seconds)]
    if args.csv:
        columns = [*COLUMNS[:-4], *args.axes, *COLUMNS[-4:]]
        write_csv(args.csv, records, columns)
    print("\nspeed / the fastest of each row: geometric mean over all rows\n" + "\n".join(overall(records)))
    return 0 if any(r["TB/s"] for r in records) else 1


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not torch.cuda.is_available():
        sys.exit("a GPU is needed to measure decoding on")
    torch.set_float32_matmul_precision("highest")  # the reference's
    facts = machine("cuda", args.commit)
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}", flush=True)
    for path in filter(None, (args.csv, args.png)):
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes: the path may be wrong
    began = time.perf_counter()
    with torch.no_grad():
        if args.tune:
            return tune(args, facts)
        compile_ahead(work_of(args.rows, args.sections))
        print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
        work = [functools.partial(decode, row) for row in args.rows]
        work += [steps] if "step" in args.sections else []
        work += [functools.partial(prefill, n) for n in PREFILL_QUERIES] if "prefill" in args.sections else []
        records: list[dict] = []
        shown: set[str] = set()
        for part in work:
            found = [{**r, **facts} for r in part(args.rounds, args.seconds)]
            records += found
            if args.csv:
                write_csv(args.csv, records, COLUMNS)  # after every problem: what is cut off keeps its rows
            for what, lines in tables(found).items():
                if what not in shown:
                    print(f"\n{TABLES[what][0]}\n")
                print("\n".join(lines[2 if what in shown else 0 :]), flush=True)
                shown.add(what)
            torch.cuda.empty_cache()
    for r in failures(records):
        print(f"\n{r['implementation']}: {r['us']}: {r['note']} ({r['problem']}, {r['what']})")
    peak, seconds = torch.cuda.max_memory_allocated() / 2**30, time.perf_counter() - began
    print(f"\n{seconds:.0f} s, at most {peak:.1f} GiB")
    if args.png and (png := picture(records, facts["device"])):
        args.png.write_bytes(png)
    failed = [f"{r['problem']}, {r['what']}, {r['implementation']}" for r in failures(records) if is_ours(r)]
    if failed:
        print(f"FAILED: ours is wrong or raised in {len(failed)} rows: {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
