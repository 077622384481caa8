"""Cases of flag_gems_report.py: what the package has, imports, detects and requires."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from flag_gems_calls import (
    FORWARDS,
    FUSED,
    LENGTHS,
    PRESENT,
    in_a_process,
    kernel,
    last_line,
    varlen,
)
from flag_gems_evidence import (
    DTYPE,
    FACT,
    RIGHT,
    WRONG,
    Evidence,
    NotHereError,
    Results,
    called,
    case,
    compared,
    draw,
    packed,
    verdict,
)

MISSING = (
    *("flash_attn_with_kvcache", "flash_attn_func", "flash_attn_backward", "flash_attention_backward"),
    *("flash_attn_varlen_backward", "flash_attn_combine", "merge_attn_states"),
)


@case(FACT, "there is no attention over a KV cache and no backward in flash-attn's layout", "both")
def package_names(gems: ModuleType, device: torch.device) -> Evidence:
    found = [name for name in MISSING if hasattr(gems, name)]
    absent = [name for name in PRESENT if not hasattr(gems, name)]
    note = f"found after all: {found}" if found else f"none of {', '.join(MISSING)}"
    return Evidence(holds=not found and not absent, note=note + (f"; absent: {absent}" if absent else ""))


@case(RIGHT, "reshape_and_cache_flash writes keys and values into pages", "bit-equal copies")
def package_append(gems: ModuleType, device: torch.device) -> Evidence:
    k, v = (draw(device, 20, 2, 64, seed=seed) for seed in (1, 2))
    caches = [torch.zeros(8, 16, 2, 64, dtype=DTYPE, device=device) for _ in range(4)]
    slots = torch.randperm(128, generator=torch.Generator().manual_seed(0))[:20].to(device)
    for cache, x in zip(caches[:2], (k, v), strict=True):
        cache.view(128, 2, 64)[slots] = x
    one = torch.ones((), device=device)
    right = {name: x.double().cpu() for name, x in zip("kv", caches[:2], strict=True)}

    def call() -> Results:
        gems.reshape_and_cache_flash(k, v, *caches[2:], slots, "auto", one, one)
        return {"k": caches[2], "v": caches[3]}

    return called(Evidence(right=right, bounds={"k": 0.0, "v": 0.0}), call)


@case(FACT, "vendors' operators are rebound on the top-level module only", "one name, one function")
def package_overrides(gems: ModuleType, device: torch.device) -> Evidence:
    ops = sys.modules.get("flag_gems.ops")
    if ops is None:
        raise NotHereError("no flag_gems.ops")
    names = [name for name in getattr(ops, "__all__", dir(ops)) if callable(getattr(gems, name, None))]
    differ = {name: getattr(gems, name) for name in names if getattr(gems, name) is not getattr(ops, name, None)}
    # On NVIDIA those of an architecture alone, none of which is attention.
    others = [name for name in differ if name in PRESENT]
    archs = {Path(inspect.getfile(function)).parent.parent.name for function in differ.values()}
    note = f"{len(differ)} of {len(names)} names differ, by {', '.join(sorted(archs))}: {', '.join(list(differ)[:6])}"
    return Evidence(holds=bool(differ) and not others and not any(arch.startswith("_") for arch in archs), note=note)


@case(
    FACT,
    "libentry passes constexprs on for Triton 3.3 to 3.6 only: told that it is 3.7, it fails",
    "every Triton",
    alone=True,
)
def package_triton(gems: ModuleType, device: torch.device) -> Evidence:
    import triton

    kernel(gems, "flash_kernel", "flash_varlen_fwd_kernel")
    problem = packed(device, LENGTHS, causal=True)
    evidence = compared(problem, lambda: varlen(gems, problem))
    if verdict(RIGHT, evidence) != "as reported":
        return evidence
    told = max(7, int(triton.__version__.split(".")[1]))
    with mock.patch.object(sys.modules["flag_gems.utils.libentry"], "minor_version", told):
        evidence = compared(problem, lambda: varlen(gems, problem))  # the kernel is compiled: this launch is libentry's
    said = verdict(WRONG, evidence)
    return Evidence(holds=said != "not reproduced", note=f"Triton {triton.__version__}, told 3.{told}: {said}")


@case(FACT, "its packed kernel uses block pointers, which newer Tritons remove", "what they keep")
def package_block_pointers(gems: ModuleType, device: torch.device) -> Evidence:
    entry = kernel(gems, "flash_kernel", "flash_varlen_fwd_kernel")
    tree = ast.parse(inspect.getsource(entry.jit_function.fn))
    made = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "make_block_ptr"]
    return Evidence(holds=bool(made), note=f"{len(made)} calls of make_block_ptr")


@case(FACT, "the import takes seconds, and initialises CUDA by asking which architecture it is", "lazily")
def package_import(gems: ModuleType, device: torch.device) -> Evidence:
    code = """
