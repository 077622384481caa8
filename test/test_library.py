"""library.py: what a call's signature remembers, and devices that register later."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from flash_attn_plus import library


def fresh(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def signature(*args) -> tuple:
    return library.signature(args)


class TestSignature:
    """Whatever checks or kernels decide by must be in it."""

    x = torch.zeros(2, 8, 4, 16)

    def test_values_are_not_in_it(self):
        assert signature(self.x, True) == signature(torch.ones(2, 8, 4, 16), True)

    @pytest.mark.parametrize(
        "other",
        [
            torch.zeros(2, 8, 4, 17),
            torch.zeros(2, 4, 8, 16).transpose(1, 2),
            torch.zeros(2, 8, 4, 16, dtype=torch.float64),
            torch.zeros(2 * 8 * 4 * 16 + 1)[1:].view(2, 8, 4, 16),
            torch._neg_view(torch.zeros(2, 8, 4, 16)),
        ],
        ids=["shape", "strides", "dtype", "alignment", "negative"],
    )
    def test_tells_apart(self, other):
        assert signature(self.x, True) != signature(other, True)

    def test_tells_devices_apart(self):
        class Elsewhere(torch.Tensor):
            device = torch.device("cuda", 1)

        assert signature(self.x) != signature(self.x.as_subclass(Elsewhere))

    def test_options_are_in_it(self):
        assert signature(self.x, 0.5) != signature(self.x, 0.25)
        assert signature(self.x, None) != signature(self.x, self.x)
        assert signature(self.x, 8) != signature(self.x, 8.0)

    def test_the_precision_of_float32_is_in_it(self):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            exact = signature(self.x), signature(self.x.half())
            torch.set_float32_matmul_precision("high")
            assert signature(self.x) != exact[0] and signature(self.x.half()) == exact[1]
        finally:
            torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize(
        "x",
        [x.to_sparse(), x[:0], torch._efficientzerotensor(2, 8), x.to("meta"), torch._to_functional_tensor(x)],
        ids=["sparse", "empty", "zeros without memory", "meta", "wrapper"],
    )
    def test_what_cannot_be_told_apart_is_remembered_by_nobody(self, x):
        assert signature(x) is None


class TestMemory:
    x = torch.zeros(1, 3, 1, 8)

    @pytest.fixture(autouse=True)
    def remembered(self) -> dict:
        library._remembered["fwd"].clear()
        return library._remembered["fwd"]

    def call(self, **options) -> None:
        torch.ops.flash_attn_plus.fwd(self.x, self.x, self.x, **options)

    def test_is_bounded(self, remembered, monkeypatch):
        monkeypatch.setattr(library, "_MOST_REMEMBERED", 3)
        sizes = []
        for n in range(8):
            self.call(softmax_scale=0.1 * n)
            sizes.append(len(remembered))
        assert max(sizes) == 3

    def test_nan_is_not_remembered(self, remembered):
        self.call(softmax_scale=float("nan"))
        assert not remembered


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
library._remembered["fwd"]["what ran there"] = None
library.register_device("PrivateUse1")
assert not library._remembered["fwd"]
assert has("PrivateUse1") and library.BACKENDS["PrivateUse1"] == "gpu"
for key in ("PrivateUse1", "CUDA", "CPU", "Meta", "AutogradCPU", "xpu"):
    with pytest.raises(ValueError, match="dispatch_key"):
        library.register_device(key)
assert not has("XPU") and "XPU" not in library.BACKENDS
library.register_device("XPU")
""")
