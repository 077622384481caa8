"""``python -m flash_attn_plus.conformance``: every operator on one device, held to the fp64 oracle, as a table.

For whoever brings up a device, from an installed package: nothing of the tests is needed. Exit code: 0 where every row
passes, 1 where one fails, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

import flash_attn_plus

from . import conformance_cases, device, diagnosis
from .tolerance import Result

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m flash_attn_plus.conformance", description="Every operator on one device, held to the fp64 oracle."
    )
    parser.add_argument("--device", help="npu, xpu:1, cuda, cpu, ...; default: the accelerator that is there, or cpu")
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        metavar="MODULE",
        dest="modules",
        help="the vendor's, first; repeatable",
    )
    parser.add_argument(
        "--register", metavar="KEY", help="register_device(KEY) before the first call: PrivateUse1, XPU, ..."
    )
    parser.add_argument("--dtype", action="append", choices=_DTYPES, help="repeatable; default: all three")
    parser.add_argument("--only", action="append", metavar="TEXT", help="rows whose name holds this; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(argv)

    checks = _checks(options.dtype or [*_DTYPES], options.only)
    for text in options.only or ():
        if not text or not any(text in check.name for check in checks):
            parser.error(f"argument --only: expected a part of a row's name, got {text!r}")
    try:  # now, and not when the table is there
        file = None if options.json is None else options.json.open("w", encoding="utf-8")
    except (OSError, ValueError) as error:
        said = diagnosis.said(error)
        parser.error(f"argument --json: expected a file to write, got {str(options.json)!r}: {said}")
    with contextlib.nullcontext() if file is None else file:
        on = _prepared(parser, options)
        return _table(checks, on, file)


def _prepared(parser: argparse.ArgumentParser, options: argparse.Namespace) -> torch.device:
    """The device, with its modules imported and its key registered."""
    for name in options.modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a vendor's package raises anything
            parser.error(f"argument --import: expected a module, got {name!r}, which raised {diagnosis.said(error)}")
    if options.register is not None:
        try:
            flash_attn_plus.register_device(options.register)
        except ValueError as error:
            parser.error(f"argument --register: {error}")
    try:
        on = _device(options.device)
    except Exception as error:  # of a driver that is broken too
        parser.error(f"argument --device: expected a device, got {options.device!r}: {diagnosis.said(error)}")
    if options.register is not None and options.device is None and on.type == "cpu":
        parser.error(f"argument --register: expected a device of {options.register}, and PyTorch finds none: --device?")
    return on


def _table(checks: Sequence[conformance_cases.AnyCheck], on: torch.device, file: TextIO | None) -> int:
    report = _facts(on)
    for line in _head(report):
        print(line)
    start = time.perf_counter()
    try:
        for check in checks:
            _write(report, file, last=False)  # before a row that may take the process along
            with contextlib.redirect_stdout(sys.stderr):  # what others print is not part of the table
                row = _run(check, on)
            report["rows"].append(row)
            report["seconds"] = round(time.perf_counter() - start, 3)
            print(_line(row), flush=True)
        failed = sum(not row["passed"] for row in report["rows"])
        report["passed"] = not failed
    finally:
        _write(report, file, last=True)
    rows = f"of {len(checks)} rows on {on}, {report['seconds']:.1f} s"
    print(f"\nFAILED: {failed} {rows}" if failed else f"\npassed: {len(checks)} {rows}")
    return 1 if failed else 0


def _write(report: dict[str, Any], file: TextIO | None, last: bool) -> None:
    """Over what was there before; to a pipe once."""
    if file is None or not (last or file.seekable()):
        return
    if file.seekable():
        file.seek(0)
        file.truncate()
    file.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
    file.flush()


def _device(name: str | None) -> torch.device:
    """With its index, as tensors have it."""
    if name is None:
        return next(iter(device.accelerators()), torch.device("cpu"))
    return torch.empty(1, device=name).device


def _checks(dtypes: Sequence[str], only: Sequence[str] | None) -> list[conformance_cases.AnyCheck]:
    dtypes = [*dict.fromkeys(dtypes)]
    checks = [check for dtype in dtypes for check in conformance_cases.of_every_dtype(_DTYPES[dtype])]
    few = [dtype for dtype in dtypes if dtype in (dtypes[0], "float32")]  # whose bounds are small
    checks += [check for dtype in few for check in conformance_cases.of_one_dtype(_DTYPES[dtype])]
    return [check for check in checks if only is None or any(text in check.name for text in only)]


def _facts(on: torch.device) -> dict[str, Any]:
    """What runs there; None and a reason where that cannot be said."""
    facts: dict[str, Any] = {"device": str(on), "name": None, "architecture": None, "forward": None, "backward": None}
    try:
        facts |= {"name": device.name(on), "architecture": device.architecture(on)}
        q = torch.empty(1, 512, 8, 64, dtype=torch.float16, device=on)
        facts |= dict(line.split(":", 1) for line in flash_attn_plus.explain(q, q, q, causal=True).splitlines()[:2])
    except Exception as error:
        facts["forward"] = f"unknown: {diagnosis.said(error)}"
    facts = {name: fact and fact.strip() for name, fact in facts.items()}
    return {"versions": diagnosis.versions(), **facts, "rows": [], "passed": None, "seconds": 0.0}


def _run(check: conformance_cases.AnyCheck, on: torch.device) -> dict[str, Any]:
    """Whatever it raises is a row too."""
    row = {"check": check.name, "dtype": diagnosis.short(check.dtype), "shape": check.shape}
    try:
        outcome = check.run(on, again=True)
    except (Exception, SystemExit) as error:
        none = {"worst": None, "error": None, "bound": None, "first_call_seconds": None, "results": {}}
        return row | none | {"passed": False, "failure": f"expected a result, got {diagnosis.said(error)}"}
    failures = [f"{result.name}: {result.failure}" for result in outcome.results if result.failure]
    worst = max(outcome.results, key=_share)
    return row | {
        "worst": worst.name,
        "error": worst.error,
        "bound": worst.bound,
        "first_call_seconds": round(outcome.first_call_seconds, 4),
        "results": {result.name: {"error": result.error, "bound": result.bound} for result in outcome.results},
        "passed": not failures,
        "failure": "; ".join(failures) or None,
    }


def _share(result: Result) -> float:
    """How much of its bound an error takes."""
    if result.failure or result.error is None:
        return float("inf")
    return result.error / result.bound if result.bound else 0.0


_COLUMNS = "{:<30} {:<9} {:<52} {:>9} {:>9}  {:<11} {:<6} {:>10}"


def _head(report: dict[str, Any]) -> Iterator[str]:
    versions = report["versions"]
    yield f"flash_attn_plus {versions['flash_attn_plus']}, torch {versions['torch']}, triton {versions['triton']}"
    yield f"{report['device']}: {report['name']}, {report['architecture']}"
    yield f"forward   {report['forward']}"
    yield f"backward  {report['backward']}"
    yield ""
    yield _COLUMNS.format("what", "dtype", "shape", "error", "bound", "of", "", "first call")


def _line(row: dict[str, Any]) -> str:
    numbers = ["-" if row[name] is None else f"{row[name]:.1e}" for name in ("error", "bound")]
    first = row["first_call_seconds"]
    said = "passed" if row["passed"] else "FAILED"
    line = _COLUMNS.format(
        *(row["check"], row["dtype"], row["shape"], *numbers, row["worst"] or "-", said),
        "-" if first is None else f"{1000 * first:.1f} ms",
    )
    return line.rstrip() if row["passed"] else f"{line.rstrip()}\n    {row['failure']}"


if __name__ == "__main__":
    sys.exit(main())
