"""The front door: that programs written for ``flash_attn`` find it, call it by its signatures, and get its results."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest
import torch
from assertions import check_problem, run_reference
from cases import BY_NAME, Problem
from torch import Tensor

import flash_attn_plus
from flash_attn_plus import as_flash_attn, reference
from flash_attn_plus.schemas import Variant, Varlen

as_flash_attn.serve(replace=True)
flash_attn = importlib.import_module("flash_attn")
interface = importlib.import_module("flash_attn.flash_attn_interface")
extension = importlib.import_module("flash_attn_2_cuda")

SOURCE = Path(flash_attn_plus.__file__).parents[1]
BF16 = torch.bfloat16


# Programs. A process that has imported torch and this package, and no flash_attn, forks one for each of them: as fresh
# as a new one, and there at once.

FORKING = """
import json, os, runpy, sys, traceback, importlib
import torch, flash_attn_plus, flash_attn_plus.reference

def child(job):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(job["cwd"])
    sys.path[:0] = job["path"]
    sys.argv = ["-c", *job["args"]]
    code = 0
    try:
        if job["code"] is None:
            runpy._run_module_as_main("flash_attn_plus.as_flash_attn")  # what `python -m` calls
        else:
            exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        child(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    def lines(self) -> list[str]:
        assert self.code == 0, self.err
        return self.out.splitlines()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def run_process(folder: Path, *args: str) -> Ran:
    """Without a fork: what starts an interpreter, or tells of its end."""
    command = [sys.executable, "-m", "flash_attn_plus.as_flash_attn", *args]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(), timeout=120)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.fixture(scope="module")
def forking(tmp_path_factory) -> Iterator[Callable[[dict], Ran]]:
    folder = tmp_path_factory.mktemp("output")
    command = [sys.executable, "-c", FORKING]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment(), **pipes) as process:

        def run(job: dict) -> Ran:
            files = {name: str(folder / name) for name in ("out", "err")}
            process.stdin.write(json.dumps(job | files) + "\n")
            process.stdin.flush()
            return Ran(int(process.stdout.readline()), *(Path(file).read_text() for file in files.values()))

        yield run
        process.stdin.close()


@pytest.fixture
def fresh(forking, tmp_path) -> Callable[..., Ran]:
    """Runs ``code`` as with python -c, in ``tmp_path``, with ``path`` before what sys.path has."""

    def run(code: str, *path: Path) -> Ran:
        return forking(dict(code=dedent(code), cwd=str(tmp_path), path=[str(p) for p in path], args=[]))

    return run


@pytest.fixture
def door(forking, tmp_path) -> Callable[..., Ran]:
    """Runs ``python -m flash_attn_plus.as_flash_attn args`` in ``tmp_path``."""

    def run(*args: str, path: tuple[Path, ...] = ()) -> Ran:
        # The folder it runs in stands first, as python -m has it.
        return forking(dict(code=None, cwd=str(tmp_path), path=["", *map(str, path)], args=args))

    return run


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(dedent(text))
    return folder


@pytest.fixture
def other(tmp_path) -> Path:
    """A folder with another flash_attn installed."""
    return write(
        tmp_path / "site",
        {
            "flash_attn/__init__.py": "__version__ = '2.7.0'\nflash_attn_func = 'the other one'\n",
            "flash_attn/bert_padding.py": "",
            "flash_attn-2.7.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.7.0\n",
            "flash_attn-2.7.0.dist-info/top_level.txt": "flash_attn\n",
        },
    )


SCRIPT = """
    import sys
    import torch
    from flash_attn import flash_attn_func, flash_attn_varlen_func
    from beside import number

    def attend():
        q = torch.ones(1, 3, 2, 16)
        cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
        packed = flash_attn_varlen_func(q[0], q[0], q[0], cu_seqlens, cu_seqlens, 3, 3, causal=True)
        assert torch.equal(flash_attn_func(q, q, q, causal=True)[0], packed)

    if __name__ == "__main__":
        attend()
        print(sys.argv, sys.path[0], __file__, number)
        if "fail" in sys.argv:
            raise ValueError("the program's own")
        sys.exit(7 if "leave" in sys.argv else None)
"""


