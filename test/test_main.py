"""``python -m flash_attn_plus`` and verify_development_env.py: what they print, and what makes them fail."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from assertions import rounding_floor

import flash_attn_plus
from flash_attn_plus import __main__ as program
from flash_attn_plus import device, diagnosis, native, selfcheck, tolerance

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(flash_attn_plus.__file__).parent.parent

# Programs read these: a key may be added, and none may go.
KEYS = {
    "": "devices native_library no_accelerator passed seconds triton_kernels versions",
    "versions": "cuda flash_attn_plus platform python rocm torch triton",
    "native_library": "file loaded status",
    "triton_kernels": "can_run reason",
    "device": "architecture checks cores device memory_bytes name problems",
    "problem": "backward dtype forward problem",
    "check": "check dtype failure first_call_seconds passed results seconds",
    "result": "bound error",
}

NO_TRITON = """
import sys
sys.modules["triton"] = None
"""

# Replaces a kernel, in front of the program.
WRONG_VALUES = """
import flash_attn_plus
from flash_attn_plus import rowblocks
right = rowblocks.backward
def wrong(*args):
    dq, dk, *rest = right(*args)
    return dq, 1.5 * dk, *rest
rowblocks.backward = wrong
"""
RAISES = """
import flash_attn_plus
from flash_attn_plus import cpu
def raises(*args):
    raise RuntimeError("no such instruction")
cpu.forward = cpu.varlen_forward = raises
"""


def environment(**changed: str) -> dict[str, str]:
    """Where this package is found where this process found it, and Triton compiles instead of interpreting."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": str(SOURCE), **changed}


def fresh(*options: str, before: str = "", **changed: str) -> subprocess.CompletedProcess:
    code = f"{before}\nimport runpy, sys\nsys.argv[1:] = {list(options)}\n"
    code += "runpy.run_module('flash_attn_plus', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code] if before else [sys.executable, "-m", "flash_attn_plus", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**changed))


