"""Compiles what a launch would run, for any GPU, without one.

``install`` gives Triton a driver that knows a target and launches nothing; the package's real launch functions then
run on CPU tensors up to the launch, and ``measure`` tells what they compiled takes. One target per process.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from flash_attn_plus import device
from flash_attn_plus.kernels import launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """What a kernel takes of its target."""

    registers: int
    stack: int  # bytes of spilled registers
    shared: int  # bytes of shared memory
    matrix: str  # its matrix instructions: "wgmma", "mma", "tcgen05", "mfma", "wmma" or ""
    serialized: bool  # ptxas gave up overlapping wgmma
    chained: bool  # a matrix product adds to the sum of another
    waits: bool | None = None  # for the kernel in front before it relies on memory; None: it never waits
    barriers: int | None = None  # between the first and the last "mma": of a turn, but for those around its copies


class _Launcher:
    def __init__(self, src, metadata):
        pass

    def __call__(self, *args):
        pass


class _Utils:
    def load_binary(self, *args):
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 20, "multiprocessor_count": 100, "warpSize": 32, "max_num_regs": 65536}


class _Driver:
    launcher_cls, utils = _Launcher, _Utils()

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self):
        return torch.device("cpu")


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


# Compiled kernel -> launches through PyTorch's launcher: a letter for the type of each argument, the arguments, and
# what they should be.
launched: dict[object, list[tuple[str, tuple, list]]] = {}


def _expected(compiled, arguments: tuple) -> Iterator:
    """What of a call's arguments Triton's own launcher would hand to the kernel, in order."""

    def given(kind, x) -> Iterator:
        if isinstance(kind, tuple):
            for part in map(given, kind, x):
                yield from part
        elif kind != "constexpr":
            yield x.data_ptr() if isinstance(x, torch.Tensor) else x

    kinds = [compiled.src.signature[name] for name in compiled.src.fn.arg_names]
    for part in map(given, kinds, arguments):
        yield from part
    yield from (None, None)  # global and profile scratch


class _Direct(launch.Direct):
    def __init__(self, launcher, compiled, *args) -> None:
        self.launch_of = compiled
        super().__init__(launcher, compiled, *args)

    def __call__(self, tensors: tuple, rest: tuple, stream: int) -> None:
        def record(arguments, stream) -> None:
            told = self.letters, arguments, list(_expected(self.launch_of, (*tensors, *rest)))
            launched.setdefault(self.launch_of, []).append(told)

        self.launch = record
        super().__call__(tensors, rest, stream)


def install(arch: str) -> None:
    device.static_launcher = lambda _: print if arch.startswith("sm_") else None
    launch.Direct = _Direct
    triton.runtime.driver.set_active(_Driver(target_of(arch)))
    device.architecture = lambda _: arch
    device.has_tf32 = lambda _: arch.startswith("sm_")
    device.processors = lambda _: 100


def measure(compiled) -> Compiled:
    if compiled.metadata.target.backend == "hip":
        return _measure_amd(compiled)
    text = compiled.asm["ptx"]
    kinds = (("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"), ("mma", "mma.sync"))
    matrix = next((name for name, instruction in kinds if instruction in text), "")
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", cubin)
        waits = _waits(_run("cuobjdump", "-sass", cubin)) if "griddepcontrol" in text else None
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        log = ""
        if matrix == "wgmma":
            ptx.write_text(text)
            arch = re.search(r"\.target (\w+)", text)[1]
            log = _run("ptxas", "-v", f"--gpu-name={arch}", ptx, "-o", Path(folder, "again.cubin"))
    return Compiled(
        registers,
        stack,
        compiled.metadata.shared,
        matrix,
        re.search(r"C75(10|11|12)", log) is not None,
        _chained(compiled),
        waits,
        text[text.index("mma.sync") : text.rindex("mma.sync")].count("bar.sync") if matrix == "mma" else None,
    )


# What touches memory that others see, in SASS: loads, stores, copies, atomics. Not loads past a processor's own cache,
# which may find what is about to change; nor what is asked for without being read. By their order in the text: of a
# kernel that goes through a loop before it waits (early.py) it says little, and test_early.py runs that.
_TOUCHES = re.compile(r"\b(LDG(?!\S*STRONG)|STG|LDGSTS|LD|ST|ATOMG?|REDG?|UBLK(?!PF)\w+|UTMA\w+)\b")


def _waits(sass: str) -> bool:
    wait, first = sass.find("ACQBULK"), _TOUCHES.search(sass)
    return 0 <= wait < (first.start() if first else len(sass))


def parameters(compiled) -> str:
    """The types of what a kernel takes, in the letters of PyTorch's launcher; "O" for all of 64 bits."""
    entry = re.search(r"\.entry \w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)[1]
    return "".join({"u64": "O", "u32": "i", "f32": "f"}[kind] for kind in re.findall(r"\.param \.(\w+)", entry))


def _measure_amd(compiled) -> Compiled:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    matrix = "mfma" if "v_mfma" in text else "wmma" if "v_wmma" in text else ""
    return Compiled(
        field("vgpr_count"),
        field("private_segment_fixed_size"),
        compiled.metadata.shared,
        matrix,
        False,
        _chained(compiled),
    )


def _chained(compiled) -> bool:
    sums = re.findall(r" = tt\.dot %\w+, %\w+, %(\w+)", compiled.asm["ttgir"])
    return not sums or not all(name.startswith("cst") for name in sums)


def _run(tool: str, *args) -> str:
    done = subprocess.run([TOOLS / tool, *map(str, args)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