class TestScripts:
    @pytest.fixture(autouse=True)
    def files(self, tmp_path):
        package = {
            "package/__init__.py": "",
            "package/beside.py": "number = 5",
            "package/__main__.py": "from .program import *",
            "package/program.py": """
                import os, sys
                from flash_attn import flash_attn_func
                from .beside import number
                if __name__ == "__main__":
                    print(sys.argv[1:], os.path.basename(sys.argv[0]), __package__, __spec__.name, number)
                    sys.exit(3)
            """,
        }
        write(tmp_path, {"folder/script.py": SCRIPT, "folder/beside.py": "number = 5", **package})

    def test_a_script_runs_as_it_is(self, door, tmp_path) -> None:
        script = str(Path("folder", "script.py"))
        (line,) = door(script, "--replace", "-m", "x").lines()
        assert line == f"{[script, '--replace', '-m', 'x']} {tmp_path / 'folder'} {script} 5"

    def test_exit_codes(self, door) -> None:
        assert door("folder/script.py", "leave").code == 7

    def test_a_process_of_its_own(self, tmp_path) -> None:
        """An exception of the program, as a new interpreter tells it."""
        ran = run_process(tmp_path, "folder/script.py", "fail")
        assert ran.code == 1
        assert ran.out.startswith("['folder/script.py', 'fail']")
        assert "Traceback (most recent call last)" in ran.err
        assert 'raise ValueError("the program\'s own")' in ran.err
        assert ran.err.rstrip().endswith("ValueError: the program's own")
        assert "RuntimeWarning" not in ran.err

    def test_a_module_runs_as_it_is(self, door) -> None:
        ran = door("-m", "package.program", "-m", "--replace")
        assert (ran.code, ran.out) == (3, "['-m', '--replace'] program.py package package.program 5\n"), ran.err

    def test_a_package_runs_its_main(self, door) -> None:
        assert door("-m", "package").code == 0

    @pytest.mark.parametrize(
        "args", [(), ("-m",), ("--replace",), ("--unknown", "folder/script.py"), ("--replace", "-m")], ids=" ".join
    )
    def test_wrong_usage(self, door, args) -> None:
        ran = door(*args)
        assert ran.code == 2
        assert "usage: python -m flash_attn_plus.as_flash_attn" in ran.err

    def test_help(self, door) -> None:
        (*_, last) = door("--help").lines()
        assert last

    def test_a_script_that_is_not_there(self, door) -> None:
        ran = door("nothing.py")
        assert ran.code and "nothing.py" in ran.err

    def test_infinite_lse(self, door, tmp_path) -> None:
        script = """
            import torch
            from flash_attn import flash_attn_func
            from flash_attn.flash_attn_interface import _flash_attn_forward
            q = torch.ones(1, 3, 1, 8)
            k = q[:, :1]
            lse = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)[1]
            assert torch.equal(lse, _flash_attn_forward(q, k, k, 0.0, 8**-0.5, True, -1, -1, 0.0, None, False)[1])
            print(lse[0, 0].tolist()[:2])
        """
        write(tmp_path, {"lse.py": script})
        assert door("lse.py").lines() == ["[-inf, -inf]"]
        assert door("--infinite-lse", "lse.py").lines() == ["[inf, inf]"]

    def test_replaces_another_one_if_told_to(self, door, other, tmp_path) -> None:
        write(tmp_path, {"which.py": "import flash_attn; print(flash_attn.__version__)"})
        ran = door("which.py", path=(other,))
        assert ran.lines() == ["2.7.0"]
        assert f"flash_attn is installed at {other / 'flash_attn' / '__init__.py'}, and is used" in ran.err
        ran = door("--replace", "which.py", path=(other,))
        assert (ran.lines(), ran.err) == (["2.8.3"], "")

    def test_processes_that_the_program_spawns(self, tmp_path) -> None:
        """They import the program's file under another name, without the front door in between."""
        script = """
            import multiprocessing
            from flash_attn import flash_attn_interface

            def tell(connection):
                connection.send(flash_attn_interface.infinite_lse)

            if __name__ == "__main__":
                context = multiprocessing.get_context("spawn")
                here, there = context.Pipe()
                process = context.Process(target=tell, args=(there,))
                process.start()
                there.close()
                process.join()
                print(process.exitcode, here.recv())
        """
        write(tmp_path, {"spawning.py": script})
        assert run_process(tmp_path, "--infinite-lse", "spawning.py").lines() == ["0 True"]

    def test_a_program_that_imports_the_front_door_finds_this_one(self, door, tmp_path) -> None:
        script = """
            import sys
            import flash_attn_plus.as_flash_attn as front
            import flash_attn
            assert front is sys.modules["flash_attn_plus.as_flash_attn"] and front.is_serving()
            assert sum(isinstance(finder, front._Finder) for finder in sys.meta_path) == 1
            front.stop()
            assert not front.is_serving()
        """
        write(tmp_path, {"script.py": script})
        door("script.py").lines()


