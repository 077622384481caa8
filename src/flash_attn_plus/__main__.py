"""``python -m flash_attn_plus``: what runs here and why, and whether it is right.

Exit code: 0 where every check passes, 1 where one fails, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from . import diagnosis


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m flash_attn_plus", description="What runs here and why; a self-check.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    parser.add_argument("--no-check", action="store_true", help="run no kernels")
    parser.add_argument(
        "--device", action="append", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; repeatable; default: all"
    )
    options = parser.parse_args(argv)
    present, no_accelerator = diagnosis.devices()
    wanted = present
    if options.device:
        for name in options.device:
            if not any(_is(name, device) for device in present):
                parser.error(f"argument --device: expected one of {', '.join(map(str, present))}, got {name!r}")
        wanted = [device for device in present if any(_is(name, device) for name in options.device)]

    # What others print on the way is not part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        report = diagnosis.report(wanted, no_accelerator, check=not options.no_check)
    print(json.dumps(report, indent=2, allow_nan=False) if options.json else "\n".join(text(report)))
    return 1 if report["passed"] is False else 0


def _is(name: str, device: Any) -> bool:
    """Whether ``name`` means that device: "cuda" means all of its kind."""
    return name in (str(device), device.type)


def text(report: dict[str, Any]) -> Iterator[str]:
    versions = report["versions"]
    yield f"flash_attn_plus {versions['flash_attn_plus']}"
    yield ""
    builds = {"CUDA": versions["cuda"], "ROCm": versions["rocm"]}
    built = ", ".join(f"{name} {version}" for name, version in builds.items() if version)
    triton, native = report["triton_kernels"], report["native_library"]
    yield from _aligned(
        {
            "Python": f"{versions['python']}, {versions['platform']}",
            "torch": f"{versions['torch']}, {built or 'without CUDA and ROCm'}",
            "triton": versions["triton"] or "absent",
            "native library": native["status"] + (f", {native['file']}" if native["loaded"] else ""),
            "Triton kernels": "can run" if triton["can_run"] else f"cannot run: {triton['reason']}",
            **({"accelerator": f"none: {report['no_accelerator']}"} if report["no_accelerator"] else {}),
        }
    )
    for device in report["devices"]:
        yield ""
        yield from _of_device(device)
    yield ""
    yield from _verdict(report)


def _of_device(device: dict[str, Any]) -> Iterator[str]:
    facts = [device["name"], device["architecture"] if device["architecture"] != device["device"] else None]
    facts.append(f"{device['cores']} cores" if device["cores"] else None)
    facts.append(f"{device['memory_bytes'] / 2**30:.1f} GiB" if device["memory_bytes"] else None)
    yield f"{device['device']}: {', '.join(filter(None, facts)) or 'unknown'}"
    if device["problems"]:
        yield "  what runs (causal), and why"
    for problem in device["problems"]:
        kind = "" if problem["problem"] == problem["dtype"] else f", {problem['dtype']}"
        yield f"    {problem['problem']}{kind}"
        yield f"      forward   {problem['forward']}"
        yield f"      backward  {problem['backward']}"
    if device["checks"]:
        yield "  self-check against the fp64 oracle: error / what it may be"
    for check in device["checks"]:
        name = check["check"] + (f", {check['dtype']}" if check["dtype"] else "")
        if not check["passed"]:
            yield f"    FAILED  {name}: {check['failure']}"
            continue
        results = "  ".join(f"{k} {r['error']:.1e} / {r['bound']:.1e}" for k, r in check["results"].items())
        # Where kernels are compiled, that is most of the time.
        first = "" if device["device"] == "cpu" else f" (first call {check['first_call_seconds']:.1f} s)"
        yield f"    passed  {name:<26} {check['seconds']:6.2f} s{first}  {results}"


def _verdict(report: dict[str, Any]) -> Iterator[str]:
    checks = [(device["device"], check) for device in report["devices"] for check in device["checks"]]
    if not checks:
        yield "no checks were run"
        return
    time = f"{report['seconds']:.1f} s"
    on_accelerators = [check["first_call_seconds"] or 0.0 for device, check in checks if device != "cpu"]
    if on_accelerators:
        time += f", {sum(on_accelerators):.1f} s of it in first calls on accelerators, which compile kernels"
    failed = [f"{check['check']} on {device}" for device, check in checks if not check["passed"]]
    if failed:
        yield f"FAILED: {len(failed)} of {len(checks)} checks ({', '.join(failed)}); {time}"
    else:
        yield f"passed: {len(checks)} checks; {time}"


def _aligned(facts: dict[str, str]) -> Iterator[str]:
    width = max(map(len, facts))
    return (f"  {name:<{width}}  {fact}" for name, fact in facts.items())


if __name__ == "__main__":
    sys.exit(main())
