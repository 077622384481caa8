"""``python verify_development_env.py``: whether this machine can build, test and run the package; what to do if not.

Looks for the tools, compiles a tiny program, and lets ``python -m flash_attn_plus`` speak for the package. Needs
nothing but the standard library itself. Exit code: 0 where everything is there and right, 1 where something is missing
or wrong, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent

PROGRAM = """
#include <concepts>
#include <span>

template <std::integral T>
T sum(std::span<const T> values) {
  T total = 0;
  for (T value : values) total += value;
  return total;
}

int main() {
  const int values[] = {1, 2, 3};
  return sum<int>(values) - 6;
}
"""


class Found(NamedTuple):
    tool: str
    version: str | None  # None: missing
    remedy: str  # what to do where it is missing, or why it does not serve


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Whether this machine can build, test and run flash_attn_plus.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else")
    options = parser.parse_args(argv)
    tools = find_tools()
    package = ask_the_package(*["--json"] * options.json)
    passed = all(found.version for found in tools) and package["passed"]
    if options.json:
        if package["report"] is not None:
            package["report"] = json.loads(package["report"])
        print(json.dumps({"tools": [_as_json(found) for found in tools], "package": package, "passed": passed}))
    else:
        show(tools, package)
    return 0 if passed else 1


def _as_json(found: Found) -> dict:
    return {"tool": found.tool, "version": found.version, "remedy": None if found.version else found.remedy}


def find_tools() -> list[Found]:
    python = ".".join(map(str, sys.version_info[:3])) if sys.version_info >= (3, 10) else None
    found = [Found("Python", python, f"3.10 or newer is needed; this is {sys.version.split()[0]}: install a newer one")]
    found.append(_module("pip", "pip", "install it: python -m ensurepip"))
    found.append(_program("cmake", "install CMake, for example: apt install cmake"))
    found.append(_compiler())
    found.append(_program("ninja", "install it: pip install ninja"))
    extras = {"ruff": "lint", "mypy": "lint", "pytest": "test", "pytest-xdist": "test", "expecttest": "test"}
    extras.update({"hypothesis": "test", "numpy": "test"})
    modules = {"pytest-xdist": "xdist"}
    for name, extra in extras.items():
        found.append(
            _module(name, modules.get(name, name), f'install what development needs: pip install ".[{extra}]"')
        )
    return found


def show(tools: list[Found], package: dict) -> None:
    print("Tools")
    width = max(len(found.tool) for found in tools)
    for found in tools:
        state = f"found    {found.version}" if found.version else f"MISSING  {found.remedy}"
        print(f"  {found.tool:<{width}}  {state}")
    print()
    print(package["report"] or f"flash_attn_plus: {package['failure']}")
    missing = [found.tool for found in tools if not found.version]
    faults = [f"missing: {', '.join(missing)}"] if missing else []
    faults += [f"flash_attn_plus: {package['failure']}"] if package["failure"] else []
    print()
    print(f"FAILED: {'; '.join(faults)}" if faults else "passed: this machine can build, test and run flash_attn_plus")


def ask_the_package(*options: str) -> dict:
    """What ``python -m flash_attn_plus`` says, of the installed package or else of the source tree."""
    environment = dict(os.environ)
    if importlib.util.find_spec("torch") is None:
        why = "PyTorch is missing: install it first, with the command that pytorch.org shows for this machine"
        return {"passed": False, "failure": why, "report": None}
    if importlib.util.find_spec("flash_attn_plus") is None:
        paths = [str(ROOT / "src"), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = _run([sys.executable, "-m", "flash_attn_plus", *options], environment)
    if done is None or not done.stdout.strip():
        last = done.stderr.strip().splitlines()[-1:] if done else ["it did not end"]
        why = f"python -m flash_attn_plus failed: {''.join(last)}"
        return {"passed": False, "failure": why, "report": None}
    passed = done.returncode == 0
    why = None if passed else "the self-check fails"
    return {"passed": passed, "failure": why, "report": done.stdout.strip()}


def _program(name: str, remedy: str) -> Found:
    """A program on PATH, or beside this Python, where pip puts it."""
    path = _which(name)
    if path is None:
        return Found(name, None, f"{name} is neither on PATH nor beside this Python: {remedy}")
    return _answer(name, [path, "--version"], remedy)


def _module(name: str, module: str, remedy: str) -> Found:
    """A module of this Python."""
    if importlib.util.find_spec(module) is None:
        return Found(name, None, remedy)
    from importlib import metadata

    try:
        return Found(name, metadata.version(name), remedy)
    except metadata.PackageNotFoundError:
        return _answer(name, [sys.executable, "-m", module, "--version"], remedy)


def _compiler() -> Found:
    tool = "C++20 compiler"
    remedy = "install GCC or Clang, for example: apt install g++; or name one in the environment variable CXX"
    named = os.environ.get("CXX")
    paths = [path for path in map(_which, [named] if named else ["c++", "g++", "clang++"]) if path]
    if not paths:
        looked = f"{named} (CXX)" if named else "c++, g++ and clang++"
        return Found(tool, None, f"{looked}: not on PATH: {remedy}")
    compiler = paths[0]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "tiny.cpp"), Path(folder, "tiny")
        source.write_text(PROGRAM)
        built = _run([compiler, "-std=c++20", str(source), "-o", str(program)])
        if built is None or built.returncode != 0:
            why = (built.stderr.strip().splitlines() or ["no output"])[0] if built else "it does not run"
            return Found(tool, None, f"{compiler} compiles no C++20 ({why}): {remedy}")
        ran = _run([str(program)])
        if ran is None or ran.returncode != 0:
            return Found(tool, None, f"a program that {compiler} compiled does not run: {remedy}")
    return _answer(tool, [compiler, "--version"], remedy)


def _answer(tool: str, command: list[str], remedy: str) -> Found:
    done = _run(command)
    if done is None or done.returncode != 0:
        return Found(tool, None, f"{command[0]} does not run: {remedy}")
    return Found(tool, (done.stdout.strip().splitlines() or ["version unknown"])[0], remedy)


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def _run(command: list[str], environment: dict | None = None):
    """The finished process, or None where it cannot be started or does not end."""
    try:
        return subprocess.run(
            command,
            cwd=str(ROOT),
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


if __name__ == "__main__":
    sys.exit(main())