class TestWhatIsServed:
    def test_every_module(self, fresh) -> None:
        names = as_flash_attn.served_modules()
        assert {"flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding", "flash_attn_2_cuda"} < {
            *names
        }
        imports = "\n".join(f"import {name}; assert {name}.__spec__ and {name}.__file__" for name in names)
        fresh(f"import flash_attn_plus.as_flash_attn\n{imports}").lines()

    def test_each_by_itself(self, fresh) -> None:
        """Clients import a submodule first."""
        for name in as_flash_attn.served_modules():
            fresh(f"import flash_attn_plus.as_flash_attn\nimport {name}").lines()

    def test_names_that_are_not_there(self) -> None:
        with pytest.raises(ImportError, match=r"does not serve flash_attn\.nothing\. It serves: .*flash_attn_func, .*"):
            from flash_attn import nothing
        with pytest.raises(ImportError, match=r"flash_attn_interface\.nothing\. It serves: .*_flash_attn_forward"):
            from flash_attn.flash_attn_interface import nothing
        with pytest.raises(ImportError, match=r"flash_attn_2_cuda\.nothing\. It serves: bwd, fwd, fwd_kvcache, varlen"):
            from flash_attn_2_cuda import nothing  # noqa: F401
        for module in (flash_attn, interface, extension):
            assert not hasattr(module, "nothing")
            assert getattr(module, "nothing", 5) == 5
            with pytest.raises(AttributeError, match=r"flash_attn_plus does not serve .*nothing\. It serves: "):
                module.nothing  # noqa: B018

    def test_modules_that_are_not_there(self) -> None:
        assert importlib.util.find_spec("flash_attn.nothing") is None
        assert importlib.util.find_spec("flash_attn.ops.nothing") is None
        for name in ("flash_attn.nothing", "flash_attn.ops.triton.cross_entropy", "flash_attn.modules"):
            with pytest.raises(ModuleNotFoundError, match=r"It serves: flash_attn, flash_attn\.bert_padding") as raised:
                importlib.import_module(name)
            assert raised.value.name == name
        with pytest.raises(ModuleNotFoundError, match=r"does not serve flash_attn\.nothing"):
            from flash_attn.nothing import name as _  # noqa: F401
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn_other")

    def test_names_that_start_the_same_are_not_ours(self) -> None:
        for name in ("flash_attn_3", "flash_attn_interface", "flash_attn_2_cuda_nothing", "flash"):
            assert importlib.util.find_spec(name) is None

    def test_everything_public(self) -> None:
        for module in map(importlib.import_module, as_flash_attn.served_modules()):
            for name in getattr(module, "__all__", ()):
                assert getattr(module, name) is not None

    def test_what_clients_read_before_they_import(self, fresh) -> None:
        code = """
            import importlib.metadata as metadata, importlib.util
            import flash_attn_plus.as_flash_attn
            for name in ("flash-attn", "flash_attn", "Flash-Attn"):
                assert metadata.version(name) == "2.8.3"
                assert metadata.distribution(name).metadata["Name"] == "flash-attn"
            assert metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
            assert metadata.packages_distributions()["flash_attn_2_cuda"] == ["flash-attn"]
            assert "flash_attn_plus" not in metadata.packages_distributions()["flash_attn"]
            assert [d.version for d in metadata.distributions() if d.metadata["Name"] == "flash-attn"] == ["2.8.3"]
            assert not metadata.requires("flash-attn") and not metadata.files("flash-attn")
            assert not metadata.entry_points(group="flash_attn")
            metadata.version("pytest")  # others are found as before
            spec = importlib.util.find_spec("flash_attn")
            assert spec.name == "flash_attn" and spec.origin and spec.loader and spec.submodule_search_locations
            assert importlib.util.find_spec("flash_attn_2_cuda").origin
            import sys
            assert "flash_attn" not in sys.modules
            import flash_attn
            assert flash_attn.__version__ == metadata.version("flash-attn") == "2.8.3"
            assert importlib.util.find_spec("flash_attn").origin == flash_attn.__file__
            try:
                from packaging.version import Version
            except ImportError:
                pass
            else:
                version = Version(flash_attn.__version__)
                assert Version("2.1.1") <= version < Version("2.8.4") and version >= Version("2.6.3")
                assert not version.is_prerelease
        """
        fresh(code).lines()

    def test_nothing_is_written(self, fresh, tmp_path) -> None:
        def contents() -> list[str]:
            places = [Path(torch.__file__).parents[1], SOURCE, *as_flash_attn._FOLDER.rglob("*")]
            found = [str(path) for place in places if place.is_dir() for path in place.iterdir()]
            found += [str(path) for path in tmp_path.rglob("*")]
            return sorted(path for path in found if "__pycache__" not in path)

        before = contents()
        fresh("import flash_attn_plus.as_flash_attn, flash_attn, flash_attn_2_cuda, flash_attn.bert_padding").lines()
        assert contents() == before


class TestAnotherOne:
    """Another flash_attn on sys.path."""

    def test_is_left_in_its_place(self, fresh, other) -> None:
        code = """
            import importlib.metadata, logging
            heard = []
            logger = logging.getLogger("flash_attn_plus")
            logger.addFilter(lambda record: heard.append(record) or False)
            from flash_attn_plus import as_flash_attn
            (record,) = heard
            assert record.levelno == logging.WARNING and record.name == "flash_attn_plus"
            assert "serve(replace=True)" in record.getMessage() and "--replace" in record.getMessage()
            assert not as_flash_attn.is_serving() and as_flash_attn.serve() is False
            import flash_attn
            assert flash_attn.__version__ == importlib.metadata.version("flash-attn") == "2.7.0"
            try:
                as_flash_attn.serve(replace=True)
            except RuntimeError as error:
                print(error)
            assert not as_flash_attn.is_serving() and as_flash_attn.serve() is False
        """
        (line,) = fresh(code, other).lines()
        origin = other / "flash_attn" / "__init__.py"
        assert line == f"flash_attn was imported from {origin} already: call serve() before that"

    def test_is_replaced_if_told_to(self, fresh, other) -> None:
        code = """
            import importlib.metadata as metadata
            from flash_attn_plus import as_flash_attn
            assert as_flash_attn.serve(replace=True) is True and as_flash_attn.is_serving()
            assert metadata.version("flash-attn") == "2.8.3"
            assert set(metadata.packages_distributions()["flash_attn"]) == {"flash-attn"}
            import flash_attn, flash_attn.bert_padding, flash_attn_plus
            assert flash_attn.__version__ == "2.8.3"
            assert flash_attn.bert_padding.unpad_input is flash_attn_plus.unpad_input
            assert as_flash_attn.serve() is True and as_flash_attn.serve(replace=True) is True
        """
        fresh(code, other).lines()

    def test_is_there_again_after_stop(self, fresh, other) -> None:
        code = """
            import importlib.metadata
            from flash_attn_plus import as_flash_attn
            as_flash_attn.serve(replace=True)
            as_flash_attn.stop()
            as_flash_attn.stop()
            assert not as_flash_attn.is_serving()
            import flash_attn
            assert flash_attn.__version__ == importlib.metadata.version("flash-attn") == "2.7.0"
        """
        fresh(code, other).lines()

    def test_imported_before(self, fresh, other) -> None:
        code = """
            import flash_attn
            from flash_attn_plus import as_flash_attn
            assert not as_flash_attn.is_serving()
            assert flash_attn.flash_attn_func == "the other one"
        """
        assert "is installed at" in fresh(code, other).err

    def test_a_namespace_is_not_another_one(self, fresh, tmp_path) -> None:
        """flash-attn 4 is a folder flash_attn/cute in a flash_attn without __init__.py."""
        folder = write(tmp_path / "site", {"flash_attn/cute/__init__.py": "def f(): return 4"})
        code = """
            import importlib.util
            from flash_attn_plus import as_flash_attn
            assert as_flash_attn.is_serving()
            assert importlib.util.find_spec("flash_attn.cute") is not None
            from flash_attn.cute import f
            from flash_attn import flash_attn_func
            assert f() == 4
            assert importlib.util.find_spec("flash_attn.nothing") is None
        """
        ran = fresh(code, folder)
        ran.lines()
        assert ran.err == ""

    def test_serve_twice_and_stop(self, fresh) -> None:
        code = """
            import importlib.metadata, importlib.util, sys
            from flash_attn_plus import as_flash_attn
            assert as_flash_attn.serve() and as_flash_attn.serve()
            assert sum(isinstance(finder, as_flash_attn._Finder) for finder in sys.meta_path) == 1
            import flash_attn
            from flash_attn import flash_attn_interface
            assert flash_attn_interface.infinite_lse is False
            assert as_flash_attn.serve(infinite_lse=True) and flash_attn_interface.infinite_lse
            assert as_flash_attn.serve() and flash_attn_interface.infinite_lse  # as it was told last
            assert as_flash_attn.serve(infinite_lse=False) and not flash_attn_interface.infinite_lse
            as_flash_attn.stop()
            assert flash_attn.flash_attn_func is flash_attn_interface.flash_attn_func
            try:
                importlib.metadata.version("flash-attn")
            except importlib.metadata.PackageNotFoundError:
                print("gone")
            assert importlib.util.find_spec("flash_attn_2_cuda") is None
            assert as_flash_attn.serve() and importlib.util.find_spec("flash_attn_2_cuda")
        """
        assert fresh(code).lines() == ["gone"]


