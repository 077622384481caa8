"""The report on flag_gems: its verdicts come out as they must, and the documents name its cases.

No flag_gems runs here: a stand-in is right or wrong on purpose (flag_gems_stand_in.py).
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flash_attn_plus

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = ROOT / "benchmark"
PAGES = [ROOT / "docs" / name for name in ("flaggems_analysis_report.md", "flaggems_analysis_report_en.md")]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    return importlib.import_module("flag_gems_report")


@pytest.fixture
def run(tmp_path):
    """Runs cases on a stand-in: (exit status, a row for each case, what it printed)."""
    package = tmp_path / "path" / "flag_gems"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "test" / "flag_gems_stand_in.py", package / "__init__.py")

    def runs(cases: str, faults: str = "", *arguments: str, path: Path | None = package.parent):
        found = Path(flash_attn_plus.__file__).parent.parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, (found, path))))}
        environment.pop("TRITON_INTERPRET", None)
        out = tmp_path / "out.json"
        command = [sys.executable, BENCHMARK / "flag_gems_report.py", "--device=cpu", "--commit=", "--jobs=2"]
        command += ["--cases", cases, "--json", out, "--csv", tmp_path / "out.csv", *arguments]
        environment["STAND_IN"] = faults
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        rows = {row["case"]: row for row in json.loads(out.read_text())["cases"]} if out.exists() else {}
        return done.returncode, rows, done.stdout + done.stderr

    return runs


def test_without_flag_gems_it_says_so(run):
    if importlib.util.find_spec("flag_gems"):
        pytest.skip("flag_gems is installed")
    status, _, said = run("dense_gqa", path=None)
    assert status == 2 and "flag_gems is not installed" in said


def test_a_flag_gems_that_does_not_import_is_no_result(run):
    status, rows, said = run("dense_gqa", "no device")
    assert status == 2 and rows == {}
    assert "does not import: RuntimeError: No device" in said


def test_what_is_right_is_right_and_nothing_wrong_is_reproduced(run, tmp_path):
    right = ("sdpa_gqa", "dense_gqa", "dense_causal", "varlen_causal", "varlen_paged")
    wrong = ("sdpa_causal_alignment", "dense_window_left", "varlen_window_left", "libentry_cache_slice")
    status, rows, said = run(",".join((*right, *wrong, "cost_scale", "sdpa_lse_base_2")))
    assert status == 0, said
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert [verdicts[name] for name in right] == ["as reported"] * len(right)
    assert [verdicts[name] for name in wrong] == ["not reproduced"] * len(wrong)
    assert verdicts["cost_scale"].startswith("not run: flag_gems has no flash_varlen_fwd_kernel")
    assert verdicts["sdpa_lse_base_2"] == "as reported"
    for name in right:
        assert float(rows[name]["flag_gems relative"]) < 1e-3 and float(rows[name]["ours relative"]) < 1e-3
    assert "| dense_gqa | right: GQA |" in said
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == list(rows)


def test_what_is_wrong_as_predicted_is_told_from_what_is_wrong_otherwise(run):
    cases = "sdpa_causal_alignment,dense_window_left,dense_scale_zero,dense_gqa"
    _, rows, _ = run(cases, "alignment,dropped window")
    assert [row["verdict"] for row in rows.values()] == ["as reported", "as reported", "not reproduced", "as reported"]
    _, rows, _ = run(cases, "other")
    assert [row["verdict"] for row in rows.values()] == [
        "not reproduced",
        *["wrong, not as predicted"] * 2,
        "wrong, reported as right",
    ]
    assert all(float(row["ours max abs"]) < 1e-2 for row in rows.values())


def test_writing_outside_is_seen_though_the_values_are_right(run):
    _, rows, _ = run("dense_splitkv_contiguous,dense_gqa", "outside")
    # That it writes outside is as reported, but not that all is there.
    assert rows["dense_splitkv_contiguous"]["verdict"] == "wrong, not as predicted"
    assert rows["dense_splitkv_contiguous"]["note"] == "1 elements outside its memory written"
    assert rows["dense_gqa"]["verdict"] == "wrong, reported as right"


def test_one_that_raises_crashes_or_hangs_takes_nothing_with_it(run):
    cases = "sdpa_gqa,dense_gqa,dense_causal,dense_softcap,dense_window_wide,dense_alibi,dense_head_dim_16"
    status, rows, said = run(cases, "raises,crashes,hangs", "--timeout=30")
    assert status == 0, said
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts["sdpa_gqa"] == "raised AssertionError: only head dimension 7"
    assert verdicts["dense_causal"] == "crashed with status -6"
    assert verdicts["dense_window_wide"] == "timed out after 30 s"
    assert [verdicts[name] for name in ("dense_gqa", "dense_softcap", "dense_alibi")] == ["as reported"] * 3
    assert verdicts["dense_head_dim_16"] == "not reproduced"


def test_another_exception_than_the_reported_one_is_told(report):
    cases = [case for case in report.CASES.values() if case.claim == "raises"]
    assert len(cases) == 10 and all(case.raises for case in cases)
    for case in cases:
        expected = type(case.raises, (Exception,), {})("so")
        assert report.row_of(case, report.Evidence(raised=expected))["verdict"].startswith("as reported: raised")
        other = report.row_of(case, report.Evidence(raised=MemoryError("no memory")))["verdict"]
        assert other == "raised MemoryError: no memory"


def test_wrong_in_any_way_is_as_reported_nowhere(report):
    import torch

    right, other = torch.ones(3), torch.full((3,), 2.0)
    found = {"theirs": {"out": other}, "right": {"out": right}, "bounds": {"out": 0.1}}

    def said(name: str, **options) -> str:
        return report.row_of(report.CASES[name], report.Evidence(**{**found, **options}))["verdict"]

    assert said("dense_gqa") == "wrong, reported as right"
    for name in ("sdpagrad_tuned", "dense_window_left"):
        assert said(name) == "wrong, unspecified how"
        assert said(name, predicted={"out": other}) == "as reported"
        assert said(name, predicted={"out": right + 2}) == "wrong, not as predicted"
        assert said(name, predicted={"out": other}, outside=1) == "wrong, not as predicted"
        assert said(name, predicted={"out": other}, outside=1, predicted_outside=1) == "as reported"
        assert said(name, predicted={"out": other}, predicted_outside=1) == "wrong, not as predicted"
        assert said(name, theirs={}, predicted={"out": other}) == "wrong, not as predicted"
    # One element is left to chance, and only that one.
    chance = {"out": torch.tensor([True, False, False])}
    one = torch.tensor([5.0, 2.0, 2.0])
    assert said("dense_window_left", predicted={"out": one}, unspecified=chance) == "as reported"
    assert said("dense_window_left", predicted={"out": one.flip(0)}, unspecified=chance) == "wrong, not as predicted"
    # The rounding of greater values is greater, and a NaN is equal to a NaN.
    great, nan = {"out": torch.full((3,), 100.0)}, {"out": torch.full((3,), torch.nan)}
    assert said("dense_window_left", theirs={"out": torch.full((3,), 105.0)}, predicted=great) == "as reported"
    assert said("dense_window_left", theirs=nan, predicted=nan) == "as reported"
    assert said("dense_window_left", theirs=nan, predicted=great) == "wrong, not as predicted"
    broken = RuntimeError("an illegal memory access was encountered")
    assert said("sdpagrad_tuned", raised=broken).startswith("broken, unspecified how: raised RuntimeError")
    assert said("dense_window_left", raised=broken).startswith("raised RuntimeError")


def test_ours_that_is_wrong_fails(report):
    import torch

    right, off = torch.ones(3, dtype=torch.float64), torch.full((3,), 1.5)
    evidence = report.Evidence(theirs={"out": right}, mine={"out": off}, right={"out": right}, bounds={"out": 0.1})
    row = report.row_of(report.CASES["dense_gqa"], evidence)
    assert row["verdict"] == "as reported; OURS IS WRONG"
    assert (row["flag_gems max abs"], row["ours max abs"]) == ("0.0e+00", "5.0e-01")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_documents_name_exactly_the_cases(report, page):
    named = set(re.findall(r"`([a-z0-9]+_[a-z0-9_]+)`", page.read_text(encoding="utf-8")))
    kinds = {case.name.partition("_")[0] for case in report.CASES.values()}
    assert {name for name in named if name.partition("_")[0] in kinds} == set(report.CASES)


def test_the_peer_has_a_backward_where_it_is_right_only(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    bench, peers = importlib.import_module("attention"), importlib.import_module("peers")
    package = tmp_path / "flag_gems"
    package.mkdir()
    shutil.copy(ROOT / "test" / "flag_gems_stand_in.py", package / "__init__.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "flag_gems"]:  # the real one
        monkeypatch.delitem(sys.modules, name)
    gems = peers.PEERS["gems"]
    assert gems.absence() is None
    records = []
    for problem in bench.CPU[1:]:
        clock = lambda run: (run(), 1e-3)[1]  # noqa: E731
        records += bench.measure(problem, [gems], "cpu", backward=True, rounds=1, clock=clock)
    found = {(r["problem"], r["what"]): r["TFLOP/s"] for r in records if r["what"] != "forward + backward"}
    directions = {problem.name: [what for name, what in found if name == problem.name] for problem in bench.CPU[1:]}
    assert all(isinstance(value, float) for value in found.values()), found
    dense = [problem for problem in bench.CPU[1:] if not problem.varlen]
    for problem in bench.CPU[1:]:
        assert directions[problem.name] == (["forward", "backward"] if problem in dense else ["forward"])
    assert gems.call(bench.CPU[0]).backward is False
    monkeypatch.delitem(sys.modules, "flag_gems", raising=False)
