"""A vendor's device, of which PyTorch and Triton know by plugins: what runs there before and after it is registered.

vendor_device.py stands in for it, with host memory behind its tensors; Triton's interpreter computes on that memory as
it is. Each test has a process of its own: PyTorch renames its device once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration as backends

import flash_attn_plus
from flash_attn_plus import device, library, plan

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(flash_attn_plus.__file__).parent.parent

needs_a_python_device = pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices that are written in Python",
)

START = """
import sys, torch, vendor_device, flash_attn_plus
from flash_attn_plus import library
"""

# Small ones of every kind: what each kernel does to numbers is held elsewhere, here that it is what runs.
CHECKS = """
import interpreter
interpreter.install()
from flash_attn_plus.conformance_cases import CacheCheck, CombineCheck, RotaryCheck
from flash_attn_plus.selfcheck import Check
half, single, small = torch.float16, torch.float32, dict(head_dim=16, seqlen_q=5, seqlen_k=7, batch=1)
CHECKS = [
    Check("dense", single, options="alibi sink bias lse", **small),
    Check("one tensor", half, heads=2, heads_k=2, layout="packed", head_dim=16, seqlen_q=5, seqlen_k=5, batch=1),
    Check("packed", single, head_dim=16, lengths=(3, 0, 2), window_left=2),
    Check("packed, one tensor", single, heads=2, heads_k=2, layout="packed", head_dim=16, lengths=(3, 0, 2)),
    CacheCheck("cache", half, lengths=(5, 3), capacity=9, head_dim=16, rotary_dim=16),
    CacheCheck("pages", torch.bfloat16, lengths=(5, 0), seqlen_q=2, seqlen_new=2, head_dim=16, page_size=4),
    RotaryCheck("rotary", half, head_dim=16, rotary_dim=16, seqlen=3),
    RotaryCheck("in place", half, head_dim=16, rotary_dim=16, seqlen=3, in_place=True),
    CombineCheck("combine", single, head_dim=4),
]
on = torch.empty(1, device="vendor").device
def check():
    for each in CHECKS:
        for result in each.run(on, again=True).results:
            assert not result.failure, (each.name, result)
"""


# Without what Python does at its end: PyTorch's thread of the device, which ran backward, may still be letting go of
# what was saved for it, and takes the process down when it asks for an interpreter that is gone.
RUN = """
import os, sys, traceback
code = 0
try:
    exec(compile(sys.argv[1], "part of a test", "exec"), {"__name__": "__main__"})
except SystemExit as left:
    code = left.code if isinstance(left.code, int | None) else 1
except BaseException:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code or 0)
"""


def run(*parts: str, interpret: bool = False) -> str:
    """What a process of its own prints."""
    paths = os.pathsep.join([str(SOURCE), str(ROOT / "test")])
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Where there is a GPU, Triton has a driver, which is not the stand-in's.
    environment = {**kept, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", RUN, "".join(parts)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_a_python_device
class TestStandIn:
    def test_its_tensors_are_not_the_cpus(self):
        """Else nothing below would be a test."""
        run(
            START,
            """
x = torch.arange(6.0).view(2, 3).to("vendor")
assert x.device == torch.device("vendor", 0) and not x.is_cpu
assert torch.accelerator.current_accelerator().type == "vendor"
y = x.T
y[0, 1] = 7.0
assert torch.equal(x.cpu(), torch.tensor([[0.0, 1.0, 2.0], [7.0, 4.0, 5.0]])) and y.data_ptr() == x.data_ptr()
(x.requires_grad_() * 2).sum().backward()
assert x.grad.device == x.device and torch.equal(x.grad.cpu(), torch.full((2, 3), 2.0))
""",
        )


@needs_a_python_device
class TestUnregistered:
    def test_row_blocks_run_and_are_right(self, tmp_path):
        """All that conformance asks, by no kernel of ours."""
        file = tmp_path / "report.json"
        run(
            START,
            f"""
from flash_attn_plus import conformance
code = conformance.main(["--device", "vendor", "--dtype", "float32", "--json", {str(file)!r}])
assert code == 0
assert not [name for name in sys.modules if name.startswith("flash_attn_plus.kernels.")]
assert "aten::bmm" in str(vendor_device.ran)
""",
        )
        report = json.loads(file.read_text())
        assert report["passed"] and report["device"] == "vendor:0" and len(report["rows"]) > 40
        assert report["forward"] == report["backward"]
        assert report["forward"].startswith(
            "row blocks in plain PyTorch: there are no kernels for device type 'vendor'"
        )


@needs_a_python_device
class TestRegistered:
    pytestmark = pytest.mark.skipif(device.why_no_triton() is not None, reason="Triton is not installed")

    def test_every_operator_is_a_prepared_kernel_and_right(self):
        run(
            START,
            CHECKS,
            """