# Signatures: names in order, with a default where there is one.

TAIL = (
    "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None "
    "deterministic=False return_attn_probs=False"
)
CU = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
OPTIONS = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
SAVED = "dout q k v out softmax_lse dq dk dv"
PUBLIC = {
    "flash_attn_func": f"q k v {TAIL}",
    "flash_attn_kvpacked_func": f"q kv {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv {TAIL}",
    "flash_attn_varlen_func": f"q k v {CU} {TAIL} block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q kv {CU} {TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {TAIL}",
}
SIGNATURES = {name: f"{arguments} *s_aux=None" for name, arguments in PUBLIC.items()} | {
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None cache_batch_idx=None "
        "cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
        "rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False *s_aux=None"
    ),
    "_flash_attn_forward": f"q k v {OPTIONS} return_softmax",
    "_flash_attn_varlen_forward": (
        f"q k v {CU} dropout_p softmax_scale causal window_size_left=-1 window_size_right=-1 softcap=0.0 "
        "alibi_slopes=None return_softmax=False block_table=None leftpad_k=None seqused_k=None zero_tensors=False"
    ),
    "_flash_attn_backward": f"{SAVED} {OPTIONS} deterministic rng_state=None",
    "_flash_attn_varlen_backward": f"{SAVED} {CU} {OPTIONS} deterministic rng_state=None zero_tensors=False",
    "_get_block_size_n": "device head_dim is_dropout is_causal",
    "maybe_contiguous": "x",
    "round_multiple": "x m",
}
BY_PLACE = {
    "fwd": (
        "q k v out alibi_slopes dropout_p softmax_scale causal window_size_left window_size_right softcap "
        "return_softmax generator"
    ),
    "varlen_fwd": (
        "q k v out cu_seqlens_q cu_seqlens_k seqused_k leftpad_k block_table alibi_slopes max_seqlen_q max_seqlen_k "
        "dropout_p softmax_scale zero_tensors causal window_size_left window_size_right softcap return_softmax "
        "generator"
    ),
    "bwd": (
        f"{SAVED} alibi_slopes dropout_p softmax_scale causal window_size_left window_size_right softcap deterministic "
        "generator rng_state"
    ),
    "varlen_bwd": (
        f"{SAVED} cu_seqlens_q cu_seqlens_k alibi_slopes max_seqlen_q max_seqlen_k dropout_p softmax_scale "
        "zero_tensors causal window_size_left window_size_right softcap deterministic generator rng_state"
    ),
    "fwd_kvcache": (
        "q kcache vcache k v seqlens_k rotary_cos rotary_sin cache_batch_idx leftpad_k block_table alibi_slopes out "
        "softmax_scale is_causal window_size_left window_size_right softcap is_rotary_interleaved num_splits"
    ),
}


def signature(function: Callable) -> str:
    """As the tables have it; what only has a keyword behind ``*``."""

    def told(parameter: inspect.Parameter) -> str:
        star = "*" * (parameter.kind == parameter.KEYWORD_ONLY)
        assert star or parameter.kind == parameter.POSITIONAL_OR_KEYWORD
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}".replace(" ", "")
        return f"{star}{parameter.name}{default}"

    return " ".join(map(told, inspect.signature(function).parameters.values()))


class TestSignatures:
    @pytest.mark.parametrize("name", SIGNATURES)
    def test_of_the_interface(self, name: str) -> None:
        function = getattr(interface, name)
        assert inspect.isfunction(function)
        assert signature(function) == SIGNATURES[name]

    @pytest.mark.parametrize("name", BY_PLACE)
    def test_of_the_extension(self, name: str) -> None:
        assert inspect.isfunction(getattr(extension, name))
        assert signature(getattr(extension, name)) == BY_PLACE[name]

    def test_what_the_package_exports(self) -> None:
        for name in (*PUBLIC, "flash_attn_with_kvcache"):
            assert getattr(flash_attn, name) is getattr(interface, name)

    def test_wrapped_names(self) -> None:
        for name in ("forward", "varlen_forward", "backward", "varlen_backward"):
            wrapped = getattr(interface, f"_wrapped_flash_attn_{name}")
            assert signature(wrapped) == SIGNATURES[f"_flash_attn_{name}"]