import json, sys, time, torch
asked = []
for name in ("get_device_properties", "get_device_name"):
    def watched(*arguments, name=name, function=getattr(torch.cuda, name)):
        asked.append((name, sys._getframe(1).f_globals["__name__"], torch.cuda.is_initialized()))
        return function(*arguments)
    setattr(torch.cuda, name, watched)
start = time.perf_counter()
import flag_gems
seconds, initialised = time.perf_counter() - start, torch.cuda.is_initialized()
start = time.perf_counter()
import flash_attn_plus
print(json.dumps([seconds, initialised, asked, time.perf_counter() - start]))
"""
    done = in_a_process(code)
    if done.returncode:
        return Evidence(raised=RuntimeError(last_line(done)))
    seconds, initialised, asked, ours = json.loads(done.stdout.splitlines()[-1])
    first, database = asked[0], ["get_device_name", "flag_gems.utils.libentry", True]
    holds = initialised and seconds > 1 and first == ["get_device_properties", "flag_gems.runtime.backend", False]
    note = f"{seconds:.1f} s after torch, CUDA initialised: {initialised}, by {first[0]} in {first[1]}; "
    note += f"libentry asks for the name: {database in asked}; flash_attn_plus {ours:.2f} s"
    return Evidence(holds=holds and database in asked, note=note)


@case(FACT, "without a device the import raises RuntimeError, not ImportError", "an import, or ImportError")
def package_no_device(gems: ModuleType, device: torch.device) -> Evidence:
    hidden = dict(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    said = []
    # Named, and looked for by tools that are not there.
    for environment in (hidden, {**hidden, "GEMS_VENDOR": "", "PATH": "/nowhere"}):
        done = in_a_process("import flag_gems", **environment)
        said.append(last_line(done) if done.returncode else "it imports")
    return Evidence(holds=all(line.startswith("RuntimeError") for line in said), note="; ".join(said))


@case(FACT, "by a PyTorch without CUDA it raises AssertionError, GEMS_VENDOR being nvidia", "an import, or ImportError")
def package_no_cuda(gems: ModuleType, device: torch.device) -> Evidence:
    # What tells torch that it has been built for CUDA.
    code = """
import torch
vars(torch._C).pop("_cuda_getDeviceCount", None)
import flag_gems
"""
    done = in_a_process(code, GEMS_VENDOR="nvidia", CUDA_VISIBLE_DEVICES="")
    said = last_line(done) if done.returncode else "it imports"
    return Evidence(holds=said.startswith("AssertionError"), note=said)


def _tools(**environment: str) -> tuple[list[str], list[str]]:
    """The command-line tools that the import of flag_gems runs, and the names of the threads that run them."""
    code = """
import json, subprocess, sys, threading
tools, threads, run = [], [], subprocess.run
def watched(command, *arguments, **options):
    if sys._getframe(1).f_globals.get("__name__", "").startswith("flag_gems"):  # and not by Triton, which asks too
        tools.append(" ".join(command))
        threads.append(threading.current_thread().name)
    return run(command, *arguments, **options)
subprocess.run = watched
try:
    import flag_gems
except (RuntimeError, AssertionError):
    pass
print(json.dumps([tools, threads]))
"""
    done = in_a_process(code, **environment)
    if done.returncode:
        raise RuntimeError(last_line(done))
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@case(FACT, "it runs the command-line tools of all vendors whose part can be imported, in threads", "PyTorch knows")
def package_vendor_tools(gems: ModuleType, device: torch.device) -> Evidence:
    infos = gems.runtime.backend.get_vendor_infos()
    tools, threads = _tools(GEMS_VENDOR="")
    holds = sorted(tools) == sorted(info.device_query_cmd for info in infos) and len(tools) > 2
    names = ", ".join(tool or "(nothing)" for tool in sorted(tools))
    return Evidence(holds=holds and "MainThread" not in threads, note=f"{len(tools)}: {names}")


@case(FACT, "GEMS_VENDOR spares the tools if it names a vendor, and is ignored otherwise", "an error for a wrong name")
def package_vendor_named(gems: ModuleType, device: torch.device) -> Evidence:
    counts = {name: len(_tools(GEMS_VENDOR=name)[0]) for name in ("nvidia", "nvida")}
    holds = counts["nvidia"] == 0 and counts["nvida"] > 2
    return Evidence(holds=holds, note=", ".join(f"{name}: {count} tools" for name, count in counts.items()))


@case(FACT, "an attribute of torch names the vendor before any tool", "a device that works")
def package_vendor_attribute(gems: ModuleType, device: torch.device) -> Evidence:
    code = """
import subprocess, sys, torch
torch.musa = object()
def stop(frame, event, argument):
    if frame.f_code.co_name == "get_vendor_module" and event == "call":
        print(frame.f_locals["vendor_name"])
        sys.exit(0)
