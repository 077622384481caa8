"""``python -m flash_attn_plus.conformance``: its table, its JSON, and that every kind of row can fail."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flash_attn_plus
from flash_attn_plus import conformance, device, selfcheck
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


RESULTS = [
    *((selfcheck, "all options", result) for result in ("out", "lse", "dq", "dk", "dv", "dsink", "dbias")),
    *((selfcheck, "packed, in one tensor", result) for result in ("out", "lse", "dq", "dk", "dv")),
    *((CacheCheck, "cache in pages", result) for result in ("out", "lse", "new k", "new v", "other rows")),
    (CacheCheck, "cache: numbered, left padding", "new k"),
    *((RotaryCheck, "rotary: sliced, d 59", result) for result in ("out", "dx")),
    (RotaryCheck, "rotary in place, packed", "out"),
    *((CombineCheck, name, result) for name in ("combine", "merge_states") for result in ("out", "lse")),
]


def row_of(name: str, dtype: str) -> dict:
    """Without the program around it."""
    (check,) = (check for check in conformance._checks([dtype], None) if check.name == name)
    return conformance._run(check, torch.device("cpu"))


class TestFailures:
    """Each breaks one thing, and names the row that must find it."""

    @pytest.fixture
    def row(self, capsys, tmp_path):
        """The row of that name, which is run alone."""

        def run(name: str, dtype: str = "float32") -> dict:
            file = tmp_path / "report.json"
            options = ["--device", "cpu", "--dtype", dtype, "--only", name, "--json", str(file)]
            code = conformance.main(options)
            self.out = capsys.readouterr().out
            (row,) = (row for row in json.loads(file.read_text())["rows"] if row["check"] == name)
            assert code == (0 if row["passed"] else 1)
            return row

        return run

    @pytest.mark.parametrize("of, name, result", RESULTS, ids=str)
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

    @pytest.mark.parametrize("of, name, result", RESULTS, ids=str)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_a_wrong_dtype_and_a_missing_result(self, of, name, result, dtype, monkeypatch):
        """A wider one is as wrong as a narrower one, whose larger bound is not what counts."""
        right = of._ours
        bound = row_of(name, dtype)["results"][result]["bound"]
        wanted = "float32" if result == "lse" else dtype
        for other in {torch.bfloat16, torch.float32, torch.float64} - {getattr(torch, wanted)}:
            monkeypatch.setattr(of, "_ours", lambda *a, to=other: (r := right(*a)) | {result: r[result].to(to)})
            found = row_of(name, dtype)
            assert found["failure"] == f"{result}: expected torch.{wanted}, got {other}"
            assert found["results"][result] == {"error": None, "bound": bound} and found["worst"] == result
        without = [lambda r: r | {result: None}, lambda r: {key: x for key, x in r.items() if key != result}]
        for missing in without:
            monkeypatch.setattr(of, "_ours", lambda *a, missing=missing: missing(right(*a)))
            assert row_of(name, dtype)["failure"] == f"{result}: expected a result, got none"

    @pytest.mark.parametrize(
        "later", [lambda x: x.double(), lambda x: x[:1], lambda x: None], ids=["dtype", "shape", "none"]
    )
    def test_a_second_call_of_another_kind(self, later, monkeypatch):
        right, calls = selfcheck._ours, itertools.count()

        def ours(*args):
            results = right(*args)
            return results | {"dq": later(results["dq"])} if next(calls) else results

        monkeypatch.setattr(selfcheck, "_ours", ours)
        said = "second call: expected results of the first call's dtypes and shapes, got others"
        assert row_of("causal", "float32")["failure"] == said

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize(
        "name, argument, without",
        [
            ("cache: numbered, left padding", 9, None),
            ("cache: sliced, softcap", 14, 0.0),
            ("cache: queries see all", 12, True),
            ("cache: several queries", 12, False),
        ],
    )
    def test_an_option_that_is_left_out(self, name, argument, without, dtype, monkeypatch):
        right = flash_attn_plus.flash_attn_with_kvcache

        def ours(*args, **options):
            return right(*args[:argument], without, *args[argument + 1 :], **options)

        assert row_of(name, dtype)["passed"]
        monkeypatch.setattr(flash_attn_plus, "flash_attn_with_kvcache", ours)
        assert re.match("(out|lse): expected ", row_of(name, dtype)["failure"])

    @pytest.mark.parametrize("sequence", [0, 1])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_a_key_that_a_split_loses(self, dtype, sequence, monkeypatch):
        """The newest, and those at both sides of where a split can end."""
        right = flash_attn_plus.flash_attn_with_kvcache
        lengths = (600, 700)
        assert row_of("cache: many keys, split", dtype)["passed"]
        for key in (0, 63, 64, 191, 192, 255, 256, 319, 320, 447, 448, 511, 512, 575, 576, lengths[sequence]):

            def loses(q, k_cache, v_cache, *args, key=key, **options):
                right(q, k_cache, v_cache, *args, **options)  # writes the new ones
                hidden = k_cache.clone()
                hidden[sequence, key] = -100 * q[sequence, 0].unflatten(0, (2, 2)).mean(1)
                seen = torch.tensor(lengths, dtype=torch.int32) + 1
                return right(q, hidden, v_cache, None, None, None, None, seen, *args[5:], **options)

            monkeypatch.setattr(flash_attn_plus, "flash_attn_with_kvcache", loses)
            assert re.match("(out|lse): expected ", row_of("cache: many keys, split", dtype)["failure"] or ""), key

    def test_what_only_float32_shows(self, monkeypatch, tmp_path):
        """By the bounds of 16 bits a log-sum-exp may be off by 0.01."""
        right, file = selfcheck._ours, tmp_path / "report.json"
        monkeypatch.setattr(selfcheck, "_ours", lambda *a: (r := right(*a)) | {"lse": r["lse"] + 0.01})
        assert conformance.main(["--device", "cpu", "--only", "ALiBi", "--json", str(file)]) == 1
        passed = {row["dtype"]: row["passed"] for row in json.loads(file.read_text())["rows"]}
        assert passed == {"bfloat16": True, "float32": False}

    def test_what_exits_is_a_row(self, row, monkeypatch):
        monkeypatch.setattr(selfcheck, "_ours", lambda *args: sys.exit(0))
        assert row("causal")["failure"] == "expected a result, got SystemExit: 0"

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
            (["--only", "no such row"], "argument --only: expected a part of a row's name, got 'no such row'"),
            (
                ["--only", "rotary", "--only", "no such"],
                "argument --only: expected a part of a row's name, got 'no such'",
            ),
            (["--only", ""], "argument --only: expected a part of a row's name, got ''"),
            (["--json", "/no/such/folder/file"], "argument --json: expected a file to write, got '/no/such/folder/fi"),
            (["--json", "/"], "argument --json: expected a file to write, got '/': IsADirectoryError: "),
            (["--json", ""], "argument --json: expected a file to write, got '.': IsADirectoryError: "),
            (["--json", "/dev/null/file"], "argument --json: expected a file to write, got '/dev/null/file': NotADir"),
            (["--json", "0" * 300], "argument --json: expected a file to write, got '000"),
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

    def test_a_module_that_exits(self, monkeypatch, capsys, tmp_path):
        (tmp_path / "vendor_that_exits.py").write_text("raise SystemExit(0)")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(SystemExit) as done:
            conformance.main(["--device", "cpu", "--import", "vendor_that_exits"])
        out, err = capsys.readouterr()
        assert done.value.code == 2 and out == "" and "'vendor_that_exits', which raised SystemExit: 0" in err

    def test_a_key_without_a_device(self, monkeypatch, capsys):
        """The CPU is no device of that key: it is not tested in its place."""
        registered = []
        monkeypatch.setattr(flash_attn_plus, "register_device", registered.append)
        monkeypatch.setattr(device, "accelerators", list)
        with pytest.raises(SystemExit) as done:
            conformance.main(["--register", "XPU", "--only", "rotary"])
        out, err = capsys.readouterr()
        assert done.value.code == 2 and out == "" and registered == ["XPU"]
        assert "argument --register: expected a device of XPU, and PyTorch finds none: --device?" in err
        assert conformance.main(["--register", "XPU", "--device", "cpu", "--dtype", "float32", "--only", "merge"]) == 0

    @pytest.mark.parametrize("key", [np.array(["XPU", "CUDA"]), np.array(["XPU"]), ["XPU"], None, 3], ids=repr)
    def test_a_key_that_is_no_string(self, key):
        with pytest.raises(ValueError, match=r"^dispatch_key: expected one of XPU, PrivateUse1, MTIA, HPU, got "):
            flash_attn_plus.register_device(key)


class TestAReportOf:
    @pytest.fixture
    def rows(self, monkeypatch, tmp_path):
        """What is in the file when the second row runs."""
        self.file, self.seen, right = tmp_path / "report.json", [], conformance._run
        self.file.write_text("of an earlier run" * 1000)

        def run(check, on):
            self.seen.append(json.loads(self.file.read_text()))
            if len(self.seen) == 2:
                raise KeyboardInterrupt
            return right(check, on)

        monkeypatch.setattr(conformance, "_run", run)
        return lambda: conformance.main(["--device", "cpu", "--only", "rotary", "--json", str(self.file)])

    def test_an_interrupted_table(self, rows):
        with pytest.raises(KeyboardInterrupt):
            rows()
        assert [len(report["rows"]) for report in self.seen] == [0, 1]
        report = json.loads(self.file.read_text())
        assert keys(report) == REPORT and report["passed"] is None and len(report["rows"]) == 1
        assert report["rows"][0]["passed"] and report["seconds"] > 0

    def test_a_pipe(self):
        """It holds one report, not one after every row."""
        end, into = os.pipe()
        command = [sys.executable, "-m", "flash_attn_plus.conformance", "--device", "cpu", "--dtype", "float32"]
        command += ["--only", "combine", "--only", "merge", "--json", f"/dev/fd/{into}"]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, pass_fds=[into])
        os.close(into)
        with open(end) as file:
            report = json.loads(file.read())
        assert done.returncode == 0 and report["passed"] is True and len(report["rows"]) == 2