# Calls.


def dense(seqlen_q: int = 9, seqlen_k: int = 12, heads: int = 2, dim: int = 16, dtype=torch.float32, batch: int = 2):
    q = torch.randn(batch, seqlen_q, heads, dim, dtype=dtype)
    k, v = torch.randn(2, batch, seqlen_k, heads, dim, dtype=dtype)
    return q, k, v


OFFSETS_Q = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
OFFSETS_K = torch.tensor([0, 6, 9, 14], dtype=torch.int32)
LAYOUT = (OFFSETS_Q, OFFSETS_K, 7, 6)


def packed(rows_q: int = 11, rows_k: int = 14, heads: int = 2, dim: int = 16):
    q = torch.randn(rows_q, heads, dim)
    k, v = torch.randn(2, rows_k, heads, dim)
    return q, k, v


def forward(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False, return_softmax=False):
    return interface._flash_attn_forward(
        *(q, k, v, dropout_p, q.shape[-1] ** -0.5, causal, -1, -1, 0.0, None, return_softmax)
    )


class TestResults:
    @pytest.mark.parametrize("name", PUBLIC)
    def test_how_many(self, name: str) -> None:
        q, k, v = packed(11, 11) if "varlen" in name else dense(9, 9)
        if "qkvpacked" in name:
            tensors = (torch.stack((q, k, v), dim=-3),)
        elif "kvpacked" in name:
            tensors = q, torch.stack((k, v), dim=-3)
        else:
            tensors = q, k, v
        if "varlen_qkv" in name:
            tensors += OFFSETS_Q, 7
        elif "varlen" in name:
            tensors += OFFSETS_Q, OFFSETS_Q, 7, 7
        function = getattr(flash_attn, name)
        out = function(*tensors)
        assert out.shape == q.shape
        same, lse, S_dmask = function(*tensors, return_attn_probs=True)
        assert torch.equal(same, out) and S_dmask.numel() == 0
        assert lse.dtype == torch.float32
        assert lse.shape == ((2, 11) if "varlen" in name else (2, 2, 9))
        with_sink = function(*tensors, s_aux=torch.zeros(2))
        assert not torch.equal(with_sink, out)
        out, _, S_dmask = function(*tensors, dropout_p=0.5, return_attn_probs=True)
        assert S_dmask.shape == ((3, 2, 128, 128) if "varlen" in name else (2, 2, 128, 128))
        with pytest.raises(RuntimeError, match=r"softcap: expected 0\.0 beside dropout"):
            function(*tensors, dropout_p=0.5, softcap=10.0)

    def test_of_the_private_functions(self) -> None:
        q, k, v = dense()
        out, lse, S_dmask, rng_state = forward(q, k, v)
        assert out.shape == q.shape and lse.shape == (2, 2, 9) and S_dmask.numel() == 0
        assert rng_state.dtype == torch.int64 and rng_state.shape == (2,)
        softmax_d = interface._flash_attn_backward(
            *(torch.ones_like(out), q, k, v, out, lse, *map(torch.empty_like, (q, k, v))),
            *(0.0, 0.25, False, -1, -1, 0.0, None, False, rng_state),
        )
        assert isinstance(softmax_d, Tensor)
        q, k, v = packed()
        out, lse, S_dmask, rng_state = interface._flash_attn_varlen_forward(q, k, v, *LAYOUT, 0.0, 0.25, False)
        assert out.shape == q.shape and lse.shape == (2, 11) and S_dmask.numel() == 0 and rng_state.shape == (2,)
        assert len(interface._flash_attn_varlen_forward(q, k, v, *LAYOUT, 0.5, 0.25, False, return_softmax=True)) == 4

    def test_block_sizes(self) -> None:
        """On a device that is no GPU, those of an A100."""
        table = {32: (128, 128), 64: (128, 64), 96: (64, 64), 128: (64, 32), 160: (64, 64), 256: (64, 64)}
        for dim, sizes in table.items():
            for causal in (False, True):
                found = [interface._get_block_size_n(torch.device("cpu"), dim, dropout, causal) for dropout in (0, 1)]
                assert found == list(sizes)


