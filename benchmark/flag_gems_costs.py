"""Cases of flag_gems_report.py: what calls cost, and what is compiled and tuned for them."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from flag_gems_calls import (
    LENGTHS,
    flash,
    flash_again,
    in_a_process,
    kernel,
    last_line,
    launches,
    varlen,
)
from flag_gems_evidence import (
    FACT,
    Evidence,
    NotHereError,
    Problem,
    by_ours,
    case,
    dense,
    packed,
)

from flash_attn_plus.schemas import Variant


def _seconds(call: Callable, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _first_and_again(calls: list[Callable], device: torch.device) -> str:
    """The slowest first call and the fastest second one of all but the first, which compiles for everybody."""
    _seconds(calls[0], device)
    first = max(_seconds(call, device) for call in calls[1:])
    again = min(_seconds(call, device) for call in calls[1:])
    return f"{first * 1e3:.1f} ms, again {again * 1e3:.2f} ms"


def _recompiles(problems: list[Problem], run: Callable, gems: ModuleType, entry: Any, device: torch.device) -> Evidence:
    """Whether each of them compiles the kernel for itself."""
    mine = _first_and_again([functools.partial(by_ours, problem) for problem in problems], device)
    before = sum(map(len, entry.kernel_cache))
    theirs = _first_and_again([functools.partial(run, gems, problem) for problem in problems], device)
    compiled = sum(map(len, entry.kernel_cache)) - before
    note = f"{compiled} kernels for {len(problems)} values; a new value costs {theirs}; ours {mine}"
    return Evidence(holds=compiled >= len(problems), note=note)


def _varlen_recompiles(gems: ModuleType, device: torch.device, variants: list[Variant]) -> Evidence:
    problem = packed(device, LENGTHS)
    entry = kernel(gems, "flash_kernel", "flash_varlen_fwd_kernel")
    return _recompiles([problem._replace(variant=variant) for variant in variants], varlen, gems, entry, device)


@case(FACT, "every softmax scale compiles anew", "one kernel")
def cost_scale(gems: ModuleType, device: torch.device) -> Evidence:
    return _varlen_recompiles(gems, device, [Variant(softmax_scale=scale) for scale in (0.11, 0.12, 0.13, 0.14)])


@case(FACT, "every window compiles anew", "one kernel")
def cost_window(gems: ModuleType, device: torch.device) -> Evidence:
    return _varlen_recompiles(gems, device, [Variant(window_left=n, window_right=5) for n in (11, 12, 13, 14)])


@case(FACT, "every softcap compiles anew", "one kernel")
def cost_softcap(gems: ModuleType, device: torch.device) -> Evidence:
    return _varlen_recompiles(gems, device, [Variant(softcap=softcap) for softcap in (2.1, 2.2, 2.3, 2.4)])


@case(FACT, "flash_attention_forward compiles anew for every batch size", "one kernel")
def cost_batch(gems: ModuleType, device: torch.device) -> Evidence:
    problems = [dense(device, batch=batch) for batch in (2, 3, 4, 5)]
    flash(gems, problems[0])  # chooses the config
    entry = kernel(gems, "flash_kernel", "flash_fwd_kernel")
    for cache in entry.kernel_cache:
        cache.clear()
    return _recompiles(problems, flash_again, gems, entry, device)


@case(FACT, "a launch through libentry costs the host more than one by plain Triton", "about as much", alone=True)
def cost_launch(gems: ModuleType, device: torch.device) -> Evidence:
    entry = kernel(gems, "flash_kernel", "flash_varlen_fwd_kernel")
    problem = packed(device, (16,), heads=2, heads_k=2)
    arguments, options = launches(entry, lambda: varlen(gems, problem))[-1]
    grid = options["grid"]
    options = {name: value for name, value in options.items() if name not in ("grid", "warmup")}
    calls = {
        "libentry": lambda: entry[grid](*arguments, **options),
        "plain Triton": lambda: entry.jit_function[grid](*arguments, **options),
        "flash_attn_varlen_func": lambda: varlen(gems, problem),
        "ours, whole call": lambda: by_ours(problem),
    }
    micros = {}
    for name, call in calls.items():
        batches = []
        for _ in range(12):
            start = time.perf_counter()
            for _ in range(50):
                call()
            batches.append((time.perf_counter() - start) / 50 * 1e6)
            if device.type == "cuda":
                torch.cuda.synchronize()
        micros[name] = statistics.median(batches[2:])
    note = ", ".join(f"{name} {value:.0f} us" for name, value in micros.items())
    return Evidence(holds=micros["libentry"] > 1.5 * micros["plain Triton"], note=f"{len(arguments)} arguments: {note}")


@case(FACT, "libtuner is Triton's autotuner with a database in FLAGGEMS_CACHE_DIR or the home directory", "Triton's")
def libtuner_database(gems: ModuleType, device: torch.device) -> Evidence:
    import triton

    tuner = kernel(gems, "attention", "_attn_bwd").fn
    code = "from flag_gems.utils.libentry import libcache; print(libcache.db_url)"
    with tempfile.TemporaryDirectory() as folder:
        urls = []
        for environment in (dict(FLAGGEMS_CACHE_DIR=f"{folder}/cache"), dict(HOME=folder)):
            unset = (
                "" if "FLAGGEMS_CACHE_DIR" in environment else "import os; os.environ.pop('FLAGGEMS_CACHE_DIR', 0); "
            )
            done = in_a_process(unset + code, **environment)
            urls.append(done.stdout.split()[-1].replace(folder, "") if done.stdout.split() else last_line(done))
    wanted = ("sqlite:////cache/config_cache/", "sqlite:////.flaggems/config_cache/")
    holds = isinstance(tuner, triton.runtime.Autotuner) and all(map(str.startswith, urls, wanted))
    return Evidence(holds=holds, note=f"{type(tuner).__mro__[1].__name__}; {', '.join(urls)}")


@case(
    FACT,
    "libtuner takes the faster of two configs that give different results, also in later processes",
    "the right one",
)
def libtuner_choice(gems: ModuleType, device: torch.device) -> Evidence:
    if device.type == "cpu":
        raise NotHereError("needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for _ in range(2):
            command = [sys.executable, str(Path(__file__).with_name("flag_gems_tuned.py"))]
            environment = {**os.environ, "FLAGGEMS_CACHE_DIR": folder}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                return Evidence(raised=RuntimeError(last_line(done)))
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    timed = [[choice["timed"] for choice in run["choices"]] for run in runs]
    results = {choice["result"] for run in runs for choice in run["choices"]}
    # By the argument that is named, the kind of the tensors and the configs, not by the other argument; then no more.
    keys = timed == [[2, 0, 2, 2], [0, 0, 0, 0]] and all(run["configs in the key"] for run in runs)
    note = f"configs timed {timed[0]}, then {timed[1]}; results {results}, of 0 at once or 2 after 200000 steps"
    return Evidence(holds=keys and results == {0.0}, note=note)