sys.setprofile(stop)
subprocess.run = None
import flag_gems
"""
    done = in_a_process(code, GEMS_VENDOR="")
    vendor = done.stdout.split()[-1] if done.stdout.split() else last_line(done)
    return Evidence(holds=vendor == "mthreads", note=f"with torch.musa: {vendor}")


@case(
    FACT,
    "the import fails in Triton's interpreter: a decorator looks for a JITFunction",
    "kernels that can be debugged",
)
def package_interpreter(gems: ModuleType, device: torch.device) -> Evidence:
    done = in_a_process("import flag_gems", TRITON_INTERPRET="1")
    said = last_line(done) if done.returncode else "it imports"
    return Evidence(holds=said.startswith("AttributeError") and "'fn'" in said, note=said)


def _names_of(package: Path) -> set[str]:
    """What the __init__ of a package imports from its modules."""
    init = package / "__init__.py"
    tree = ast.parse(init.read_text(encoding="utf-8")) if init.exists() else ast.Module([], [])
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in nodes for alias in node.names}


@case(FACT, "Hygon, Cambricon, Tsingmicro and Kunlunxin bring attention of their own", "one implementation")
def package_vendor_attention(gems: ModuleType, device: torch.device) -> Evidence:
    if not getattr(gems, "runtime", None):
        raise NotHereError("no flag_gems.runtime")
    vendors = Path(gems.runtime.backend.__file__).parent
    own: dict[str, list[str]] = {}
    for vendor in sorted(vendors.glob("_[a-z]*/")):
        names = _names_of(vendor / "ops") | _names_of(vendor / "fused")
        for name in names & set(PRESENT):
            own.setdefault(name, []).append(vendor.name[1:])
    bring = {name: sorted(own.get(name, [])) for name in FORWARDS}
    holds = all(names == ["cambricon", "hygon", "kunlunxin", "tsingmicro"] for names in bring.values())
    rest = {name: sorted(found) for name, found in sorted(own.items()) if name in FUSED}
    note = "; ".join(f"{name}: {', '.join(found)}" for name, found in {FORWARDS[2]: bring[FORWARDS[2]], **rest}.items())
    return Evidence(holds=holds, note=note)


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("flag_gems") or []
    except importlib.metadata.PackageNotFoundError:
        raise NotHereError("its metadata is not installed") from None


PINS = {"numpy": "1.26.4", "packaging": "26.0", "pyyaml": "6.0.3", "sqlalchemy": "2.0.48"}
IMPORTS = {"sqlalchemy", "yaml", "packaging", "typing_extensions"}


@case(FACT, "its metadata pins four packages exactly", "ranges")
def package_pins(gems: ModuleType, device: torch.device) -> Evidence:
    plain = [line for line in _requirements() if "extra ==" not in line]
    pairs = (re.match(r"([\w-]+)\s*\(?==\s*([\w.]+)", line) for line in plain)
    found = {pair[1].lower(): pair[2] for pair in pairs if pair}
    return Evidence(holds=found == PINS and len(plain) == len(found), note=", ".join(plain))


@case(FACT, "its extras name other PyTorches and Tritons for each vendor", "those that are installed")
def package_extras(gems: ModuleType, device: torch.device) -> Evidence:
    extras = [line for line in _requirements() if "extra ==" in line]
    torches = sorted(match[1] for line in extras if (match := re.match(r"torch ?\(?==(\d+\.\d+)", line)))
    tritons = sorted(match[1] for line in extras if (match := re.match(r"flagtree ?\(?==([\w.+]+)", line)))
    note = f"torch {', '.join(dict.fromkeys(torches))}; flagtree {', '.join(tritons)}"
    return Evidence(holds=(torches[:1], torches[-1:]) == (["2.5"], ["2.9"]) and len(tritons) > 2, note=note)


@case(FACT, "it imports sqlalchemy, yaml, packaging and typing_extensions, and no numpy", "what it pins")
def package_imports(gems: ModuleType, device: torch.device) -> Evidence:
    code = """
import builtins, json, sys, torch, triton
found, imports = set(), builtins.__import__
def watched(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__file__") or ""
    if level == 0 and "/flag_gems/" in importer.replace(chr(92), "/"):  # its vendors' modules have names of their own
        found.add(name.partition(".")[0])
    return imports(name, globals, locals, fromlist, level)
builtins.__import__ = watched
import flag_gems
print(json.dumps(sorted(found - set(sys.stdlib_module_names))))
"""
    done = in_a_process(code)
    if done.returncode:
        return Evidence(raised=RuntimeError(last_line(done)))
    found = set(json.loads(done.stdout.splitlines()[-1]))
    return Evidence(holds=found >= IMPORTS and "numpy" not in found, note=", ".join(sorted(found)))


@case(RIGHT, "numpy 2, which its metadata forbids, does no harm", "packed causal attention beside numpy 2")
def package_numpy(gems: ModuleType, device: torch.device) -> Evidence:
    version = importlib.metadata.version("numpy")
    if int(version.partition(".")[0]) < 2:
        raise NotHereError(f"numpy {version}")
    problem = packed(device, LENGTHS, causal=True)
    evidence = compared(problem, lambda: varlen(gems, problem), ("out", "lse"))
    evidence.note = f"numpy {version}"
    return evidence