class TestDropout:
    def test_s_dmask(self) -> None:
        """Replayed by its signs, and normalised with the maxima of its blocks of keys, it is what was computed."""
        seqlen_q, seqlen_k, p = 70, 300, 0.3
        q, k, v = dense(seqlen_q, seqlen_k, dim=64)
        out, lse, S_dmask = flash_attn.flash_attn_func(q, k, v, dropout_p=p, causal=True, return_attn_probs=True)
        assert S_dmask.shape == (2, 2, 128, 384) and S_dmask.dtype == q.dtype
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8
        seen = torch.ones(seqlen_q, seqlen_k).tril(seqlen_k - seqlen_q).bool()
        scores = scores.masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(lse, scores.logsumexp(-1))
        S_dmask = S_dmask[..., :seqlen_q, :seqlen_k]
        assert (S_dmask[..., ~seen] == 0).all()
        dropped = S_dmask.signbit()
        assert abs(dropped[..., seen].float().mean().item() - p) < 0.02
        width = interface._get_block_size_n(q.device, 64, True, True)
        assert width == 64
        for first in range(0, seqlen_k, width):
            peak = scores[..., first:].amax(-1, keepdim=True)
            block = slice(first, first + width)
            expected = (scores[..., block] - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
            torch.testing.assert_close(S_dmask[..., block].abs(), expected)
        probs = scores.softmax(-1).masked_fill(dropped, 0.0) / (1 - p)
        torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", probs, v))

    def test_of_packed_sequences(self) -> None:
        q, k, v = packed()
        out, _, S_dmask = flash_attn.flash_attn_varlen_func(q, k, v, *LAYOUT, dropout_p=0.5, return_attn_probs=True)
        assert S_dmask.shape == (3, 2, 128, 128)
        for b in range(3):
            rows, keys = (slice(*x[b : b + 2].tolist()) for x in (OFFSETS_Q, OFFSETS_K))
            signs = S_dmask[b, :, : rows.stop - rows.start, : keys.stop - keys.start].signbit()
            probs = (torch.einsum("qhd,khd->hqk", q[rows], k[keys]) / 4).softmax(-1).masked_fill(signs, 0.0) * 2
            torch.testing.assert_close(out[rows], torch.einsum("hqk,khd->qhd", probs, v[keys]))

    def test_follows_the_seed(self) -> None:
        q, k, v = dense()
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(flash_attn.flash_attn_func(q, k, v, dropout_p=0.5))
        assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])

    @pytest.mark.parametrize("layout", [None, LAYOUT], ids=["dense", "packed"])
    def test_the_state_goes_from_forward_to_backward(self, layout) -> None:
        q, k, v = dense() if layout is None else packed()
        of_variant = dict(softmax_scale=0.25, dropout_p=0.4)
        if layout is None:
            out, lse, _, rng_state = forward(q, k, v, 0.4)
        else:
            out, lse, _, rng_state = interface._flash_attn_varlen_forward(q, k, v, *layout, 0.4, 0.25, False)
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        variant = Variant(**of_variant, rng_state=rng_state)
        varlen = None if layout is None else Varlen(*layout)
        expected = run_reference(Problem(*leaves, variant, varlen), torch.float64)[0]
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
        dout = torch.randn_like(out)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        options = (0.4, 0.25, False, -1, -1, 0.0, None, False, rng_state)
        if layout is None:
            interface._flash_attn_backward(dout, q, k, v, out, lse, *grads, *options)
        else:
            interface._flash_attn_varlen_backward(dout, q, k, v, out, lse, *grads, *layout, *options)
        wanted = torch.autograd.grad(expected, leaves, dout.double())
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-5)

    def test_the_backward_wants_the_state(self) -> None:
        q, k, v = dense()
        out, lse, _, _ = forward(q, k, v, 0.4)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        with pytest.raises(ValueError, match="rng_state: expected what the forward returned"):
            interface._flash_attn_backward(out, q, k, v, out, lse, *grads, 0.4, 0.25, False, -1, -1, 0.0, None, False)


class TestBackward:
    @pytest.mark.parametrize("layout", [None, LAYOUT], ids=["dense", "packed"])
    def test_writes_into_slices_of_one_tensor(self, layout) -> None:
        q, k, v = dense(9, 9) if layout is None else packed(11, 11)
        arguments = () if layout is None else (OFFSETS_Q, OFFSETS_Q, 7, 7)
        public = flash_attn.flash_attn_func if layout is None else flash_attn.flash_attn_varlen_func
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse, _ = public(*leaves, *arguments, causal=True, return_attn_probs=True)
        dout = torch.randn_like(out)
        expected = torch.autograd.grad(out, leaves, dout)
        whole = torch.full((*q.shape[:-2], 5, *q.shape[-2:]), 7.0)
        dq, dk, dv = whole[..., 1, :, :], whole[..., 2, :, :], whole[..., 4, :, :]
        backward = interface._flash_attn_backward if layout is None else interface._flash_attn_varlen_backward
        backward(
            *(dout, q, k, v, out.detach(), lse.detach(), dq, dk, dv, *arguments),
            *(0.0, 16**-0.5, True, -1, -1, 0.0, None, False),
        )
        for grad, want in zip((dq, dk, dv), expected, strict=True):
            torch.testing.assert_close(grad, want)
        assert (whole[..., 0, :, :] == 7).all() and (whole[..., 3, :, :] == 7).all()

    def test_some_of_the_gradients(self) -> None:
        q, k, v = dense()
        out, lse, _, _ = forward(q, k, v)
        options = (0.0, 0.25, False, -1, -1, 0.0, None, False)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        interface._flash_attn_backward(out, q, k, v, out, lse, None, dk, dv, *options)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        interface._flash_attn_backward(out, q, k, v, out, lse, *grads, *options)
        assert torch.equal(dk, grads[1]) and torch.equal(dv, grads[2])

    def test_a_part_of_the_keys_with_the_lse_of_all(self) -> None:
        """What a ring does: the blocks' gradients are those of the whole."""
        q, k, v = dense(9, 12)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse, _ = flash_attn.flash_attn_func(*leaves, return_attn_probs=True)
        dout = torch.randn_like(out)
        expected = torch.autograd.grad(out, leaves, dout)
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        for start, end in pairwise((0, 5, 12)):
            part, keys = torch.empty_like(q), slice(start, end)
            interface._flash_attn_backward(
                *(dout, q, k[:, keys], v[:, keys], out.detach(), lse.detach(), part, dk[:, keys], dv[:, keys]),
                *(0.0, 0.25, False, -1, -1, 0.0, None, False),
            )
            dq += part
        for grad, want in zip((dq, dk, dv), expected, strict=True):
            torch.testing.assert_close(grad, want)

    def test_records_nothing(self) -> None:
        """Callers hand it tensors that require gradients."""
        q, k, v = (x.requires_grad_() for x in dense())
        out, lse, _, _ = forward(q, k, v)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        interface._flash_attn_backward(out, q, k, v, out, lse, *grads, 0.0, 0.25, False, -1, -1, 0.0, None, False)
        assert not any(grad.requires_grad for grad in grads)