from flash_attn_plus import gpu
prepared, launched = set(), set()
def noting(name, prepare):
    def note(*args):
        prepared.add(name)
        return prepare(*args)
    return note
for name in [name for name in dir(gpu) if name.startswith("prepare_")]:
    setattr(gpu, name, noting(name.removeprefix("prepare_"), getattr(gpu, name)))
from flash_attn_plus.kernels import launch
first = launch.Launch._first
def note(self, tensors, rest):
    launched.add(self.function.__name__)
    assert {x.device.type for x in tensors if x is not None} == {"vendor"}
    return first(self, tensors, rest)
launch.Launch._first = note

flash_attn_plus.register_device("PrivateUse1")
check()
kernels = {each.kernel for each in library._OPERATORS.values()} - {"merge_states"}  # which is plain PyTorch everywhere
assert prepared == kernels, prepared ^ kernels
parts = ("forward", "query_gradient", "key_gradient", "bias_gradient", "append", "decode", "combine", "rotary")
assert {f"{part}_kernel" for part in parts} <= launched, launched
products = {name for name in vendor_device.ran if any(part in name for part in ("mm", "matmul", "softmax", "exp"))}
assert products <= {"aten::expand", "aten::exp2"}, products
""",
            interpret=True,
        )

    def test_by_the_command(self, tmp_path):
        file = tmp_path / "report.json"
        out = run(
            """
