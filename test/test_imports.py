"""Who imports whom: the floors of the package, what a program pays for importing it, and what it does not need."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import flash_attn_plus
from flash_attn_plus import library

PACKAGE = Path(flash_attn_plus.__file__).parent


class Floor(NamedTuple):
    on_load: str = ""  # modules of the package that it may import when it is loaded: they stand below it
    on_call: str = ""  # modules that only its functions may import, when they are called
    outside: str = "torch"  # what it may import beside the standard library


# From the roof down. A new file needs a row; a row that needs more than it has is a change of the architecture.
FLOORS = {
    "__main__": Floor("diagnosis", outside=""),
    "conformance": Floor("__init__ conformance_cases device diagnosis tolerance"),
    "diagnosis": Floor("__init__ device native selfcheck"),
    "conformance_cases": Floor("__init__ reference schemas selfcheck tolerance"),
    "selfcheck": Floor("__init__ reference schemas tolerance"),
    "dropin.flash_attn_2_cuda": Floor("as_flash_attn schemas", outside="torch flash_attn"),
    "dropin.flash_attn.__init__": Floor("dropin.flash_attn.flash_attn_interface as_flash_attn", outside=""),
    "dropin.flash_attn.flash_attn_interface": Floor("__init__ as_flash_attn device schemas"),
    "dropin.flash_attn.bert_padding": Floor("as_flash_attn padding"),
    "dropin.flash_attn.layers.__init__": Floor(outside=""),
    "dropin.flash_attn.layers.rotary": Floor("as_flash_attn rotary", outside="torch flash_attn"),
    "dropin.flash_attn.ops.__init__": Floor(outside=""),
    "dropin.flash_attn.ops.triton.__init__": Floor(outside=""),
    "dropin.flash_attn.ops.triton.rotary": Floor("__init__ as_flash_attn"),
    "as_flash_attn": Floor("__init__", outside="flash_attn"),
    "__init__": Floor("autocast autograd backend flops interface kvcache library padding rotary vmap", outside=""),
    "backend": Floor("eager interface kvcache library schemas"),
    "kvcache": Floor("eager interface library schemas"),
    "rotary": Floor("checks_rotary interface library schemas"),
    "interface": Floor("eager library schemas", on_call="reference"),
    "eager": Floor("autocast autograd checks_cache library memory schemas"),
    "autograd": Floor("library states schemas"),
    "autocast": Floor("library"),
    "vmap": Floor("library schemas"),
    "flops": Floor("library schemas"),
    "library": Floor("checks checks_cache checks_flag_gems checks_rotary memory native schemas"),
    "memory": Floor("device"),
    "cpu": Floor("cache checks checks_cache checks_rotary into log native rotate rowblocks states strides schemas"),
    "gpu": Floor(
        "cache device into log plan rotate rowblocks states schemas",
        on_call="kernels.append kernels.arguments kernels.backward kernels.combine kernels.decode kernels.forward"
        " kernels.rotary",
    ),
    "anywhere": Floor("cache checks into log rotate rowblocks states schemas"),
    "integrations.flag_gems": Floor("checks schemas", outside="torch triton flag_gems"),
    "integrations.__init__": Floor(outside=""),
    "kernels.decode": Floor(
        "kernels.arguments kernels.combine kernels.early kernels.forward kernels.launch kernels.relaunch kernels.scores"
        " kernels.softmax kernels.splits kernels.tiles device plan strides schemas",
        outside="torch triton",
    ),
    "kernels.relaunch": Floor("kernels.arguments kernels.launch device"),
    "kernels.combine": Floor(
        "kernels.arguments kernels.early kernels.launch kernels.scores kernels.softmax kernels.splits kernels.tiles"
        " plan strides",
        outside="torch triton",
    ),
    "kernels.append": Floor(
        "kernels.arguments kernels.early kernels.launch kernels.rotary strides schemas", outside="torch triton"
    ),
    "kernels.early": Floor("device", outside="torch triton"),
    "kernels.forward": Floor(
        "kernels.arguments kernels.launch kernels.scores kernels.softmax kernels.tiles device plan strides schemas",
        outside="torch triton",
    ),
    "kernels.backward": Floor(
        "kernels.arguments kernels.backward_kv kernels.backward_options kernels.backward_q kernels.launch"
        " kernels.statistics kernels.tiles plan strides schemas"
    ),
    "kernels.backward_q": Floor("kernels.scores kernels.softmax kernels.statistics kernels.tiles", outside="triton"),
    "kernels.backward_kv": Floor("kernels.scores kernels.statistics kernels.tiles", outside="triton"),
    "kernels.backward_options": Floor(
        "kernels.scores kernels.softmax kernels.statistics kernels.tiles", outside="triton"
    ),
    "kernels.rotary": Floor("kernels.arguments kernels.launch kernels.tiles strides schemas", outside="torch triton"),
    "kernels.arguments": Floor("kernels.scores kernels.tiles device plan strides schemas"),
    "kernels.launch": Floor("device log", outside="torch triton"),
    "kernels.splits": Floor("kernels.tiles", outside="triton"),
    "kernels.scores": Floor("kernels.softmax", outside="triton"),
    "kernels.softmax": Floor(outside="triton"),
    "kernels.statistics": Floor(outside="triton"),
    "kernels.tiles": Floor(outside="triton"),
    "kernels.__init__": Floor(outside=""),
    "device": Floor(outside="torch triton"),
    "plan": Floor(outside=""),
    "rowblocks": Floor("rowblocks_scores philox schemas"),
    "rowblocks_scores": Floor("philox schemas"),
    "native": Floor(),
    "reference": Floor("schemas"),  # the oracle shares no code with what it judges
    "tolerance": Floor(),
    "cache": Floor("checks rotate schemas"),
    "checks_cache": Floor("checks schemas"),
    "checks_flag_gems": Floor("checks schemas"),
    "checks_rotary": Floor("checks schemas"),
    "checks": Floor("schemas"),
    "rotate": Floor("schemas"),
    "into": Floor(),
    "log": Floor(),
    "states": Floor(),
    "strides": Floor(),
    "philox": Floor("schemas"),
    "padding": Floor(),
    "schemas": Floor(outside=""),
}


class Imports(NamedTuple):
    on_load: set[str]
    on_call: set[str]
    outside: set[str]


def _imported(node: ast.Import | ast.ImportFrom, folder: str = "") -> Iterator[tuple[bool, str]]:
    """(is it of this package, its name) of each module that a statement of a file in ``folder`` imports."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            top, _, rest = alias.name.partition(".")
            yield (True, rest or "__init__") if top == "flash_attn_plus" else (False, top)
    elif node.level == 0:
        top, _, rest = node.module.partition(".")
        yield (True, rest or "__init__") if top == "flash_attn_plus" else (False, top)
    else:
        prefix = f"{folder}." if folder and node.level == 1 else ""
        names = [node.module] if node.module else [alias.name for alias in node.names]
        for name in names:
            yield True, prefix + name


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _statements(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, in_function
        elif not _is_type_checking(child):
            yield from _statements(child, in_function or isinstance(child, (ast.FunctionDef, ast.Lambda)))


def imports_of(source: str, folder: str = "") -> Imports:
    imports = Imports(set(), set(), set())
    for statement, in_function in _statements(ast.parse(source)):
        for ours, name in _imported(statement, folder):
            if ours:
                (imports.on_call if in_function else imports.on_load).add(name)
            elif name not in sys.stdlib_module_names:
                imports.outside.add(name)
    return imports


class TestFloors:
    def test_every_file_has_a_floor(self) -> None:
        names = [path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")]
        assert sorted(".".join(parts) for parts in names) == sorted(FLOORS)

    @pytest.mark.parametrize("name", FLOORS)
    def test_imports_no_more_than_its_row_says(self, name: str) -> None:
        source = PACKAGE / f"{name.replace('.', '/')}.py"
        imports, row = imports_of(source.read_text(), name.rpartition(".")[0]), FLOORS[name]
        on_load, on_call = set(row.on_load.split()), set(row.on_call.split())
        assert imports.on_load <= on_load, f"{name} imports {imports.on_load - on_load} when it is loaded"
        assert imports.on_call <= on_load | on_call, f"{name} imports {imports.on_call - on_call} when it is called"
        assert imports.outside <= set(row.outside.split()), f"{name} imports {imports.outside}"

    def test_what_is_imported_on_load_stands_below(self) -> None:
        """Hence no cycles."""
        order = list(FLOORS)
        for name, row in FLOORS.items():
            for below in row.on_load.split():
                assert order.index(below) > order.index(name), f"{name} stands below {below}, which it imports"

    def test_modules_of_devices_are_floors_too(self) -> None:
        """The library imports them by name, on the first call of an operator on such a device."""
        assert set(library.BACKENDS.values()) <= set(FLOORS)
        assert {row.module for row in library._OPERATORS.values()} - {None} == {"integrations.flag_gems"}

    def test_the_reader_of_imports_sees_them_all(self) -> None:
        source = """if True:
            import os, torch.nn, flash_attn_plus.cpu
            from typing import TYPE_CHECKING
            from . import checks, native
            from .schemas import Variant
            from flash_attn_plus import library
            if TYPE_CHECKING:
                import pandas
            class A:
                def f(self):
                    try:
                        from .rowblocks import forward
                        import triton.language as tl
                    finally:
                        from numpy import array
        """
        assert imports_of(source) == Imports(
            {"cpu", "checks", "native", "schemas", "__init__"}, {"rowblocks"}, {"torch", "triton", "numpy"}
        )
        inside = "from . import scores\nfrom .launch import Launch\nfrom .. import plan\nfrom ..schemas import Varlen"
        assert imports_of(inside, "kernels").on_load == {"kernels.scores", "kernels.launch", "plan", "schemas"}


def run_fresh(code: str) -> str:
    """What a new process prints that finds this package where this one did."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


BLOCK = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    names = {"triton", "flag_gems", "numpy", "matplotlib", "flash_attn"}

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
"""

USE_EVERYTHING = """
import torch, flash_attn_plus as fap

def backward(*outputs):
    sum(output.sum() for output in outputs).backward()

qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)
backward(*fap.flash_attn_qkvpacked_func(qkv, 0.1, causal=True, softcap=2.0, return_lse=True))
assert qkv.grad.isfinite().all()

rows, indices, cu_seqlens, longest, _ = fap.unpad_input(torch.randn(2, 9, 3, 2, 16), torch.ones(2, 9))
packed = rows.requires_grad_()
out = fap.flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, longest, window_size=(3, 0))
backward(fap.pad_input(out, indices, 2, 9))
assert packed.grad.isfinite().all()

state = fap.flash_attn_func(*qkv.detach().unbind(2), return_lse=True)
assert fap.merge_states(*state, *state)[0].isfinite().all()
fap.explain(*qkv.detach().unbind(2))

rotated = fap.RotaryEmbedding(16)(torch.randn(2, 9, 3, 2, 16, requires_grad=True) * 1.0)
backward(rotated, fap.apply_rotary_emb(packed[:, 0], *torch.randn(2, 9, 8), cu_seqlens=cu_seqlens, max_seqlen=longest))
"""


def test_needs_nothing_but_torch() -> None:
    """Neither the kernels' languages, nor the peers that benchmarks compare with, nor what plots them."""
    checked = "assert not Blocked.names & {name.partition('.')[0] for name in sys.modules}; print('done')"
    assert run_fresh(BLOCK + USE_EVERYTHING + checked) == "done\n"


HEAVY = ("triton", "sympy", "numpy", "torch._dynamo", "torch._inductor", "torch.fx", "torch._export", "torch.export")


def is_heavy(module: str) -> bool:
    return any(module == heavy or module.startswith(f"{heavy}.") for heavy in HEAVY)


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """Modules that one process loads, step by step, beyond those that PyTorch has loaded.

    PyTorch's FLOP counter, where the formulas are registered, looks for Triton: that is its own, and no news.
    """
    code = f"""
import json, sys, torch, torch.utils.flop_counter
torch_alone = set(sys.modules)
import flash_attn_plus
imported = set(sys.modules) - torch_alone
{USE_EVERYTHING}
print(json.dumps({{"by the import": sorted(imported), "by use": sorted(set(sys.modules) - torch_alone - imported)}}))
"""
    return json.loads(run_fresh(code))


class TestCostOfTheImport:
    def test_loads_next_to_nothing_beyond_torch(self, loaded: dict[str, list[str]]) -> None:
        others = {name for name in loaded["by the import"] if not name.startswith("flash_attn_plus")}
        assert others == set()

    def test_loads_no_kernels(self, loaded: dict[str, list[str]]) -> None:
        """They come with the first call on their device."""
        kernels = {f"flash_attn_plus.{name}" for name in ("cpu", "anywhere", "rowblocks", "reference", "philox")}
        assert not kernels & set(loaded["by the import"])

    def test_eager_calls_load_no_compiler(self, loaded: dict[str, list[str]]) -> None:
        assert [name for name in loaded["by the import"] + loaded["by use"] if is_heavy(name)] == []
