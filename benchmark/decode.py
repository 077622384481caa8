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
A copy reads half as many bytes as there are keys and values, and writes the other half.

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
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from attention import checkout, machine, markdown, poison, reason
from torch import Tensor

import flash_attn_plus as fap
from flash_attn_plus import library, plan

DIM = 128
ITEMSIZE = 2  # bfloat16
AWAY = 200e6  # bytes that pass before the same keys are read again: four times the L2 cache of an H100
SHORTEST = 4  # random lengths are at least a fourth of the cache
LAUNCHES = 20  # in a graph, at least: starting one takes the device some microseconds
WINDOW = 1024
SOFTCAP = 2.0  # so low that leaving it out is wrong by more than the tolerance
PAGES = (16, 64, 256)
HOST_CALLS = 50  # before the device is waited for: so few that its queue never fills
# ||result - reference|| / ||reference||; bfloat16 results are off by about 3e-3. Scores have a deviation of 1, so that
# every key counts: the lack of one in 2000 is seen.
TOLERANCE = 1e-2

COLUMNS = [
    *("problem", "what", "implementation", "TB/s", "TFLOP/s", "us", "error", "note"),
    *("device", "torch", "triton", "commit"),
]


def launches_until_again(size: float) -> int:
    """Launches that each read other keys, so many bytes, until the first one's keys may be read again."""
    return math.ceil(AWAY / size)


@dataclass(frozen=True)
class Row:
    batch: int
    heads: int
    heads_k: int
    keys: int

    @property
    def name(self) -> str:
        return f"b{self.batch} h{self.heads}/{self.heads_k} k{self.keys}"

    def bytes(self, keys: int) -> int:
        """Of so many keys and their values, all heads."""
        return 2 * keys * self.heads_k * DIM * ITEMSIZE

    @property
    def copies(self) -> int:
        """Caches to go through, so that AWAY passes even where lengths are the shortest."""
        return launches_until_again(self.bytes(self.batch * self.keys) / SHORTEST)


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


@dataclass(frozen=True)
class Option:
    """What one column of the table adds to a plain decoding."""

    page: int | None = None
    random_lengths: bool = False
    window: int | None = None
    keys: int | None = None  # caches that have no more; contiguous
    softcap: float = 0.0
    sink: bool = False


OPTIONS = {
    "contiguous": Option(),
    **{f"page {page}": Option(page=page) for page in PAGES},
    "lengths": Option(random_lengths=True),
    "page 16, lengths": Option(page=16, random_lengths=True),
    f"window {WINDOW}": Option(window=WINDOW),
    f"{WINDOW} keys": Option(keys=WINDOW),
    "softcap": Option(softcap=SOFTCAP),
    "sink": Option(sink=True),
}


def reference(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, softcap: float = 0.0, sink: Tensor | None = None
) -> Tensor:
    """q (rows, h, d), k and v (n, hk, d), visible (rows, n) bool -> (rows, h, d) in float32."""
    q, k, v = q.float(), k.float(), v.float()
    S = torch.einsum("rkgd,nkd->kgrn", q.unflatten(1, (k.shape[1], -1)), k) * DIM**-0.5
    if softcap:
        S = softcap * torch.tanh(S / softcap)
    if visible is not None:
        S = S.masked_fill(~visible, -torch.inf)
    if sink is not None:  # one more column, which has no value
        column = sink.float().view(*S.shape[:2], 1, 1).expand(*S.shape[:3], 1)
        S = torch.cat((S, column), -1)
    P = S.softmax(-1)[..., : len(k)]
    return torch.einsum("kgrn,nkd->rkgd", P, v).flatten(1, 2)


def relative(result: Tensor, expected: Tensor) -> float:
    return ((result.float() - expected).norm() / expected.norm()).item()


