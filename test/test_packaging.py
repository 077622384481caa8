"""What an installation relies on: the search for torch's headers, the metadata, the pins, the Makefile."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn_plus
from flash_attn_plus import native

ROOT = Path(__file__).parent.parent
FIND_TORCH = ROOT / "cmake" / "find_torch.py"


def requirements(table: str) -> set[str]:
    """Names in an array of pyproject.toml, which Python 3.10 has no parser for."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    array = re.search(rf"^{re.escape(table)} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert array is not None, f"pyproject.toml has no {table}"
    return {re.split(r"[<>=!~\[; ]", item)[0] for item in re.findall(r'"([^"]+)"', array[1])}


def test_library_is_built_where_it_can_be():
    """An install without it succeeds, and every test of the native kernel is then skipped: nothing else would tell."""
    try:
        importlib.metadata.distribution("flash-attn-plus")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from the source tree: the package is not installed")
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    include, why = runpy.run_path(str(FIND_TORCH))["find"]([Path(torch.__file__).parent])
    if include is None:
        pytest.skip(why)
    assert native.loaded(), native.status()


class TestFindTorch:
    @pytest.fixture
    def find(self):
        return runpy.run_path(str(FIND_TORCH))["find"]

    @pytest.fixture
    def package(self, tmp_path):
        """Makes a directory that looks like an installed torch."""

        def make(version: str = "2.11.0+cpu", headers: bool = True, name: str = "torch") -> Path:
            package = tmp_path / name
            package.mkdir()
            (package / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
            if headers:
                header = package / "include/torch/csrc/stable/library.h"
                header.parent.mkdir(parents=True)
                header.touch()
            return package

        return make

    def test_the_torch_that_runs_here(self):
        run = subprocess.run([sys.executable, FIND_TORCH], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert Path(run.stdout.strip()).samefile(Path(torch.__file__).parent / "include")

    def test_by_path_where_it_cannot_be_imported(self, package, tmp_path):
        """Build isolation hides torch from sys.path, but the virtual environment around it is known."""
        site = tmp_path / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        site.mkdir(parents=True)
        package().rename(site / "torch")
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CONDA_PREFIX")}
        run = subprocess.run(
            [sys.executable, "-S", FIND_TORCH],  # -S: no site-packages on sys.path
            env=env | {"VIRTUAL_ENV": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.stdout.strip() == str(site / "torch" / "include"), run.stderr

    @pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.0a0+git1234", "3.0.0"])
    def test_versions_that_serve(self, find, package, version):
        torch_package = package(version)
        assert find([torch_package]) == (torch_package / "include", "")

    @pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu128", "1.13.0"])
    def test_too_old(self, find, package, version):
        include, why = find([package(version)])
        assert include is None
        assert "is too old, 2.11 or newer is needed" in why
        assert version[: version.index(".", 2)] in why

    def test_without_headers(self, find, package):
        include, why = find([package(headers=False)])
        assert include is None
        assert "comes without its headers" in why

    def test_no_torch(self, find, tmp_path):
        assert find([tmp_path, tmp_path / "nowhere"]) == (None, "torch is not installed for this Python")

    def test_the_first_that_serves(self, find, package):
        old, new = package("2.9.0", name="old"), package("2.12.0", name="new")
        assert find([old, new]) == (new / "include", "")


class TestMetadata:
    def test_version_is_said_once(self):
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        version = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
        assert version is not None
        assert version[1] == flash_attn_plus.__version__

    def test_torch_is_needed_to_run_and_never_to_build(self):
        assert requirements("requires") == {"scikit-build-core"}
        assert requirements("dependencies") == {"torch"}

    def test_types_are_shipped(self):
        assert (Path(flash_attn_plus.__file__).parent / "py.typed").is_file()

    @pytest.mark.parametrize("extra", ["test", "demo", "lint", "triton"])
    def test_every_extra_is_pinned(self, extra):
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pinned = {line.split("==")[0] for line in lines if not line.startswith("#")}
        assert requirements(extra) <= pinned

    def test_pins_are_exact_and_cover_every_python(self):
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w-]+==[\d.]+(; .+)?", pin) for pin in pins)
        for pin in (pin for pin in pins if 'python_version < "3.11"' in pin):
            name = pin.split("==")[0]
            assert any(other.startswith(f"{name}==") and 'python_version >= "3.11"' in other for other in pins)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
class TestMakefile:
    def dry_run(self, *arguments: str) -> str:
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
        run = subprocess.run(["make", "-n", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return run.stdout

    @pytest.mark.parametrize(
        "target, command",
        [
            ("test", "-m pytest -n 2"),
            ("demo", "examples/train_gpt.py"),
            ("bench", "benchmark/cpu_attention.py"),
            ("lint", "-m ruff format --check"),
        ],
    )
    def test_targets(self, target, command):
        assert command in self.dry_run(target)

    def test_an_interpreter_of_the_callers_is_used_as_it_is(self):
        commands = self.dry_run("test", f"PYTHON={sys.executable}", "ARGS=-k native")
        assert f'"{sys.executable}" -m pytest -n 2 -k native' in commands
        assert "pip install" not in commands
        assert "venv" not in commands.replace(sys.executable, "")
