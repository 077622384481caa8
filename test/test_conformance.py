"""``python -m flash_attn_plus.conformance``: its table, its JSON, and that every kind of row can fail."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn_plus
from flash_attn_plus import conformance, selfcheck
from flash_attn_plus.conformance_cases import CacheCheck, CombineCheck, RotaryCheck

SOURCE = Path(flash_attn_plus.__file__).parent.parent

REPORT = "architecture backward device forward name passed rows seconds versions"
ROW = "bound check dtype error failure first_call_seconds passed results shape worst"


def keys(of: dict) -> str:
    return " ".join(sorted(of))


def test_passes_on_a_cpu(tmp_path):
    """As a vendor runs it, from another folder; in a minute at most."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "flash_attn_plus.conformance", "--device", "cpu", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    rows = report["rows"]
    assert keys(report) == REPORT and report["passed"] is True and report["device"] == "cpu" and report["seconds"] < 60
    assert {keys(row) for row in rows} == {ROW}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16", "float32"}
    assert f"\npassed: {len(rows)} of {len(rows)} rows on cpu" in done.stdout
    assert done.stdout.isascii() and all(line == line.rstrip() for line in done.stdout.splitlines())
    for row in rows:
        assert f"\n{row['check']} " in done.stdout and row["results"]["second call"]["error"] == 0.0
        assert all(result["error"] <= result["bound"] for result in row["results"].values())
    results = {name for row in rows for name in row["results"]} - {"second call"}
    gradients = {"dq", "dk", "dv", "dsink", "dbias", "dx"}
    assert results == {"out", "lse", "new k", "new v", "other rows"} | gradients


class TestFailures:
    """Each breaks one thing, and names the row that must find it."""

    @pytest.fixture
    def row(self, capsys, tmp_path):
        """The row of that name, which is run alone."""

        def run(name: str) -> dict:
            file = tmp_path / "report.json"
            options = ["--device", "cpu", "--dtype", "float32", "--only", name, "--json", str(file)]
            code = conformance.main(options)
            self.out = capsys.readouterr().out
            (row,) = (row for row in json.loads(file.read_text())["rows"] if row["check"] == name)
            assert code == (0 if row["passed"] else 1)
            return row

        return run

    @pytest.mark.parametrize(
        "of, name, result",
        [
            *((selfcheck, "all options", result) for result in ("out", "lse", "dq", "dk", "dv", "dsink", "dbias")),
            *((selfcheck, "packed, in one tensor", result) for result in ("out", "lse", "dq", "dk", "dv")),
            *((CacheCheck, "cache in pages", result) for result in ("out", "lse", "new k", "new v", "other rows")),
            (CacheCheck, "cache: numbered, left padding", "new k"),
            *((RotaryCheck, "rotary: sliced, d 59", result) for result in ("out", "dx")),
            (RotaryCheck, "rotary in place, packed", "out"),
            *((CombineCheck, name, result) for name in ("combine", "merge_states") for result in ("out", "lse")),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("wrong", [1e-4, torch.nan], ids=str)
    def test_one_wrong_element(self, of, name, result, wrong, row, monkeypatch):
        right = of._ours

        def ours(*args):
            results = right(*args)
            at = results[result].detach().clone()
            at.view(-1)[-1] += wrong
            return results | {result: at}

        assert row(name)["passed"]
        monkeypatch.setattr(of, "_ours", ours)
        found = row(name)
        said = "expected " if wrong == 1e-4 else r"\d+ of \d+ elements are not "
        assert not found["passed"] and re.match(rf"{result}: {said}", found["failure"])
        assert "; " not in found["failure"].replace("; error ", "")  # nothing else is wrong
        assert found["worst"] == result and found["failure"] in self.out and "FAILED: 1 of " in self.out

    def test_a_minus_infinity_that_is_absent(self, row, monkeypatch):
        """A row that sees no key has lse -inf: zeros are wrong, and so are others where there should be none."""
        right = selfcheck._ours
        for name in ("more queries than keys", "causal"):
            monkeypatch.setattr(selfcheck, "_ours", lambda *a: (r := right(*a)) | {"lse": r["lse"].clamp_min(-1e30)})
            assert row(name)["passed"] == (name == "causal")
        monkeypatch.setattr(selfcheck, "_ours", lambda *a: (r := right(*a)) | {"lse": r["lse"] - torch.inf})
        assert row("causal")["failure"].startswith("lse: 768 of 768 elements are not ")

    def test_a_second_call_that_differs(self, row, monkeypatch):
        """By less than the bound: launching again must not change a bit."""
        calls = itertools.count()
        right = selfcheck._ours
        monkeypatch.setattr(selfcheck, "_ours", lambda *a: (r := right(*a)) | {"out": r["out"] + next(calls) * 1e-7})
        found = row("causal")
        assert found["failure"] == "second call: out: expected the bits of the first call, got others"
        assert found["results"]["out"]["error"] <= found["results"]["out"]["bound"]

    def test_what_raises_is_a_row(self, row, monkeypatch, capsys):
        def raises(*args, **options):
            raise RuntimeError("no such instruction\nand a page of C++")

        monkeypatch.setattr(flash_attn_plus, "flash_attn_with_kvcache", raises)
        found = row("cache in pages")
        assert keys(found) == ROW and found["results"] == {} and found["error"] is None
        assert found["failure"] == "expected a result, got RuntimeError: no such instruction"
        assert conformance.main(["--device", "cpu", "--dtype", "float32", "--only", "cache", "--only", "rotary"]) == 1
        out = capsys.readouterr().out
        assert out.count(" passed ") == 4 and out.count("RuntimeError: no such instruction") == 9


class TestArguments:
    @pytest.mark.parametrize(
        "arguments, said",
        [
            (["--device", "no such"], "argument --device: expected a device, got 'no such': RuntimeError: "),
            (
                ["--import", "no_such_vendor"],
                "argument --import: expected a module, got 'no_such_vendor', which raised",
            ),
            (["--register", "CUDA"], "argument --register: dispatch_key: 'CUDA' is registered already"),
            (["--register", "NPU"], "argument --register: dispatch_key: expected one of XPU, PrivateUse1"),
            (["--only", "no such row"], "argument --only: expected a part of a row's name, got no such row"),
            (["--json", "/no/such/folder/file"], "argument --json: expected a file in a folder that exists, got '/no/"),
            (["--dtype", "float64"], "argument --dtype: invalid choice"),
        ],
    )
    def test_wrong_ones_are_told_before_anything_runs(self, arguments, said, capsys):
        with pytest.raises(SystemExit) as done:
            conformance.main(arguments)
        out, err = capsys.readouterr()
        assert done.value.code == 2 and out == "" and said in err

    def test_rows_of_the_dtypes_that_are_asked_for(self, capsys):
        assert conformance.main(["--device", "cpu", "--dtype", "float16", "--only", "rotary"]) == 0
        out = capsys.readouterr().out
        assert "passed: 4 of 4 rows" in out and "bfloat16" not in out
