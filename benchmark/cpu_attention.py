"""Attention on the CPU beside PyTorch's own SDPA: time, values, and peak memory. `make bench` runs it.

Each row runs both in turn, in one process, and takes medians; results are compared with each other before they are
timed. GFLOP/s count what the mask leaves (causal: half of `4 * b * h * sq * sk * d`; backward 2.5 times the forward).

Peak memory is the largest sum of live tensors above the inputs, counted by PyTorch's allocator in a second run.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import flash_attn_plus as fap
from flash_attn_plus import native

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    dtype: str
    dim: int
    seqlen: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    heads: int = 8

    @property
    def name(self) -> str:
        mask = "causal" if self.causal else "full"
        if self.window != (-1, -1):
            mask = f"window {self.window}"
        return f"{self.dtype} d{self.dim} s{self.seqlen} {mask}"

    def pairs(self) -> int:
        """Query-key pairs that the mask leaves, per head."""
        if self.window != (-1, -1):
            return int(self.mask().sum())
        return self.seqlen * self.seqlen // (2 if self.causal else 1)

    def mask(self) -> torch.Tensor:
        left, right = (side if side >= 0 else self.seqlen for side in self.window)
        offset = torch.arange(self.seqlen)[None, :] - torch.arange(self.seqlen)[:, None]
        return (offset >= -left) & (offset <= right)


DENSE = [
    Row(dtype, dim, seqlen, causal)
    for dtype, dim, seqlen, causal in (
        ("f32", 64, 1024, False),
        ("f32", 64, 1024, True),
        ("f32", 128, 1024, False),
        ("bf16", 64, 4096, True),
        ("bf16", 128, 1024, False),
        ("bf16", 128, 4096, True),
    )
]
WINDOWS = [Row(dtype, 64, 4096, window=window) for dtype in DTYPES for window in ((256, 256), (256, 0))]


def interleaved(functions: dict, seconds: float) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a slow phase of the machine meets all of them.

    At least five rounds, or one where a round takes more than ten seconds. The caller has run each once before.
    """
    times = {name: [] for name in functions}
    began = time.perf_counter()
    rounds = 0
    while time.perf_counter() - began < (10.0 if rounds < 5 else seconds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def measure(row: Row, seconds: float) -> list[dict]:
    torch.manual_seed(0)
    dtype = DTYPES[row.dtype]
    q, k, v = (torch.randn(1, row.seqlen, row.heads, row.dim, dtype=dtype, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    mask = row.mask() if row.window != (-1, -1) else None

    def ours():
        return fap.flash_attn_func(q, k, v, causal=row.causal, window_size=row.window)

    def sdpa():
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=row.causal).transpose(1, 2)

    def forward(function):
        with torch.no_grad():
            function()

    outs = {"ours": ours(), "sdpa": sdpa()}
    grads = {name: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for name, out in outs.items()}
    close = {"rtol": 2e-2, "atol": 2e-2} if row.dtype == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(outs["ours"], outs["sdpa"], **close)
    for mine, theirs in zip(grads["ours"], grads["sdpa"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=close["rtol"], atol=close["atol"] * 5)

    times = {
        "forward": interleaved({"ours": lambda: forward(ours), "sdpa": lambda: forward(sdpa)}, seconds),
        "backward": interleaved(
            {n: lambda n=n: torch.autograd.grad(outs[n], (q, k, v), dout, retain_graph=True) for n in outs}, seconds
        ),
    }
    flops = 4 * row.heads * row.pairs() * row.dim
    with torch.no_grad():
        explained = fap.explain(q, k, v, causal=row.causal, window_size=row.window).splitlines()
    rows = []
    for line, (what, by) in zip(explained, times.items(), strict=False):
        work = flops * (2.5 if what == "backward" else 1)
        rows.append(
            {
                "problem": row.name,
                "what": what,
                "kernel": line.split(":")[1].strip(),
                "ours GFLOP/s": round(work / by["ours"] / 1e9, 1),
                "SDPA GFLOP/s": round(work / by["sdpa"] / 1e9, 1),
                "ours / SDPA": round(by["sdpa"] / by["ours"], 2),
            }
        )
    return rows


def alibi_memory(seqlen: int = 16384) -> dict:
    """Peak memory above the inputs of a forward and backward with ALiBi: O(seqlen), where the scores take 8 GiB."""
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, seqlen, 8, 64, requires_grad=True) for _ in range(3))
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(8)])
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fap.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes).sum().backward()
    seconds = time.perf_counter() - start
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return {"problem": f"f32 d64 s{seqlen} causal ALiBi, forward + backward", "peak MiB": round(peak / 2**20, 1),
            "seconds": round(seconds, 1)}  # fmt: skip


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each figure")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory measurement out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{processor()}, {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, flash_attn_plus {fap.__version__}")
    print(f"native library: {native.status()}\n")
    columns = ["problem", "what", "kernel", "ours GFLOP/s", "SDPA GFLOP/s", "ours / SDPA"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    table = []
    for row in DENSE + WINDOWS:
        for line in measure(row, arguments.seconds):
            table.append(line)
            print("| " + " | ".join(str(line[name]) for name in columns) + " |", flush=True)
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(table)
    if not arguments.no_memory:
        memory = alibi_memory()
        print(f"\n{memory['problem']}: peak {memory['peak MiB']} MiB above the inputs, {memory['seconds']} s")


if __name__ == "__main__":
    main()