def keys(of: dict) -> str:
    return " ".join(sorted(of))


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess:
    # One thread: what it takes does not depend much on what else runs here.
    return fresh("--json", "--device", "cpu", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def report(done) -> dict:
    return json.loads(done.stdout)


class TestReport:
    def test_passes_and_says_nothing_else(self, done, report):
        assert done.returncode == 0, done.stderr
        assert report["passed"] is True
        assert done.stdout.startswith("{") and done.stdout.endswith("}\n")

    def test_its_keys_are_these(self, report):
        assert keys(report) == KEYS[""]
        for name in ("versions", "native_library", "triton_kernels"):
            assert keys(report[name]) == KEYS[name]
        for of_device in report["devices"]:
            assert keys(of_device) == KEYS["device"]
            assert {keys(problem) for problem in of_device["problems"]} == {KEYS["problem"]}
            assert {keys(check) for check in of_device["checks"]} == {KEYS["check"]}
            assert {keys(result) for check in of_device["checks"] for result in check["results"].values()} == {
                KEYS["result"]
            }

    def test_says_what_is_here(self, report):
        versions = report["versions"]
        assert versions["flash_attn_plus"] == flash_attn_plus.__version__
        assert versions["torch"] == torch.__version__
        assert report["native_library"]["loaded"] == native.loaded()
        assert report["native_library"]["status"] == native.status()
        (of_cpu,) = report["devices"]
        assert of_cpu["device"] == "cpu" and of_cpu["name"] and of_cpu["cores"] > 0 and of_cpu["memory_bytes"] > 0

    def test_explains_every_problem(self, report):
        """In the words of ``explain``."""
        (of_cpu,) = report["devices"]
        assert [problem["problem"] for problem in of_cpu["problems"]] == [each.name for each in diagnosis.PROBLEMS]
        window = next(problem for problem in of_cpu["problems"] if problem["problem"].startswith("sliding window"))
        q = torch.empty(1, 2048, 16, 128, dtype=torch.bfloat16)
        said = flash_attn_plus.explain(q, q, q, causal=True, window_size=(511, 0)).splitlines()
        assert [f"forward:  {window['forward']}", f"backward: {window['backward']}"] == said[:2]

    def test_checks_are_of_every_kind_and_quick(self, report):
        """Forward, backward, packed, three dtypes; 2 seconds are promised, on a machine that does nothing else."""
        checks = report["devices"][0]["checks"]
        assert {check["dtype"] for check in checks} == {"float32", "bfloat16", "float16"}
        assert any("packed" in check["check"] for check in checks)
        assert {name for check in checks for name in check["results"]} == {"out", "lse", "dq", "dk", "dv"}
        assert all(r["error"] <= r["bound"] for check in checks for r in check["results"].values())
        assert sum(check["seconds"] for check in checks) < 10

    def test_text(self):
        done = fresh()
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii() and "\x1b" not in done.stdout
        assert all(line == line.rstrip() for line in done.stdout.splitlines())
        for expected in (f"flash_attn_plus {flash_attn_plus.__version__}\n", "\ncpu: ", native.status(), "forward   "):
            assert expected in done.stdout
        assert re.search(r"\npassed: \d+ checks; [\d.]+ s", done.stdout)

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        """Kernels are compiled, which is told apart."""
        done = fresh("--json", "--device", "cuda")
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads(done.stdout)
        assert report["triton_kernels"] == {"can_run": True, "reason": None} and report["no_accelerator"] is None
        for of_device in report["devices"]:
            assert of_device["architecture"].startswith(("sm_", "gfx")) and of_device["memory_bytes"] > 0
            assert all(check["first_call_seconds"] < check["seconds"] for check in of_device["checks"])
        assert " in first calls on accelerators, which compile kernels" in fresh("--device", "cuda").stdout

    def test_no_check(self, capsys):
        assert program.main(["--no-check", "--json", "--device", "cpu"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["passed"] is None and report["devices"][0]["checks"] == []
        assert program.main(["--no-check"]) == 0
        assert capsys.readouterr().out.endswith("no checks were run\n")

    def test_without_triton(self):
        done = fresh("--json", "--device", "cpu", before=NO_TRITON)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["versions"]["triton"] is None and report["triton_kernels"]["can_run"] is False
        assert report["triton_kernels"]["reason"].startswith("Triton cannot be imported (ModuleNotFoundError")

    def test_leaves_the_random_numbers_alone(self):
        state = torch.get_rng_state()
        program.main(["--json", "--device", "cpu"])
        assert torch.equal(torch.get_rng_state(), state)


class TestFailures:
    @pytest.mark.parametrize("arguments", [["--device", "no such"], ["--device", "meta"], ["--device"], ["--fast"]])
    def test_wrong_arguments(self, arguments, capsys):
        with pytest.raises(SystemExit) as done:
            program.main(arguments)
        assert done.value.code == 2
        out, err = capsys.readouterr()
        assert out == "" and "error: " in err

    def test_absent_devices_are_named_with_those_present(self, capsys):
        with pytest.raises(SystemExit):
            program.main(["--device", "mps:7"])
        assert "argument --device: expected one of cpu" in capsys.readouterr().err

    def test_a_wrong_kernel(self):
        done = fresh("--device", "cpu", before=WRONG_VALUES)
        assert done.returncode == 1, done.stderr
        (line,) = (line for line in done.stdout.splitlines() if "FAILED  sliding window, float32" in line)
        assert re.search(r": dk: expected -?[\d.e-]+, found -?[\d.e-]+ at \[.*\]; error [\d.e-]+ > bound", line)
        assert "dq: " not in line and "out: " not in line
        assert "\nFAILED: " in done.stdout and "sliding window on cpu" in done.stdout

    def test_a_kernel_that_raises(self):
        done = fresh("--json", "--device", "cpu", before=RAISES)
        assert done.returncode == 1, done.stderr
        report = json.loads(done.stdout)
        assert report["passed"] is False and len(report["devices"][0]["problems"]) == len(diagnosis.PROBLEMS)
        for check in report["devices"][0]["checks"]:
            assert keys(check) == KEYS["check"]
            assert check["failure"] == "expected a result, got RuntimeError: no such instruction"

    @pytest.mark.parametrize(
        "change, said",
        [
            (
                lambda x: x.masked_fill(torch.arange(x.shape[-1]) == 3, torch.nan),
                r"out: \d+ of \d+ elements are not finite",
            ),
            (lambda x: x[..., 1:], r"expected shape \(2, 96, 4, 64\), got \(2, 96, 4, 63\)"),
            (lambda x: x + 1e-4, "out: expected .* found .* error 0.0001.* > bound"),
        ],
        ids=["NaN", "shape", "values"],
    )
    def test_what_differs_is_named(self, change, said, monkeypatch, capsys):
        right = flash_attn_plus.flash_attn_func

        def wrong(*args, **options):
            out, lse = right(*args, **options)
            return change(out), lse

        check = selfcheck.Check("forward", torch.float32, backward=False)
        monkeypatch.setattr(selfcheck, "CHECKS", (check,))
        monkeypatch.setattr(flash_attn_plus, "flash_attn_func", wrong)
        assert program.main(["--json", "--device", "cpu"]) == 1
        report = json.loads(capsys.readouterr().out)  # NaN has no place in JSON
        assert re.search(said, report["devices"][0]["checks"][0]["failure"])

    @pytest.mark.parametrize("asked", ["name", "architecture", "memory"])
    def test_a_device_that_fails_is_a_failed_check_of_it(self, asked, monkeypatch, capsys):
        def fails(device):
            raise RuntimeError(f"the driver of {device} is gone\nand a page of C++")

        monkeypatch.setattr(device, asked, fails)
        assert program.main(["--device", "cpu"]) == 1
        out = capsys.readouterr().out
        assert "FAILED  what runs: expected a result, got RuntimeError: the driver of cpu is gone\n" in out
        assert out.count("    passed  ") == len(selfcheck.CHECKS)  # the rest is still there

    def test_a_broken_driver(self, monkeypatch, capsys):
        def fails():
            raise RuntimeError("CUDA driver initialization failed")

        monkeypatch.setattr(device, "accelerators", fails)
        assert program.main(["--no-check"]) == 0
        assert "none: asking for one raised RuntimeError: CUDA driver initialization failed" in capsys.readouterr().out

    def test_several_devices(self, monkeypatch, capsys):
        """One that is wanted and broken does not take the others' report along."""
        monkeypatch.setattr(device, "accelerators", lambda: [torch.device("meta", 0)])
        assert program.main(["--json"]) == 1
        report = json.loads(capsys.readouterr().out)
        of_cpu, of_meta = report["devices"]
        assert all(check["passed"] for check in of_cpu["checks"])
        assert not any(check["passed"] for check in of_meta["checks"])
        assert report["no_accelerator"] is None
        assert program.main(["--device", "meta", "--device", "cpu", "--no-check"]) in (0, 1)
        assert re.findall(r"^(cpu|meta:0): ", capsys.readouterr().out, re.MULTILINE) == ["cpu", "meta:0"]


def test_the_rounding_floor_is_that_of_the_tests():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (0.2, 1.0, 3.7, 100.0):
            x = torch.tensor([-size, 0.1], dtype=torch.float64)
            assert tolerance.rounding_floor(x, dtype) == pytest.approx(rounding_floor(x, dtype), rel=1e-12)


class TestVerifyDevelopmentEnv:
    SCRIPT = ROOT / "verify_development_env.py"

    def run(self, *options: str, **changed: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(self.SCRIPT), *options]
        return subprocess.run(command, capture_output=True, text=True, env=environment(**changed))

    @pytest.fixture
    def script(self):
        return types.SimpleNamespace(**runpy.run_path(str(self.SCRIPT)))

    def test_says_of_each_tool_whether_it_is_there(self):
        done = self.run("--json")
        report = json.loads(done.stdout)
        assert keys(report) == "package passed tools" and keys(report["package"]) == "failure passed report"
        assert keys(report["package"]["report"]) == KEYS[""]
        names = [tool["tool"] for tool in report["tools"]]
        assert names[:5] == ["Python", "pip", "cmake", "C++20 compiler", "ninja"]
        assert names[5:] == ["ruff", "mypy", "pytest", "pytest-xdist", "expecttest", "hypothesis", "numpy"]
        for tool in report["tools"]:
            assert keys(tool) == "remedy tool version"
            assert (tool["version"] is None) == (tool["remedy"] is not None)
        everything = all(tool["version"] for tool in report["tools"]) and report["package"]["passed"]
        assert report["passed"] == everything and done.returncode == (0 if everything else 1)

    def test_a_tool_that_is_hidden_is_missed(self, tmp_path):
        """And the package is asked all the same: the CPU needs none of them (a GPU needs a compiler)."""
        done = self.run(PATH=str(tmp_path), CXX="", CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 1
        assert re.search(r"^  C\+\+20 compiler +MISSING  c\+\+, g\+\+ and clang\+\+: not on PATH: ", done.stdout, re.M)
        assert re.search(r"^FAILED: missing: .*C\+\+20 compiler", done.stdout, re.M)
        assert "\npassed: " in done.stdout

    @pytest.mark.parametrize(
        "behaviour, said",
        [
            ("echo 'error: unknown argument -std=c++20' >&2; exit 1", "compiles no C.*20 .*unknown argument"),
            ("exit 0", "a program that .* compiled does not run"),
        ],
    )
    @pytest.mark.skipif(shutil.which("sh") is None, reason="there is no shell")
    def test_a_compiler_must_compile(self, behaviour, said, script, tmp_path, monkeypatch):
        compiler = tmp_path / "cc"
        compiler.write_text(f"#!/bin/sh\n{behaviour}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        found = script._compiler()
        assert found.version is None and re.search(said, found.remedy)

    def test_needs_nothing_but_the_standard_library(self):
        """-S: no site-packages, hence no PyTorch and no tools: it says so, and what to do."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-S", str(self.SCRIPT)]
        done = subprocess.run(command, capture_output=True, text=True, env=kept)
        assert done.returncode == 1, done.stderr
        assert done.stderr == "" and "PyTorch is missing: install it first" in done.stdout
        assert re.search(r"^  pytest-xdist +MISSING  .*pip install", done.stdout, re.M)

    def test_wrong_arguments(self):
        done = self.run("--jsn")
        assert done.returncode == 2 and done.stdout == ""