class TestExtension:
    """``flash_attn_2_cuda``, by place."""

    def test_dense(self) -> None:
        q, k, v = dense(9, 9)
        given = torch.empty_like(q)
        options = (0.25, True, -1, -1, 0.0)
        results = extension.fwd(q, k, v, given, None, 0.0, *options, False, None)
        assert isinstance(results, list) and results[0] is given
        out, lse, S_dmask, rng_state = results
        expected = forward(q, k, v, causal=True)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]) and S_dmask.numel() == 0
        assert torch.equal(extension.fwd(q, k, v, None, None, 0.0, *options, False, None)[0], out)
        dout = torch.randn_like(out)
        dq = torch.empty_like(q)
        saved = (dout, q, k, v, out, lse)
        results = extension.bwd(*saved, dq, None, None, None, 0.0, *options, False, None, rng_state)
        assert len(results) == 4 and results[0] is dq
        grads = [torch.empty_like(x) for x in (q, k, v)]
        interface._flash_attn_backward(*saved, *grads, 0.0, *options, None, False)
        assert all(torch.equal(*pair) for pair in zip(results[:3], grads, strict=True))

    def test_packed(self) -> None:
        q, k, v = packed()
        given = torch.empty_like(q)
        places = (None, None, None, None, 7, 6, 0.0, 0.25, False, True, -1, -1, 0.0, False, None)
        results = extension.varlen_fwd(q, k, v, given, OFFSETS_Q, OFFSETS_K, *places)
        assert results[0] is given
        out, lse, _, rng_state = results
        expected = interface._flash_attn_varlen_forward(q, k, v, *LAYOUT, 0.0, 0.25, True)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
        saved = (torch.randn_like(out), q, k, v, out, lse)
        results = extension.varlen_bwd(
            *(*saved, None, None, None, OFFSETS_Q, OFFSETS_K, None, 7, 6, 0.0, 0.25, False, True, -1, -1, 0.0),
            *(False, None, rng_state),
        )
        grads = [torch.empty_like(x) for x in (q, k, v)]
        interface._flash_attn_varlen_backward(*saved, *grads, *LAYOUT, 0.0, 0.25, True, -1, -1, 0.0, None, False)
        assert len(results) == 4 and all(torch.equal(*pair) for pair in zip(results[:3], grads, strict=True))

    def test_out_of_another_shape(self) -> None:
        q, k, v = dense()
        with pytest.raises(ValueError, match=r"out: expected shape \(2, 9, 2, 16\)"):
            extension.fwd(q, k, v, q[:1].clone(), None, 0.0, 0.25, False, -1, -1, 0.0, False, None)
        with pytest.raises(ValueError, match=r"out: expected .* torch.float32, got .* torch.float64"):
            extension.fwd(q, k, v, q.double(), None, 0.0, 0.25, False, -1, -1, 0.0, False, None)

    def test_generator(self) -> None:
        q, k, v = dense()
        states = []
        for seed in (5, 5, 6):
            generator = torch.Generator().manual_seed(seed)
            before = torch.get_rng_state()
            *_, rng_state = extension.fwd(q, k, v, None, None, 0.5, 0.25, False, -1, -1, 0.0, False, generator)
            assert torch.equal(torch.get_rng_state(), before)
            states.append(rng_state.tolist())
        assert states[0] == states[1] != states[2]


