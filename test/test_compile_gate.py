"""Every plan of plan.py compiles for its target: no spilled registers, no more shared memory than there is.

Needs no GPU: offline.py lets the real launch functions compile for any target. One process per target.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attn_plus import plan

pytest.importorskip("triton", reason="the kernels are not compiled: Triton is not installed")

ROOT = Path(__file__).parent.parent

# Triton beside the installed one: `make` puts the oldest that is supported there.
OTHERS = sorted(path for path in (ROOT / "build").glob("triton-*") if (path / "triton").is_dir())

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


def compiled(arch: str, kinds: tuple[str, ...], triton: Path | None = None) -> list[dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    paths = [str(triton)] if triton else []
    environment["PYTHONPATH"] = os.pathsep.join([*paths, str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "test" / "compile_gate.py"), arch, *kinds]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(arch: str, row: dict) -> None:
    name = f"{arch} {row['itemsize']} bytes, {row['dim']} columns, {row['kind']}, {row['plan']}"
    spill = SPILLS.get((arch, row["itemsize"], row["dim"], row["kind"]), 0)
    assert row["stack"] <= spill, f"{name}: spills {row['stack']} bytes"
    assert row["shared"] <= SHARED[arch], f"{name}: {row['shared']} bytes of shared memory"
    assert not row["serialized"], f"{name}: wgmma is serialised"
    if row["itemsize"] == 2:
        assert row["matrix"] == MATRIX[arch], f"{name}: runs on {row['matrix'] or 'no matrix unit'}"
    elif row["kind"] == "tf32":
        assert row["matrix"], f"{name}: runs on no matrix unit"
    else:
        # AMD's float32 matrix instructions are exact.
        assert arch.startswith("gfx") or not row["matrix"], f"{name}: float32 is rounded to TF32"
        assert not row["chained"], f"{name}: one chain of roundings runs through all keys"


@pytest.mark.parametrize("arch", plan.FORWARD)
def test_every_row_compiles(arch):
    kinds = ("causal", "options", "short")  # the three columns of the table
    rows = compiled(arch, kinds)
    assert len(rows) == len(kinds) * len(plan.FORWARD[arch])
    for row in rows:
        check(arch, row)


@pytest.mark.parametrize("kind", ["window", "bias", "varlen", "tf32"])
def test_every_kind_compiles(kind):
    rows = compiled("sm_90", (kind,))
    assert rows
    for row in rows:
        check("sm_90", row)


@pytest.mark.skipif(not OTHERS, reason="no other Triton in build/triton-*: `make` puts one there")
@pytest.mark.parametrize("arch", plan.FORWARD)
@pytest.mark.parametrize("triton", OTHERS, ids=lambda path: path.name)
def test_every_row_compiles_with_other_tritons(arch, triton):
    rows = compiled(arch, ("causal",), triton)
    assert len(rows) == len(plan.FORWARD[arch])
    for row in rows:
        check(arch, row)