class Store:
    """The caches of a row, and queries; how an option sees them, and what it must come to."""

    def __init__(self, row: Row, queries: int = 1, copies: int | None = None, device: str = "cuda") -> None:
        self.row = row
        make = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
        torch.manual_seed(0)
        shape = (copies or row.copies, row.batch, row.keys, row.heads_k, DIM)
        self.k, self.v = make(shape), make(shape)
        self.q = make(row.batch, queries, row.heads, DIM)
        self.new = [make(row.batch, 1, row.heads_k, DIM) for _ in range(2)]
        # About half of all weight is the sink's.
        self.sink = torch.randn(row.heads, device=device) + math.log(row.keys)
        self.full = self.lengths([row.keys] * row.batch)
        least = max(1, row.keys // SHORTEST)
        drawn = torch.randint(least, row.keys + 1, (row.batch,), generator=torch.Generator().manual_seed(0))
        self.random = self.lengths(drawn.tolist())
        self.tables: dict[int, Tensor] = {}
        self.copies = range(len(self.k))
        self.whole = range(min(len(self.k), launches_until_again(row.bytes(row.batch * row.keys))))  # of whole caches
        self.sampled = sorted({0, row.batch - 1})

    def lengths(self, lengths: list[int]) -> Tensor:
        return torch.tensor(lengths, dtype=torch.int32, device=self.k.device)

    def table(self, page: int) -> Tensor:
        """(batch, pages of a sequence): all pages of a cache, in no order."""
        if page not in self.tables:
            count = self.row.batch * self.row.keys // page
            order = torch.randperm(count, generator=torch.Generator().manual_seed(page))
            self.tables[page] = order.int().view(self.row.batch, -1).to(self.k.device)
        return self.tables[page]

    def caches(self, copy: int, page: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """k_cache, v_cache and block_table."""
        k, v = self.k[copy], self.v[copy]
        if page is None:
            return k, v, None
        return *(x.view(-1, page, *x.shape[2:]) for x in (k, v)), self.table(page)

    def keys_of(self, copy: int, page: int | None, entry: int) -> list[Tensor]:
        """k and v (keys, heads_k, d) of one sequence."""
        *caches, table = self.caches(copy, page)
        return [x[entry] if table is None else x[table[entry].long()].flatten(0, 1) for x in caches]

    def heads_first(self, copy: int) -> list[Tensor]:
        """k and v (batch, heads_k, keys, d): the same memory, read as SDPA would have it."""
        row = self.row
        return [x[copy].view(row.batch, row.heads_k, row.keys, DIM) for x in (self.k, self.v)]


@dataclass
class Case:
    """What is timed: launches that differ in the memory that they read alone, and how a result is judged."""

    calls: list[Callable[[], Tensor]]
    error: Callable[[int, Tensor], float]  # of call i and its result
    bytes: float = 0.0  # of keys and values, of one call
    flops: float = 0.0
    select: Callable = nullcontext  # entered around the first calls and the capture


def ours(store: Store, option: Option) -> Case:
    row = store.row
    lengths, rows = [store.random if option.random_lengths else store.full], [slice(None)]
    seen = int(lengths[0].sum())
    if option.window is not None:  # the windows of other lengths lie elsewhere: fewer caches are enough
        ends = range(option.window, row.keys + 1, option.window)
        lengths, seen = [store.lengths([end] * row.batch) for end in ends], row.batch * option.window
    if option.keys is not None:  # so do the caches that a long one is cut into
        starts = range(0, row.keys - option.keys + 1, option.keys)
        rows = [slice(start, start + option.keys) for start in starts]
        lengths, seen = [store.lengths([option.keys] * row.batch)], row.batch * option.keys
    places = list(itertools.product(store.copies, lengths, rows))[: launches_until_again(row.bytes(seen))]
    options = {"softcap": option.softcap, "sink": store.sink if option.sink else None, "causal": True}
    if option.window is not None:
        options["window_size"] = (option.window - 1, 0)

    def call(copy: int, cache_seqlens: Tensor, part: slice) -> Tensor:
        k, v, table = store.caches(copy, option.page)
        if option.keys is not None:
            k, v = k[:, part], v[:, part]
        return fap.flash_attn_with_kvcache(store.q, k, v, cache_seqlens=cache_seqlens, block_table=table, **options)

    def error(i: int, out: Tensor) -> float:
        copy, cache_seqlens, part = places[i]
        errors = []
        for entry in store.sampled:
            end = int(cache_seqlens[entry])
            keys = slice(0 if option.window is None else max(0, end - option.window), end)
            k, v = (x[part][keys] for x in store.keys_of(copy, option.page, entry))
            expected = reference(store.q[entry], k, v, None, option.softcap, options["sink"])
            errors.append(relative(out[entry], expected))
        return torch.tensor(errors).max().item()  # unlike max(), keeps a NaN

    return Case([functools.partial(call, *place) for place in places], error, row.bytes(seen))


def sdpa(store: Store) -> Case:
    row = store.row
    gqa = {"enable_gqa": True} if row.heads != row.heads_k else {}
    views = [store.heads_first(copy) for copy in store.whole]

    def call(copy: int) -> Tensor:
        out = F.scaled_dot_product_attention(store.q.transpose(1, 2), *views[copy], **gqa)
        return out.transpose(1, 2)

    def error(i: int, out: Tensor) -> float:
        k, v = views[i]
        pairs = ((out[b], reference(store.q[b], k[b].transpose(0, 1), v[b].transpose(0, 1))) for b in store.sampled)
        return torch.tensor([relative(*pair) for pair in pairs]).max().item()

    calls = [functools.partial(call, copy) for copy in store.whole]
    return Case(calls, error, row.bytes(row.batch * row.keys))


def copy_of(store: Store) -> Case:
    """Reads the keys and writes as many bytes: altogether as many as the keys and values have."""
    other = torch.empty_like(store.k[: len(store.whole)])

    def error(i: int, out: Tensor) -> float:
        return 0.0 if torch.equal(out, store.k[i]) else math.nan

    calls = [functools.partial(other[copy].copy_, store.k[copy]) for copy in store.whole]
    return Case(calls, error, store.row.bytes(store.row.batch * store.row.keys))


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


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of each over the rounds. Another begins each round: a hot chip would slow the same one down every time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        names = names[1:] + names[:1] if turn else names
        for name in names:
            times[name].append(runs[name]())
    return {name: statistics.median(values) for name, values in times.items()}


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


def decode(row: Row, rounds: int, seconds: float) -> list[dict]:
    store = Store(row)
    cases = {"copy": lambda: copy_of(store), "SDPA": lambda: sdpa(store)}
    for name, option in OPTIONS.items():
        cases[name] = functools.partial(ours, store, option)
    return measure(row.name, "decode", cases, rounds, seconds)


def our_step(store: Store, page: int | None) -> Case:
    """Append the key and value of the last token, then attend to all."""
    last = store.full - 1
    k_new, v_new = store.new

    def call(k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        cache = {"cache_seqlens": last, "block_table": table, "causal": True}
        return fap.flash_attn_with_kvcache(store.q, k, v, k_new, v_new, **cache)

    def error(i: int, out: Tensor) -> float:
        k, v = store.keys_of(i, page, 0)
        if not (torch.equal(k[-1], k_new[0, 0]) and torch.equal(v[-1], v_new[0, 0])):
            return math.nan
        return relative(out[0], reference(store.q[0], k, v))

    calls = [functools.partial(call, *store.caches(copy, page)) for copy in store.whole]
    return Case(calls, error, store.row.bytes(store.row.batch * store.row.keys))


def sdpa_step(store: Store) -> Case:
    """The same with what PyTorch has: two index_copy_, then SDPA, which has to see the whole cache."""
    attention = sdpa(store)
    views = [store.heads_first(copy) for copy in store.whole]
    new = [x.transpose(1, 2) for x in store.new]
    place = store.full[:1].long() - 1

    def call(copy: int) -> Tensor:
        for x, row in zip(views[copy], new, strict=True):
            x.index_copy_(2, place, row)
        return attention.calls[copy]()

    def error(i: int, out: Tensor) -> float:
        appended = all(torch.equal(x[:, :, -1:], row) for x, row in zip(views[i], new, strict=True))
        return attention.error(i, out) if appended else math.nan

    return Case([functools.partial(call, copy) for copy in store.whole], error, attention.bytes)


def step_cases(store: Store) -> dict[str, Callable[[], Case]]:
    return {
        "contiguous": lambda: our_step(store, None),
        "page 16": lambda: our_step(store, 16),
        "index_copy_ + SDPA": lambda: sdpa_step(store),
    }


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


def prefill_case(store: Store, page: int | None, call: Callable[[], Tensor]) -> Case:
    """Many queries, the last of which sees all keys; the first and the last 16 are judged."""
    row, queries = store.row, store.q.shape[1]
    pairs = queries * row.keys - queries * (queries - 1) // 2
    rows = torch.tensor([*range(16), *range(queries - 16, queries)], device=store.q.device)
    visible = torch.arange(row.keys, device=rows.device) <= rows[:, None] + row.keys - queries

    def error(i: int, out: Tensor) -> float:
        keys = {b: store.keys_of(0, page, b) for b in store.sampled}
        errors = [relative(out[b, rows], reference(store.q[b, rows], *keys[b], visible)) for b in store.sampled]
        return torch.tensor(errors).max().item()

    return Case([call], error, flops=4 * row.batch * row.heads * pairs * DIM)


def our_prefill(store: Store, page: int | None) -> Case:
    k, v, table = store.caches(0, page)
    cache = {"cache_seqlens": store.full, "block_table": table, "causal": True}
    return prefill_case(store, page, functools.partial(fap.flash_attn_with_kvcache, store.q, k, v, **cache))


def dense(store: Store, page: None) -> Case:
    """flash_attn_func on the same keys."""
    k, v, _ = store.caches(0, page)
    return prefill_case(store, page, functools.partial(fap.flash_attn_func, store.q, k, v, causal=True))


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
    option: Option | int | None
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
        [("contiguous", "SDPA"), ("contiguous", "copy"), ("page 16", "copy")],
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
    return r["implementation"] not in ("copy", "SDPA", "index_copy_ + SDPA")


def picture(records: list[dict], title: str) -> bytes | None:
    """Bars of TB/s for each problem; None where matplotlib is not installed or there is nothing to show."""
    speed = {(r["problem"], r["implementation"]): r["TB/s"] for r in records if r["what"] == "decode" and r["TB/s"]}
    if importlib.util.find_spec("matplotlib") is None or not speed:
        return None
    from matplotlib.figure import Figure  # not pyplot: no display is asked for

    problems, names = (list(dict.fromkeys(key[i] for key in speed)) for i in range(2))
    figure = Figure(figsize=(max(6, 1.8 * len(problems)), 5), layout="constrained")
    axes, width = figure.subplots(), 0.85 / len(names)
    for place, name in enumerate(names):
        left = [x + (place - (len(names) - 1) / 2) * width for x in range(len(problems))]
        grey = {"copy": {"color": "0.8"}, "SDPA": {"color": "black"}}.get(name, {})
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