class Private(torch.autograd.Function):
    """As libraries build on the private functions: forward, and backward into slices of one tensor."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, options: tuple, layout: tuple):
        dropout_p, scale, causal, left, right, softcap, slopes = options
        if layout:
            function = interface._flash_attn_varlen_forward
        else:
            function = interface._flash_attn_forward
        out, lse, _, rng_state = function(
            q, k, v, *layout, dropout_p, scale, causal, left, right, softcap, slopes, False
        )
        ctx.save_for_backward(q, k, v, out, lse, rng_state)
        ctx.options, ctx.layout = options, layout
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout: Tensor, _):
        *saved, rng_state = ctx.saved_tensors
        q, k, v = saved[:3]
        widths = k.shape[-1], v.shape[-1]
        dq, (dk, dv) = torch.empty_like(q), k.new_empty(*k.shape[:-1], sum(widths)).split(widths, dim=-1)
        function = interface._flash_attn_varlen_backward if ctx.layout else interface._flash_attn_backward
        function(dout, *saved, dq, dk, dv, *ctx.layout, *ctx.options, False, rng_state)
        return dq, dk, dv, None, None


def options_of(problem: Problem) -> tuple:
    variant = problem.variant
    scale = problem.q.shape[-1] ** -0.5 if variant.softmax_scale is None else variant.softmax_scale
    return (
        *(variant.dropout_p, scale, variant.causal, variant.window_left, variant.window_right),
        *(variant.softcap, variant.alibi_slopes),
    )


def run_public(problem: Problem) -> tuple[Tensor, Tensor]:
    dropout_p, scale, causal, left, right, softcap, slopes = options_of(problem)
    options = (dropout_p, scale, causal, (left, right), softcap, slopes, False, True)
    if problem.varlen is None:
        return flash_attn.flash_attn_func(*problem[:3], *options, s_aux=problem.variant.sink)[:2]
    arguments = (*problem.varlen[:4], *options, problem.varlen.block_table)
    return flash_attn.flash_attn_varlen_func(*problem[:3], *arguments, s_aux=problem.variant.sink)[:2]


def run_private(problem: Problem) -> tuple[Tensor, Tensor]:
    return Private.apply(*problem[:3], options_of(problem), () if problem.varlen is None else problem.varlen[:4])


PUBLIC_CASES = "more_queries gqa dim_59 causal window_causal alibi sink varlen_causal varlen_padding varlen_sink"
PRIVATE_CASES = "more_keys mqa sliced causal window_both softcap alibi varlen varlen_empty varlen_window"


class TestValues:
    """By the rule of assertions.py, out, lse and gradients; bfloat16, and some cases in every dtype."""

    @pytest.mark.parametrize("name", PUBLIC_CASES.split())
    def test_public(self, name: str) -> None:
        problem = BY_NAME[name].make(dtype=BF16, requires_grad=True)
        check_problem(problem, name, run=run_public)

    @pytest.mark.parametrize("name", PRIVATE_CASES.split())
    def test_private(self, name: str) -> None:
        problem = BY_NAME[name].make(dtype=BF16, requires_grad=True)
        check_problem(problem, name, loss="out", run=run_private)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("name", ["gqa", "varlen_padding"])
    def test_other_dtypes(self, name: str, dtype: torch.dtype) -> None:
        problem = BY_NAME[name].make(dtype=dtype, requires_grad=True)
        check_problem(problem, name, run=run_public)
        check_problem(problem, name, loss="out", run=run_private)

    def test_paged(self) -> None:
        q, (k, v) = torch.randn(5, 2, 16), torch.randn(2, 4, 4, 2, 16)
        table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
        starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 7, 12]))
        varlen = Varlen(starts_q, starts_k, 3, 7, block_table=table)
        check_problem(Problem(q, k, v, Variant(causal=True), varlen), "paged", loss="", run=run_public)

    def test_infinite_lse(self, monkeypatch) -> None:
        """+inf where no key is seen, gradients as without it."""
        q, k, v = (x.requires_grad_() for x in dense(12, 9))

        def results() -> tuple[Tensor, ...]:
            out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
            return lse, *torch.autograd.grad(out.sum() + lse[..., 3:].sum(), (q, k, v))

        lse, *grads = results()
        assert (lse[..., :3] == -torch.inf).all() and lse[..., 3:].isfinite().all()
        monkeypatch.setattr(interface, "infinite_lse", True)
        other, *others = results()
        assert (other[..., :3] == torch.inf).all() and torch.equal(other[..., 3:], lse[..., 3:])
        assert all(torch.equal(*pair) for pair in zip(grads, others, strict=True))


class TestCompiled:
    @pytest.fixture(autouse=True)
    def from_the_start(self):
        torch._dynamo.reset()

    def test_public(self) -> None:
        tensors = [x.requires_grad_() for x in dense()]

        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn.flash_attn_func(q, k, v, causal=True).square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(loss(*tensors), tensors)
        for grad, want in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
            torch.testing.assert_close(grad, want)

    def test_private(self) -> None:
        q, k, v = dense()

        def step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
            out, lse, _, rng_state = forward(q, k, v)
            grads = [torch.empty_like(x) for x in (q, k, v)]
            options = (0.0, 0.25, False, -1, -1, 0.0, None, False, rng_state)
            interface._flash_attn_backward(dout, q, k, v, out, lse, *grads, *options)
            return out, lse, *grads

        dout = torch.randn_like(q)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for actual, expected in zip(compiled(q, k, v, dout), step(q, k, v, dout), strict=True):
            torch.testing.assert_close(actual, expected)


def test_s_dmask_is_the_oracles() -> None:
    """Through the private function too, which returns the state that tells the oracle."""
    q, k, v = dense(40, 200, dim=32)
    _, _, S_dmask, rng_state = forward(q, k, v, 0.3, True, True)
    expected = reference.s_dmask(q, k, Variant(causal=True, dropout_p=0.3, rng_state=rng_state), block_n=128)
    torch.testing.assert_close(S_dmask, expected)


class TestPathsOfPrograms:
    """sys.path is that of ``python script.py`` and ``python -m module``, also for what is installed."""

    @staticmethod
    def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
        path = str(Path(as_flash_attn.__file__).parent.parent)
        environment = {**os.environ, "PYTHONPATH": path}
        command = (sys.executable, "-m", "flash_attn_plus.as_flash_attn", *command)
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)

    def test_the_working_directory_is_not_the_script_s(self, tmp_path) -> None:
        """A clone of flash-attn there is neither imported nor taken for an installed one; beside the script it is."""
        for folder in ("here", "there"):
            (tmp_path / folder / "flash_attn").mkdir(parents=True)
        program = "import flash_attn, sys; print(flash_attn.__file__); print(sys.path[0])"
        (tmp_path / "script.py").write_text(program)
        (tmp_path / "here" / "flash_attn" / "__init__.py").touch()
        done = self.run(tmp_path / "here", str(tmp_path / "script.py"))
        assert "dropin" in done.stdout.splitlines()[0] and not done.stderr, done
        assert done.stdout.splitlines()[1] == str(tmp_path)
        (tmp_path / "there" / "flash_attn" / "__init__.py").touch()
        (tmp_path / "there" / "script.py").write_text(program)
        done = self.run(tmp_path, "there/script.py")
        assert done.stdout.splitlines()[0] == str(tmp_path / "there" / "flash_attn" / "__init__.py")
        assert "is installed at" in done.stderr

    def test_a_module_written_together_with_its_option(self, tmp_path) -> None:
        (tmp_path / "program.py").write_text("import sys; print(__name__, sys.argv[1:])")
        (tmp_path / "other.py").write_text("print('wrong')")
        for option in (["-mprogram"], ["-m", "program"]):
            assert self.run(tmp_path, *option, "other.py").stdout == "__main__ ['other.py']\n"


def test_a_finder_that_is_asked_in_other_ways() -> None:
    finder = next(finder for finder in sys.meta_path if isinstance(finder, as_flash_attn._Finder))
    assert finder.find_spec("flash_attn.json", None) is None  # not the standard library's
    assert list(importlib.metadata.distributions(name="flash-attn", path=["/nowhere"])) == []
