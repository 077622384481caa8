"""library.py: settings that calls depend on, and devices that register later."""

from __future__ import annotations

import subprocess
import sys

import pytest


def fresh(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "torch.set_float32_matmul_precision('high')",
    ],
)
def test_every_way_to_set_the_precision_of_float32(setting):
    fresh(f"import torch, flash_attn_plus as f; {setting}; x = torch.randn(1, 4, 1, 8); f.flash_attn_func(x, x, x)")


def test_a_vendor_registers_its_key():
    fresh("""
import pytest, torch
from flash_attn_plus import library
has = lambda key: torch._C._dispatch_has_kernel_for_dispatch_key("flash_attn_plus::varlen_fwd", key)
assert not has("PrivateUse1")
library._memories["fwd"].runs["what ran there"] = None
library.register_device("PrivateUse1")
assert not library._memories["fwd"].runs
assert has("PrivateUse1") and library.BACKENDS["PrivateUse1"] == "gpu"
for key in ("PrivateUse1", "CUDA", "CPU", "Meta", "AutogradCPU", "xpu"):
    with pytest.raises(ValueError, match="dispatch_key"):
        library.register_device(key)
assert not has("XPU") and "XPU" not in library.BACKENDS
library.register_device("XPU")
""")
