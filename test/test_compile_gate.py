"""Every plan of plan.py compiles for its target: no spilled registers, no more shared memory than there is.

Needs no GPU: offline.py lets the real launch functions compile for any target. One process per target.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flash_attn_plus import plan

pytest.importorskip("triton", reason="the kernels are not compiled: Triton is not installed")

ROOT = Path(__file__).parent.parent

# Triton beside the installed one: `make` puts the oldest that is supported there.
OTHERS = sorted(path for path in (ROOT / "build").glob("triton-*") if (path / "triton").is_dir())

# All of it is a thousand kernels. A plain run compiles, in 16 bits: the forward for each target, and with options for
# sm_90; the backward for sm_90 and gfx942; and some of it for these two with the other Tritons.
asked_for = pytest.mark.skipif(os.environ.get("COMPILE_GATE") != "all", reason="takes minutes: COMPILE_GATE=all")

KIB = 1024
SHARED = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx90a": 64 * KIB,
    "gfx942": 64 * KIB,
    "gfx1100": 64 * KIB,
}

# What 16-bit products run on, and float32 ones as exact as float32 ("ieee") must not run on.
MATRIX = {
    "sm_80": "mma",
    "sm_86": "mma",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "sm_120": "mma",
    "gfx90a": "mfma",
    "gfx942": "mfma",
    "gfx1100": "wmma",
}

# Bytes of stack that a row may take where no tiles without spilling were found: (arch, itemsize, columns, kind). What
# the supported Tritons take at the most, not more. RDNA3 has no float32 matrix instruction, and LLVM unrolls the
# products whole.
SPILLS = {
    ("sm_80", 4, 256, "causal"): 8,
    ("sm_80", 4, 256, "short"): 32,
    ("sm_86", 4, 128, "causal"): 16,
    ("sm_90", 2, 128, "causal"): 8,
    ("sm_90", 2, 256, "short"): 8,
    ("sm_90", 2, 256, "small_pages"): 8,
    ("sm_90", 2, 256, "varlen"): 24,
    ("sm_90", 2, 256, "window"): 8,
    ("sm_90", 4, 64, "bias"): 16,
    ("sm_90", 4, 64, "options"): 8,
    ("sm_90", 4, 128, "causal"): 80,
    ("sm_90", 4, 128, "short"): 8,
    ("sm_90", 4, 128, "tf32"): 16,
    ("sm_90", 4, 256, "tf32"): 32,
    ("sm_90", 4, 256, "window"): 8,
    ("sm_100", 2, 128, "short"): 16,
    ("sm_100", 2, 256, "causal"): 72,
    ("sm_100", 4, 128, "causal"): 72,
    ("sm_100", 4, 256, "causal"): 16,
    ("sm_100", 4, 256, "options"): 40,
    ("sm_100", 4, 256, "short"): 16,
    ("sm_120", 4, 128, "causal"): 96,
    ("sm_120", 4, 256, "causal"): 8,
    ("sm_120", 4, 256, "options"): 24,
    ("sm_120", 4, 256, "short"): 8,
    ("gfx1100", 2, 256, "options"): 48,
    ("gfx1100", 4, 128, "causal"): 832,
    ("gfx1100", 4, 128, "options"): 920,
    ("gfx1100", 4, 128, "short"): 772,
    ("gfx1100", 4, 256, "causal"): 744,
    ("gfx1100", 4, 256, "options"): 832,
    ("gfx1100", 4, 256, "short"): 744,
}

# The same of the backward: (arch, itemsize, columns, kind, pass).
BACKWARD_SPILLS = {
    ("sm_80", 2, 64, "causal", "keys"): 8,
    ("sm_80", 2, 64, "options", "keys"): 16,
    ("sm_80", 2, 128, "bias", "keys"): 8,
    ("sm_80", 2, 128, "causal", "queries"): 8,
    ("sm_80", 2, 256, "causal", "keys"): 8,
    ("sm_80", 2, 256, "options", "queries"): 8,
    ("sm_80", 2, 256, "options", "keys"): 8,
    ("sm_80", 4, 64, "causal", "keys"): 16,
    ("sm_80", 4, 64, "options", "queries"): 8,
    ("sm_80", 4, 128, "bias", "keys"): 16,
    ("sm_80", 4, 128, "causal", "keys"): 16,
    ("sm_80", 4, 128, "options", "queries"): 8,
    ("sm_80", 4, 256, "causal", "queries"): 32,
    ("sm_86", 2, 64, "causal", "keys"): 8,
    ("sm_86", 2, 64, "options", "keys"): 16,
    ("sm_86", 2, 128, "causal", "queries"): 8,
    ("sm_86", 2, 128, "options", "keys"): 8,
    ("sm_86", 2, 256, "bias", "values"): 8,
    ("sm_86", 2, 256, "causal", "values"): 8,
    ("sm_86", 2, 256, "options", "queries"): 8,
    ("sm_86", 4, 64, "bias", "keys"): 8,
    ("sm_86", 4, 64, "causal", "keys"): 16,
    ("sm_86", 4, 64, "options", "queries"): 8,
    ("sm_90", 2, 64, "causal", "keys"): 16,
    ("sm_90", 2, 64, "options", "queries"): 16,
    ("sm_90", 2, 64, "varlen", "keys"): 8,
    ("sm_90", 2, 64, "window", "keys"): 8,
    ("sm_90", 2, 128, "causal", "keys"): 32,
    ("sm_90", 2, 128, "options", "queries"): 8,
    ("sm_90", 2, 128, "options", "keys"): 24,
    ("sm_90", 2, 128, "varlen", "keys"): 32,
    ("sm_90", 2, 128, "window", "keys"): 24,
    ("sm_90", 2, 256, "bias", "keys"): 24,
    ("sm_90", 2, 256, "bias", "bias"): 16,
    ("sm_90", 2, 256, "causal", "keys"): 16,
    ("sm_90", 2, 256, "causal", "values"): 56,
    ("sm_90", 2, 256, "options", "queries"): 48,
    ("sm_90", 2, 256, "options", "keys"): 120,
    ("sm_90", 2, 256, "varlen", "values"): 64,
    ("sm_90", 2, 256, "window", "values"): 8,
    ("sm_90", 4, 64, "bias", "bias"): 8,
    ("sm_90", 4, 64, "causal", "keys"): 16,
    ("sm_90", 4, 64, "options", "queries"): 8,
    ("sm_90", 4, 64, "window", "keys"): 8,
    ("sm_90", 4, 128, "bias", "keys"): 16,
    ("sm_90", 4, 128, "causal", "queries"): 8,
    ("sm_90", 4, 128, "options", "keys"): 32,
    ("sm_90", 4, 128, "tf32", "keys"): 16,
    ("sm_90", 4, 256, "options", "keys"): 32,
    ("sm_100", 4, 64, "bias", "keys"): 8,
    ("sm_100", 4, 128, "bias", "queries"): 16,
    ("sm_100", 4, 128, "causal", "queries"): 8,
    ("sm_100", 4, 256, "options", "keys"): 24,
    ("sm_120", 2, 64, "causal", "keys"): 120,
    ("sm_120", 2, 64, "options", "keys"): 8,
    ("sm_120", 2, 128, "options", "keys"): 32,
    ("sm_120", 2, 256, "bias", "queries"): 16,
    ("sm_120", 2, 256, "bias", "bias"): 24,
    ("sm_120", 2, 256, "causal", "values"): 80,
    ("sm_120", 2, 256, "options", "queries"): 32,
    ("sm_120", 2, 256, "options", "keys"): 8,
    ("sm_120", 2, 256, "options", "values"): 64,
    ("sm_120", 4, 64, "bias", "keys"): 16,
    ("sm_120", 4, 64, "bias", "bias"): 16,
    ("sm_120", 4, 64, "causal", "keys"): 16,
    ("sm_120", 4, 256, "bias", "keys"): 8,
    ("sm_120", 4, 256, "causal", "queries"): 32,
    ("sm_120", 4, 256, "options", "keys"): 32,
    ("gfx90a", 2, 128, "options", "keys"): 32,
    ("gfx90a", 2, 256, "causal", "keys"): 68,
    ("gfx942", 2, 256, "causal", "keys"): 72,
    ("gfx1100", 2, 64, "causal", "keys"): 152,
    ("gfx1100", 2, 64, "options", "queries"): 128,
    ("gfx1100", 2, 64, "options", "keys"): 12,
    ("gfx1100", 2, 128, "bias", "queries"): 344,
    ("gfx1100", 2, 128, "bias", "keys"): 484,
    ("gfx1100", 2, 128, "bias", "bias"): 112,
    ("gfx1100", 2, 128, "causal", "keys"): 524,
    ("gfx1100", 2, 128, "options", "queries"): 28,
    ("gfx1100", 2, 128, "options", "keys"): 432,
    ("gfx1100", 2, 256, "bias", "queries"): 928,
    ("gfx1100", 2, 256, "bias", "keys"): 928,
    ("gfx1100", 2, 256, "bias", "bias"): 992,
    ("gfx1100", 2, 256, "causal", "queries"): 784,
    ("gfx1100", 2, 256, "causal", "keys"): 1568,
    ("gfx1100", 2, 256, "causal", "values"): 660,
    ("gfx1100", 2, 256, "options", "queries"): 1008,
    ("gfx1100", 2, 256, "options", "keys"): 1044,
    ("gfx1100", 2, 256, "options", "values"): 24,
    ("gfx1100", 4, 64, "options", "keys"): 360,
    ("gfx1100", 4, 128, "bias", "queries"): 524,
    ("gfx1100", 4, 128, "bias", "keys"): 676,
    ("gfx1100", 4, 128, "bias", "bias"): 160,
    ("gfx1100", 4, 128, "causal", "queries"): 780,
    ("gfx1100", 4, 128, "causal", "keys"): 768,
    ("gfx1100", 4, 128, "options", "queries"): 716,
    ("gfx1100", 4, 128, "options", "keys"): 964,
    ("gfx1100", 4, 256, "bias", "queries"): 1564,
    ("gfx1100", 4, 256, "bias", "keys"): 2176,
    ("gfx1100", 4, 256, "bias", "values"): 836,
    ("gfx1100", 4, 256, "bias", "bias"): 1280,
    ("gfx1100", 4, 256, "causal", "queries"): 2456,
    ("gfx1100", 4, 256, "causal", "keys"): 2436,
    ("gfx1100", 4, 256, "causal", "values"): 848,
    ("gfx1100", 4, 256, "options", "queries"): 1672,
    ("gfx1100", 4, 256, "options", "keys"): 2196,
    ("gfx1100", 4, 256, "options", "values"): 792,
}


def compiled(arch: str, direction: str, kind: str, size: int, triton: Path | None) -> list[dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    paths = [str(triton)] if triton else []
    environment["PYTHONPATH"] = os.pathsep.join([*paths, str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "test" / "compile_gate.py"), arch, direction, str(size), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(arch: str, row: dict) -> None:
    name = f"{arch} {row['itemsize']} bytes, {row['dim']} columns, {row['kind']}, {row['pass']}, {row['plan']}"
    place = (arch, row["itemsize"], row["dim"], row["kind"])
    spill = SPILLS.get(place, 0) if row["pass"] == "forward" else BACKWARD_SPILLS.get((*place, row["pass"]), 0)
    assert row["stack"] <= spill, f"{name}: spills {row['stack']} bytes"
    assert row["shared"] <= SHARED[arch], f"{name}: {row['shared']} bytes of shared memory"
    assert row.get("again", True), f"{name}: launched again, it is not given what it takes"
    assert not row["serialized"], f"{name}: wgmma is serialised"
    if row["pass"] == "sink":
        return  # multiplies no matrices
    if row["itemsize"] == 2:
        assert row["matrix"] == MATRIX[arch], f"{name}: runs on {row['matrix'] or 'no matrix unit'}"
    elif row["kind"] == "tf32":
        assert row["matrix"], f"{name}: runs on no matrix unit"
    else:
        # AMD's float32 matrix instructions are exact.
        assert arch.startswith("gfx") or not row["matrix"], f"{name}: float32 is rounded to TF32"
        assert not row["chained"], f"{name}: one chain of roundings runs through all blocks"


def test_there_are_other_tritons():
    if not OTHERS:
        pytest.skip("no other Triton in build/triton-*, and none is compiled with: `make` puts one there")


def case(arch: str, size: int, kind: str, triton: Path | None, quick: bool):
    """Of both directions. What is not ``quick`` is compiled where asked for."""
    name = "-".join([arch, str(size), kind, *([triton.name] if triton else [])])
    return pytest.param(arch, size, kind, triton, id=name, marks=() if quick else asked_for)


def forward_cases() -> Iterator:
    for arch, size in itertools.product(plan.FORWARD, (2, 4)):
        for kind in ("causal", "options", "short"):  # the three columns of the table
            yield case(arch, size, kind, None, quick=size == 2 and (kind == "causal" or arch == "sm_90"))
        for triton in OTHERS:
            yield case(arch, size, "causal", triton, quick=size == 2 and arch in ("sm_90", "gfx942"))
    for kind, size in itertools.product(("window", "bias", "varlen", "paged", "small_pages"), (2, 4)):
        yield case("sm_90", size, kind, None, quick=size == 2 and kind == "small_pages")
    yield case("sm_90", 4, "tf32", None, quick=False)


@pytest.mark.parametrize("arch, size, kind, triton", list(forward_cases()))
def test_every_row_of_the_forward_compiles(arch, size, kind, triton):
    rows = compiled(arch, "forward", kind, size, triton)
    assert [row["dim"] for row in rows] == [dim for itemsize, dim in plan.FORWARD[arch] if itemsize == size]
    for row in rows:
        check(arch, row)
        if kind in ("paged", "small_pages") and size == 2:
            _, block_n, _, num_stages = row["plan"]
            # Else keys are waited for in their turn: loads whose addresses wait for the table are not started early.
            assert row["shared"] >= num_stages * 2 * block_n * row["dim"] * size, row


def backward_cases() -> Iterator:
    for arch, size in itertools.product(plan.BACKWARD, (2, 4)):
        yield case(arch, size, "causal", None, quick=size == 2 and arch in ("sm_90", "gfx942"))
        yield case(arch, size, "options", None, quick=size == 2 and arch == "sm_90")
        yield case(arch, size, "bias", None, quick=False)
        for triton in OTHERS:
            yield case(arch, size, "causal", triton, quick=(arch, size) == ("sm_90", 2))
    for kind, size in itertools.product(("window", "varlen"), (2, 4)):
        yield case("sm_90", size, kind, None, quick=False)
    yield case("sm_90", 4, "tf32", None, quick=False)


@pytest.mark.parametrize("arch, size, kind, triton", list(backward_cases()))
def test_every_row_of_the_backward_compiles(arch, size, kind, triton):
    rows = compiled(arch, "backward", kind, size, triton)
    found = [(row["dim"], row["kind"], row["pass"]) for row in rows]
    expected = []
    for (itemsize, dim), columns in plan.BACKWARD[arch].items():
        if itemsize == size:
            tiles = columns[kind in ("options", "bias")]
            passes = ["queries", "keys"] + ["values"] * (tiles.values is not None)
            passes += {"bias": ["bias"], "window": ["sink"]}.get(kind, [])
            expected += [(dim, kind, name) for name in passes]
    assert found == expected
    for row in rows:
        check(arch, row)


def rotary_cases() -> Iterator:
    for arch, size, kind in itertools.product(plan.FORWARD, (2, 4), ("dense", "varlen")):
        yield case(arch, size, kind, None, quick=size == 2 and arch in ("sm_90", "gfx942"))
    for triton in OTHERS:
        for arch, kind in itertools.product(("sm_90", "gfx942"), ("dense", "varlen")):
            yield case(arch, 2, kind, triton, quick=arch == "sm_90" and kind == "dense")


@pytest.mark.parametrize("arch, size, kind, triton", list(rotary_cases()))
def test_the_rotation_compiles(arch, size, kind, triton):
    rows = compiled(arch, "rotary", kind, size, triton)
    assert len(rows) == 16  # four head dimensions, two kinds of pairs, in place or not
    for row in rows:
        assert row["stack"] <= 16, row  # of masks: ptxas moves some predicates there, with registers to spare
        assert row["shared"] <= SHARED[arch], row
        assert row.get("again", True), f"launched again, it is not given what it takes: {row}"


# Kinds of test/compile_gate.py: one query and 4 in pages or not, with options, and many rows in a tile.
DECODE_KINDS = ("plain", "paged", "pages_64", "small_pages", "window", "options", "rows")

# As SPILLS, by kind, of any of its kernels; 16 bytes of masks everywhere. A slot that goes through several sequences
# has more to keep than one with a sequence of its own.
DECODE_SPILLS = {
    ("sm_80", 2, 256): {"rows": 24},
    ("sm_100", 2, 64): {"rows": 56},
    ("sm_100", 2, 256): {"rows": 32},
    ("sm_120", 2, 64): {"rows": 72},
    ("gfx1100", 2, 128): {"rows": 120},
    ("gfx1100", 2, 256): {
        "plain": 120,
        "paged": 60,
        "pages_64": 60,
        "small_pages": 60,
        "window": 124,
        "options": 304,
        "rows": 224,
    },
    ("gfx1100", 4, 128): {
        "plain": 56,
        "paged": 76,
        "pages_64": 76,
        "small_pages": 76,
        "window": 68,
        "options": 84,
        "rows": 56,
    },
    ("gfx1100", 4, 256): {
        "plain": 936,
        "paged": 892,
        "pages_64": 892,
        "small_pages": 896,
        "window": 1012,
        "options": 944,
        "rows": 936,
    },
}


def starts_early(arch: str) -> bool | None:
    """What ``waits`` is where kernels start early (kernels/early.py), and where they do not."""
    return True if arch.startswith("sm_") and int(arch[3:]) >= 90 else None


def decode_cases() -> Iterator:
    for arch, size, kind in itertools.product(plan.DECODE, (2, 4), DECODE_KINDS):
        quick = (arch == "sm_90" and kind in ("plain", "small_pages")) or (arch == "gfx942" and kind == "plain")
        yield case(arch, size, kind, None, quick=size == 2 and quick)
    for triton in OTHERS:
        for arch, kind in itertools.product(("sm_90", "gfx942"), DECODE_KINDS):
            yield case(arch, 2, kind, triton, quick=(arch, kind) == ("sm_90", "plain"))


@pytest.mark.parametrize("arch, size, kind, triton", list(decode_cases()))
def test_every_row_of_decoding_compiles(arch, size, kind, triton):
    rows = compiled(arch, "decode", kind, size, triton)
    passes = ["decode", "combine", "decode, equal", "combine, equal", "decode, whole", "append", "append, rotated"]
    assert [(row["dim"], row["pass"]) for row in rows] == list(itertools.product((64, 128, 256), passes))
    for row in rows:
        assert row["stack"] <= max(16, DECODE_SPILLS.get((arch, size, row["dim"]), {}).get(kind, 0)), row
        assert row["shared"] <= SHARED[arch], row
        assert row.get("again", True), f"launched again, it is not given what it takes: {row}"
        assert row["waits"] is starts_early(arch), f"it may read what is yet to be written: {row}"
        if not row["pass"].startswith("decode"):
            continue
        block_n, _, num_stages, *_ = row["plan"]
        if size == 2:
            assert row["matrix"] in ("mma", MATRIX[arch]), row
        elif arch.startswith("sm_"):
            assert not row["matrix"] and not row["chained"], f"float32 is rounded to TF32, or in one chain: {row}"
        if arch.startswith("sm_"):
            # Keys and values are on their way while others are computed with: Triton gives that up without a word where
            # it does not find out how they are aligned.
            tiles = 2 * block_n * row["dim"] * size
            assert row["shared"] >= (num_stages - 1) * tiles, f"no tiles in flight: {row}"
        if row["matrix"] == "mma":
            # To compare maxima and to exchange weights; 3 more where sums of weights are exchanged, too.
            most = 4 if row["constants"]["SUMS"] > 1 else 7
            assert row["barriers"] <= most, f"threads meet too often for a block of keys: {row}"


def combine_cases() -> Iterator:
    for arch, size in itertools.product(plan.DECODE, (2, 4)):
        yield case(arch, size, "plain", None, quick=(arch, size) == ("sm_90", 2))


@pytest.mark.parametrize("arch, size, kind, triton", list(combine_cases()))
def test_combining_compiles(arch, size, kind, triton):
    rows = compiled(arch, "combine", kind, size, triton)
    assert [row["dim"] for row in rows] == [64, 128, 256]
    for row in rows:
        assert row["stack"] == 0 and row["shared"] <= SHARED[arch] and row.get("again", True), row
        assert row["waits"] is starts_early(arch), f"it may read what is yet to be written: {row}"
