"""What is installed, what is there, what runs where and why, and whether it is right: as one dictionary.

Its keys are stable: programs read them (``python -m flash_attn_plus --json``).
"""

from __future__ import annotations

import itertools
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flash_attn_plus

from . import device, native, selfcheck


class Problem(NamedTuple):
    """A typical problem; ``lengths`` are those of a packed batch."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    seqlen_q: int = 2048
    seqlen_k: int = 2048
    heads: int = 16
    heads_k: int = 16
    head_dim: int = 128
    window: tuple[int, int] = (-1, -1)
    lengths: tuple[int, ...] = ()

    def explain(self, on: torch.device) -> str:
        batch, seqlen_q, seqlen_k = (self.batch,), self.seqlen_q, self.seqlen_k
        layout = {}
        if self.lengths:
            batch, seqlen_q, seqlen_k = (), sum(self.lengths), sum(self.lengths)
            starts = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=on)
            layout = dict(cu_seqlens_q=starts, cu_seqlens_k=starts)
            layout |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), max(self.lengths))

        def tensor(seqlen: int, heads: int) -> Tensor:
            return torch.empty(*batch, seqlen, heads, self.head_dim, dtype=self.dtype, device=on)

        q, k = tensor(seqlen_q, self.heads), tensor(seqlen_k, self.heads_k)
        return flash_attn_plus.explain(q, k, k, causal=True, window_size=self.window, **layout)


PROBLEMS = (
    Problem("training, head_dim 64", head_dim=64),
    Problem("training, head_dim 128"),
    Problem("training, head_dim 256", heads=8, heads_k=8, head_dim=256),
    Problem("32 heads, 8 key heads", heads=32, heads_k=8),
    Problem("packed sequences", lengths=(700, 300, 1048)),
    Problem("sliding window of 512", window=(511, 0)),
    Problem("one query, 4096 keys", seqlen_q=1, seqlen_k=4096, heads=32, heads_k=8),
    Problem("float32", dtype=torch.float32, head_dim=64),
    Problem("float64", dtype=torch.float64, head_dim=64),
)


def devices() -> tuple[list[torch.device], str | None]:
    """The devices present, and why there is no accelerator among them (or None)."""
    cpu = torch.device("cpu")
    try:
        found = device.accelerators()
    except Exception as error:  # a broken driver raises anything
        return [cpu], f"asking for one raised {said(error)}"
    return [cpu, *found], None if found else f"PyTorch {torch.__version__} finds none"


def report(on: list[torch.device], no_accelerator: str | None, check: bool) -> dict[str, Any]:
    """Everything about these devices. An exception on one of them is a failed check of that device."""
    start = time.perf_counter()
    of_devices = [_device(each, check) for each in on]
    checks = [done for each in of_devices for done in each["checks"]]
    return {
        "versions": versions(),
        "native_library": {"loaded": native.loaded(), "status": native.status(), "file": _text(native.find())},
        "triton_kernels": _triton(of_devices),
        "no_accelerator": no_accelerator,
        "devices": of_devices,
        "passed": all(done["passed"] for done in checks) if checks else None,
        "seconds": round(time.perf_counter() - start, 3),
    }


def versions() -> dict[str, str | None]:
    device.why_no_triton()  # imports it where it is
    return {
        "flash_attn_plus": flash_attn_plus.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "platform": platform.platform(),
    }


def _triton(of_devices: list[dict[str, Any]]) -> dict[str, Any]:
    why_not = device.why_no_triton()
    runs = [problem["forward"] for of_device in of_devices for problem in of_device["problems"]]
    if why_not is None and not any(forward.startswith("Triton on ") for forward in runs):
        why_not = "none of these devices is a GPU that they are for"
    return {"can_run": why_not is None, "reason": why_not}


def _device(on: torch.device, check: bool) -> dict[str, Any]:
    # Filled in as far as it goes: what raises becomes a failed check, and the rest is still there.
    facts: dict[str, Any] = dict.fromkeys(("name", "architecture", "memory_bytes", "cores"))
    of_device = {"device": str(on), **facts, "problems": [], "checks": []}
    try:
        of_device |= {"name": device.name(on), "architecture": device.architecture(on)}
        of_device |= {"memory_bytes": device.memory(on), "cores": device.cores() if on.type == "cpu" else None}
        of_device["problems"] = list(_problems(on))
    except Exception as error:
        of_device["checks"].append(_failed("what runs", None, error))
    if check:
        of_device["checks"] += [_check(each, on) for each in selfcheck.CHECKS]
    return of_device


def _problems(on: torch.device) -> Iterator[dict[str, str]]:
    for problem in PROBLEMS:
        if not _has(on, problem.dtype):
            continue
        lines = dict(line.split(":", 1) for line in problem.explain(on).splitlines())
        runs = {direction: lines[direction].strip() for direction in ("forward", "backward")}
        yield {"problem": problem.name, "dtype": short(problem.dtype), **runs}


def _has(on: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has numbers of that kind: MPS has no float64."""
    if dtype != torch.float64:
        return True
    try:
        torch.empty(1, dtype=dtype, device=on)
    except TypeError:
        return False
    return True


def _check(check: selfcheck.Check, on: torch.device) -> dict[str, Any]:
    try:
        outcome = check.run(on)
    except Exception as error:
        return _failed(check.name, check.dtype, error)
    failures = [f"{result.name}: {result.failure}" for result in outcome.results if result.failure]
    return {
        "check": check.name,
        "dtype": short(check.dtype),
        "passed": not failures,
        "failure": "; ".join(failures) or None,
        "results": {result.name: {"error": result.error, "bound": result.bound} for result in outcome.results},
        "seconds": round(outcome.seconds, 3),
        "first_call_seconds": round(outcome.first_call_seconds, 3),
    }


def _failed(name: str, dtype: torch.dtype | None, error: Exception) -> dict[str, Any]:
    measured = {"results": {}, "seconds": None, "first_call_seconds": None}
    failure = f"expected a result, got {said(error)}"
    return {"check": name, "dtype": dtype and short(dtype), "passed": False, "failure": failure, **measured}


def said(error: BaseException) -> str:
    """In one line: PyTorch's errors can hold a page."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(x: object) -> str | None:
    return None if x is None else str(x)
