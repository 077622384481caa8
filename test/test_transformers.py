"""transformers through the front door: a client that looks for flash-attn in many ways before it calls it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_attn_plus

SCRIPT = Path(__file__).with_name("transformers_llama.py")


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_llama_computes_and_trains_as_on_sdpa():
    """In a process of its own, where nothing was imported before."""
    path = os.pathsep.join([str(Path(flash_attn_plus.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "flash_attn_plus.as_flash_attn", str(SCRIPT), "cuda"]
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    # Dense without padding, packed with it.
    assert {"flash_attn_plus::fwd", "flash_attn_plus::varlen_fwd"} <= set(result["operators"])
    for errors in (result["full"], result["padded"]):
        assert errors["flash_attention_2"] <= 2 * errors["sdpa"], errors
    ours, sdpa = (result["losses"][name] for name in ("flash_attention_2", "sdpa"))
    assert ours[-1] < 0.8 * ours[0]  # it learns
    assert max(abs(a - b) / b for a, b in zip(ours, sdpa, strict=True)) < 0.01, (ours, sdpa)
