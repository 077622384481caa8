"""Each finding of docs/flaggems_analysis_report.md about attention in flag_gems 5.0.2, reproduced on this machine.

    python benchmark/flag_gems_report.py --csv flag_gems_report.csv --json flag_gems_report.json

Needs flag_gems on the path, and what it imports: sqlalchemy, PyYAML, packaging, typing_extensions. Without flag_gems
it says so, and exits with 2.

Every case is a small problem in fp16. What is right is attention in fp64 (flash_attn_plus.reference, on the CPU); the
error of flag_gems and that of the same call through flash_attn_plus stand beside each other: the largest difference,
and ||result - right|| / ||right||. A result is right where its largest difference is within 8 times that of the same
maths in plain PyTorch at fp16, plus a rounding floor: what is reported as wrong is wrong by far more than rounding.
A finding says what flag_gems computes instead, and that is compared too; where it is one of many values, as when
programs write to one place, the other elements are.

The cases stand in files of their own: flag_gems_sdpa.py, _dense.py and _varlen.py, a file for each function, and
flag_gems_costs.py, _operators.py and _package.py.

The verdicts:
    as reported                 right where the finding says so; wrong, in the way that it says, or raised; a fact
    not reproduced              right where the finding says wrong; no fact
    wrong, not as predicted     wrong, but something else than the finding says
    wrong, unspecified how      wrong, where the finding does not say how
    broken, unspecified how     an illegal access to memory, where the finding does not say how it ends
    wrong, reported as right
    raised ..., crashed, timed out, not run

Cases run in worker processes, several at a time: one that crashes or hangs takes nothing else with it, and those that
write outside their memory have a process of their own. What a call allocates lies between guards, which are compared
afterwards, and is NaN before: elements that nothing writes are seen. Where flag_gems would tune among its configs, one
that it ships is chosen, so that a case takes seconds; `sdpagrad_tuned` lets it tune.

The exit status is 1 where ours is wrong.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from attention import checkout, machine, markdown, reason
from flag_gems_evidence import CASES, RIGHT, Case, Evidence, NotHereError, ours_is_wrong, verdict, worst

# In the order of the report; each one registers its cases.
for subject in ("sdpa", "dense", "varlen", "costs", "operators", "package"):
    importlib.import_module(f"flag_gems_{subject}")

COLUMNS = [
    *("case", "finding", "right", "flag_gems max abs", "flag_gems relative"),
    *("ours max abs", "ours relative", "verdict", "note"),
]
MACHINE = ["device", "torch", "triton", "flag_gems", "commit"]


def row_of(case: Case, evidence: Evidence) -> dict[str, str]:
    theirs, mine = (worst(found, evidence.right) for found in (evidence.theirs, evidence.mine))
    said = verdict(case.claim, evidence, case.raises) + ("; OURS IS WRONG" if ours_is_wrong(evidence) else "")
    outside = f"{evidence.outside} elements outside its memory written" if evidence.outside else ""
    note = "; ".join(filter(None, (evidence.note, outside, theirs[2])))
    return row(case, said, note, theirs, mine)


def row(case: Case, said: str, note: str = "", theirs: tuple = ("", ""), mine: tuple = ("", "")) -> dict[str, str]:
    finding = f"right: {case.finding}" if case.claim == RIGHT else case.finding
    values = (case.name, finding, case.right, *theirs[:2], *mine[:2], said, note)
    return dict(zip(COLUMNS, values, strict=True))


# Worker processes


def work(names: list[str], device: torch.device, out: Path) -> int:
    """Runs cases one after the other, and writes a line before and after each; the parent reads them."""

    def say(line: dict) -> None:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    try:
        import flag_gems as gems
    except Exception as error:  # RuntimeError where there is no device
        say({"not imported": reason(error)})
        return 2
    say({"version": getattr(gems, "__version__", "?")})
    for name in names:
        say({"begun": name})
        try:
            evidence = CASES[name].run(gems, device)
        except NotHereError as why:
            said = row(CASES[name], f"not run: {why}")
        except Exception as error:
            traceback.print_exc()
            said = row(CASES[name], f"raised {reason(error)}")  # outside of flag_gems's call, whatever is reported
        else:
            said = row_of(CASES[name], evidence)
        say({"row": said})
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception:  # this process can do nothing more on its device
                return 3
    return 0


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")] if out.exists() else []


def attend(names: list[str], options: argparse.Namespace, folder: Path) -> dict:
    """Runs cases in processes until each has a row: {"rows": ..., "version": ..., "not imported": ...}."""
    rows: dict[str, dict] = {}
    facts: dict[str, str] = {}
    left = list(names)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton"), "FLAGGEMS_CACHE_DIR": str(folder / "gems")}
    if torch.version.cuda:
        environment.setdefault("GEMS_VENDOR", "nvidia")  # else its import runs every vendor's command-line tool
    while left and time.monotonic() < options.deadline:
        out = folder / f"{left[0]}.jsonl"
        command = [sys.executable, __file__, "--device", options.device, "--work", str(out), "--cases", ",".join(left)]
        with (folder / f"{left[0]}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            seen, since, late = 0, time.monotonic(), False
            while process.poll() is None:
                time.sleep(0.1)
                if time.monotonic() > options.deadline:
                    process.kill()
                if len(lines_of(out)) > seen:
                    seen, since = len(lines_of(out)), time.monotonic()
                elif time.monotonic() - since > options.timeout:
                    late = True
                    process.kill()
            process.wait()
        begun = None
        for line in lines_of(out):
            begun = line.get("begun", begun)
            if "row" in line:
                rows[line["row"]["case"]] = line["row"]
                begun = None
            facts |= {name: line[name] for name in ("version", "not imported") if name in line}
        if "not imported" in facts:
            return {"rows": {}, **facts}
        if time.monotonic() > options.deadline:
            break
        culprit = begun or next((name for name in left if name not in rows), None)
        if culprit is not None and (late or begun or not any(name in rows for name in left)):
            said = f"timed out after {options.timeout:.0f} s" if late else f"crashed with status {process.returncode}"
            tail = (folder / f"{left[0]}.log").read_text().strip().splitlines()[-1:]
            rows[culprit] = row(CASES[culprit], said, tail[0][:160] if tail else "")
        left = [name for name in left if name not in rows]
    for name in names:
        rows.setdefault(name, row(CASES[name], "not run", "out of time"))
    return {"rows": rows, **facts}


def groups_of(names: list[str], size: int) -> list[list[str]]:
    """Cases of one kind in one process, not too many; those that may harm others alone; the one that tunes first."""
    found = [[name] for name in names if CASES[name].alone]
    kinds: dict[str, list[str]] = {}
    for name in names:
        if not CASES[name].alone:
            kinds.setdefault(CASES[name].group, []).append(name)
    for members in kinds.values():
        found += [members[i : i + size] for i in range(0, len(members), size)]
    return sorted(found, key=lambda group: "sdpagrad_tuned" not in group)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="cpu: for a stand-in of flag_gems")
    parser.add_argument("--cases", default="", metavar="NAMES", help="default: all of them")
    parser.add_argument("--list", action="store_true", help="the names of the cases")
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="processes at once"
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each case")
    parser.add_argument("--at-most", type=float, default=math.inf, help="seconds in all; then the rest is not run")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", default=None, help="what is measured, where there is no git to say so")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.names = options.cases.split(",") if options.cases else list(CASES)
    if unknown := set(options.names) - set(CASES):
        parser.error(f"--cases: expected names that --list shows, got {', '.join(sorted(unknown))}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.list:
        print("\n".join(CASES))
        return 0
    if options.work:
        return work(options.names, torch.device(options.device), options.work)
    if importlib.util.find_spec("flag_gems") is None:
        print("flag_gems is not installed: pip install --no-deps flag_gems==5.0.2, ", end="", file=sys.stderr)
        print("and pip install sqlalchemy pyyaml packaging", file=sys.stderr)
        return 2
    start = time.monotonic()
    options.deadline = start + options.at_most
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        attended = functools.partial(attend, options=options, folder=Path(folder))
        results = list(pool.map(attended, groups_of(options.names, 5)))
    rows = {name: row for result in results for name, row in result["rows"].items()}
    if why := next((result["not imported"] for result in results if "not imported" in result), None):
        print(f"flag_gems is installed but does not import: {why}", file=sys.stderr)
        return 2
    version = next((result["version"] for result in results if "version" in result), "?")
    commit = checkout() if options.commit is None else options.commit
    facts = {**machine(options.device, commit), "flag_gems": version}
    ordered = [rows[name] for name in options.names]
    print(", ".join(f"{name} {facts[name]}" for name in MACHINE), end="\n\n")
    print(markdown([COLUMNS, *([r[column].replace("|", "\\|") for column in COLUMNS] for r in ordered)]))
    agreed = sum(r["verdict"].startswith("as reported") for r in ordered)
    unspecified = sum(", unspecified how" in r["verdict"] for r in ordered)
    skipped = sum(r["verdict"].startswith("not run") for r in ordered)
    seconds = time.monotonic() - start
    print(f"\n{agreed} of {len(ordered)} as reported, ", end="")
    print(f"{unspecified} wrong in no specified way, {skipped} not run, in {seconds:.0f} s")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *MACHINE])
            writer.writeheader()
            writer.writerows({**r, **facts} for r in ordered)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "cases": ordered}, indent=1) + "\n")
    return 1 if any("OURS IS WRONG" in r["verdict"] for r in ordered) else 0


if __name__ == "__main__":
    sys.exit(main())