import interpreter, sys
interpreter.install()
from flash_attn_plus import conformance
sys.exit(conformance.main(["--import", "vendor_device", "--register", "PrivateUse1", "--dtype", "float16", "--only",
    "one row, one key", "--only", "pages of 5 rows", "--json", """,
            f"{str(file)!r}]))",
            interpret=True,
        )
        report = json.loads(file.read_text())
        assert "vendor:0: vendor, vendor" in out and "passed: 2 of 2 rows on vendor:0" in out
        assert report["forward"].startswith("Triton on vendor: Plan(") and "dq Plan(" in report["backward"]

    def test_what_ran_before_is_forgotten(self):
        """By the dispatcher's kernels and by what goes past them, forward and backward."""
        run(
            START,
            """
import interpreter
interpreter.install()
from flash_attn_plus import eager, gpu
q = torch.randn(1, 3, 2, 16, dtype=torch.float16).to("vendor").requires_grad_()
def step():
    flash_attn_plus.flash_attn_func(q, q, q).sum().backward()
for _ in range(3):
    step()
assert library.memory_of("fwd").recent.latest and library.memory_of("bwd").recent.latest  # it went past the dispatcher
flash_attn_plus.register_device("PrivateUse1")
prepared = []
for name in ("prepare_forward", "prepare_backward"):
    prepare = getattr(gpu, name)
    setattr(gpu, name, lambda *args, name=name, prepare=prepare: prepared.append(name) or prepare(*args))
step()
assert prepared == ["prepare_forward", "prepare_backward"], prepared
step()
def crosses(*args):
    raise AssertionError("the dispatcher is crossed again")
eager._fwd._cross = crosses
step()
assert len(prepared) == 2
""",
            interpret=True,
        )

    def test_autocast_casts(self):
        run(
            START,
            """
import interpreter
interpreter.install()
flash_attn_plus.register_device("PrivateUse1")
q = torch.randn(1, 3, 2, 16).to("vendor").requires_grad_()
for _ in range(3):
    with torch.autocast("vendor", dtype=torch.float16):
        out, lse = flash_attn_plus.flash_attn_func(q, q, q, return_lse=True)
    assert out.dtype == torch.float16 and lse.dtype == torch.float32
    assert flash_attn_plus.flash_attn_func(q, q, q).dtype == torch.float32
out.sum().backward()
assert q.grad.dtype == torch.float32
""",
            interpret=True,
        )

    def test_without_a_driver_of_triton_row_blocks_run(self):
        """Registered too early, or with the wrong Triton: said, and right."""
        out = run(
            START,
            """
import logging
logging.basicConfig(stream=sys.stdout)
flash_attn_plus.register_device("PrivateUse1")
q = torch.randn(1, 3, 2, 16).to("vendor")
out = flash_attn_plus.flash_attn_func(q, q, q)
assert (out.cpu() - flash_attn_plus.flash_attn_func(q.cpu(), q.cpu(), q.cpu())).abs().max() < 1e-6
print(flash_attn_plus.explain(q, q, q))
""",
        )
        assert "forward:  row blocks in plain PyTorch: Triton has no driver for device type 'vendor' (" in out
        assert "WARNING:flash_attn_plus:vendor: row blocks in plain PyTorch: Triton has no driver" in out


DRIVER = """
from types import SimpleNamespace
import triton
from flash_attn_plus import device
on = torch.empty(1, device="vendor").device
def driver(kind="vendor", arch="X1", properties={"multiprocessor_count": 24}):
    return SimpleNamespace(
        get_active_torch_device=lambda: torch.device(kind, 0),
        get_current_target=lambda: SimpleNamespace(backend="vendor", arch=arch, warp_size=32),
        utils=SimpleNamespace(get_device_properties=lambda index: properties),
    )
def asked(**options):
    for question in (device.architecture, device.processors, device.why_no_driver):
        question.cache_clear()
    triton.runtime.driver.set_active(driver(**options))
    return device.architecture(on), device.processors(on), device.why_no_driver(on)
"""


@needs_a_python_device
@pytest.mark.skipif(device.why_no_triton() is not None, reason="Triton is not installed")
def test_triton_is_asked_what_pytorch_does_not_say():
    run(
        START,
        DRIVER,
        """
assert asked() == ("vendor_X1", 24, None)
assert asked(arch=31) == ("vendor_31", 24, None)
assert asked(arch={"a": "table"}) == ("vendor", 24, None)
assert asked(properties={}) == ("vendor_X1", 64, None)
assert asked(kind="cpu") == ("vendor", 64, "Triton's driver is for device type 'cpu', not 'vendor'")
assert device.current_index(on)() == 0
with device.current(on):
    pass
assert device.static_launcher(on) is None
""",
    )


def test_no_other_device_gets_the_launcher_of_cuda(monkeypatch):
    """A PyTorch for CUDA may serve a second device: its kernels are no CUDA functions."""
    launcher = type("Launcher", (), {"_launch_kernel": print})
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch._C, "_StaticCudaLauncher", launcher, raising=False)
    assert device.static_launcher(torch.device("cuda")) is print
    assert device.static_launcher(torch.device("xpu")) is None


@pytest.mark.parametrize("key", library._VENDOR_KEYS)
def test_every_key_has_gradients_and_autocast(key):
    """What PyTorch does beside the kernel: an operator without it would lose gradients, or cast inside."""
    for name in library.OPERATORS:
        table = torch._C._dispatch_dump_table(f"flash_attn_plus::{name}").splitlines()
        of_key = dict(line.split(": ", 1) for line in table if ": " in line)
        kernel = of_key[f"Autograd{key}"]
        assert "library.py" in kernel and "[autograd kernel]" in kernel, (name, kernel)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flash_attn_plus::{name}", f"Autocast{key}"), name


@needs_a_python_device
def test_wrong_keys_are_told_by_name():
    run(
        START,
        """
import pytest
def raises(key, said):
    with pytest.raises(ValueError) as error:
        flash_attn_plus.register_device(key)
    assert str(error.value) == said, error.value
keys = "dispatch_key: expected one of XPU, PrivateUse1, MTIA, HPU, got "
raises("vendor", keys + "'vendor', a device type, whose key is 'PrivateUse1'")
raises("xpu", keys + "'xpu', a device type, whose key is 'XPU'")
raises("NPU", keys + "'NPU'")
raises(None, keys + "None")
raises(["XPU"], keys + "['XPU']")
raises("CUDA", "dispatch_key: 'CUDA' is registered already")
assert flash_attn_plus.register_device("PrivateUse1") is None
raises("PrivateUse1", "dispatch_key: 'PrivateUse1' is registered already")
for name in (name for name in library.OPERATORS if "flag_gems" not in name):  # these run anywhere as they are
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flash_attn_plus::{name}", "PrivateUse1")
""",
    )


def test_a_plan_row_may_serve_the_forward_alone(monkeypatch):
    monkeypatch.setitem(plan.FORWARD, "vendor_X1", plan.FORWARD["gfx942"])
    problem = plan.Problem("vendor_X1", 2, 128, 4096, False)
    assert plan.forward(problem) == plan.FORWARD["gfx942"][2, 128].plain
    assert plan.backward(problem) == plan.backward(problem._replace(arch="vendor_X2"))
    assert plan.decode("vendor_X1", 2, 128) == plan.decode("vendor_X2", 2, 128)
