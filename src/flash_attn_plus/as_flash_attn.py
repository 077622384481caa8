"""The front door: this package as ``flash_attn`` 2.8.3, for programs that import that.

In a program, before anything imports flash_attn::

    import flash_attn_plus.as_flash_attn

For a program as it is::

    python -m flash_attn_plus.as_flash_attn script.py args...
    python -m flash_attn_plus.as_flash_attn -m module args...

Modules (dropin/) and the metadata of a distribution are served to this process; nothing is written anywhere. An
installed flash-attn is left in its place, unless ``serve(replace=True)`` or ``--replace`` says otherwise.
"""

from __future__ import annotations

import argparse
import dis
import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import spawn
from pathlib import Path

VERSION = "2.8.3"

_FOLDER = Path(__file__).parent / "dropin"
_ROOTS = ("flash_attn", "flash_attn_2_cuda")
_log = logging.getLogger("flash_attn_plus")


def served_modules() -> list[str]:
    """The names of all modules that are served."""
    files = (path.relative_to(_FOLDER).with_suffix("").parts for path in _FOLDER.rglob("*.py"))
    return sorted(".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in files)


def _is_importing(caller) -> bool:
    """Whether a finder's caller is an import statement's machinery, or importlib.import_module's."""
    above = caller.f_back
    return above is not None and above.f_code.co_name == "_find_and_load_unlocked"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules in dropin/, and a distribution ``flash-attn`` that has them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target=None):
        root, _, rest = fullname.partition(".")
        if root not in _ROOTS:
            return None
        if not rest:
            return importlib.machinery.PathFinder.find_spec(fullname, [str(_FOLDER)])
        spec = None if path is None else importlib.machinery.PathFinder.find_spec(fullname, path)
        # To whoever only asks (importlib.util.find_spec) a missing module is missing.
        if spec is None and _is_importing(sys._getframe(1)):
            message = f"flash_attn_plus does not serve {fullname}. It serves: {', '.join(served_modules())}"
            raise ModuleNotFoundError(message, name=fullname)
        return spec

    def find_distributions(self, context=None) -> Iterable[importlib.metadata.Distribution]:
        name, path = getattr(context, "name", None), getattr(context, "path", sys.path)
        if path is not sys.path and list(path) != sys.path:
            return  # another environment is asked for
        if name is None or re.sub(r"[-_.]+", "-", name).lower() == "flash-attn":
            yield _Distribution()


class _Distribution(importlib.metadata.Distribution):
    """What clients read before they import: a name, a version, and the modules that belong to it."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\nSummary: flash_attn_plus\n",
            "top_level.txt": "\n".join(_ROOTS) + "\n",
            "INSTALLER": "flash_attn_plus\n",
        }.get(filename)

    def locate_file(self, path) -> Path:
        return _FOLDER / path


_finder = _Finder()


def not_served(module: str, names: Iterable[str]) -> Callable[[str], object]:
    """A module's ``__getattr__``: ``from module import name`` is told which names there are."""
    served = ", ".join(sorted(names))

    def missing(name: str):
        message = f"flash_attn_plus does not serve {module}.{name}. It serves: {served}"
        # hasattr and getattr want an AttributeError; `from` would make an ImportError of it that says nothing.
        caller = sys._getframe(1)
        if dis.opname[caller.f_code.co_code[caller.f_lasti]] == "IMPORT_FROM":
            raise ImportError(message, name=module)
        raise AttributeError(message, name=name, obj=sys.modules.get(module))

    return missing


def _installed() -> str | None:
    """Where another flash_attn would be imported from, or was."""
    if "flash_attn" in sys.modules:
        file = getattr(sys.modules["flash_attn"], "__file__", None)
        if file is None:
            return "sys.modules, put there by hand"
        return None if Path(file).is_relative_to(_FOLDER) else str(file)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find("flash_attn", None) if find and finder is not _finder else None
        if spec is not None and spec.origin:  # a folder without it is a namespace, which the served package extends
            return spec.origin
    return None


def is_serving() -> bool:
    return _finder in sys.meta_path


def serve(replace: bool = False, infinite_lse: bool | None = None) -> bool:
    """Serve ``flash_attn`` in this process from now on. Importing this module calls it.

    Args:
        replace: also where another flash_attn is installed; without it that one stays, and a warning says so.
        infinite_lse: whether the log-sum-exp of a query that sees no key is ``+inf``, as in flash-attn 2, instead of
            ``-inf``. None leaves it as it is, at first ``-inf``.

    Returns:
        Whether it is served.

    Raises:
        RuntimeError: with ``replace``, where another flash_attn is imported already.
    """
    other = _installed()
    if other is not None:
        if not replace:
            _log.warning(
                "flash_attn is installed at %s, and is used; flash_attn_plus serves it with --replace, or with "
                "flash_attn_plus.as_flash_attn.serve(replace=True)",
                other,
            )
            return False
        if "flash_attn" in sys.modules:
            raise RuntimeError(f"flash_attn was imported from {other} already: call serve() before that")
    if not is_serving():
        sys.meta_path.insert(0, _finder)
    if infinite_lse is not None:
        from flash_attn import flash_attn_interface

        flash_attn_interface.infinite_lse = infinite_lse
    return True


def stop() -> None:
    """Serve no longer; what was imported stays imported."""
    if is_serving():
        sys.meta_path.remove(_finder)


class _Served:
    """Reading it serves: as :func:`serve` was told to."""

    def __init__(self, *options: bool) -> None:
        self.options = options

    def __reduce__(self):
        return serve, self.options


def _serve_in_spawned_processes(*options: bool) -> None:
    """A process that multiprocessing spawns imports the program again. Before that it reads what it is told here."""
    told = spawn.get_preparation_data
    spawn.get_preparation_data = lambda name: {**told(name), __package__: _Served(*options)}


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_plus.as_flash_attn",
        description="Runs a program that imports flash_attn, with flash_attn_plus in its place.",
        usage="%(prog)s [--replace] [--infinite-lse] (script.py | -m module) [args...]",
    )
    parser.add_argument("--replace", action="store_true", help="also where flash-attn is installed")
    parser.add_argument(
        "--infinite-lse", action="store_true", default=None, help="+inf for queries that see no key, as flash-attn 2"
    )
    parser.add_argument("-m", dest="module", metavar="module", help="a module, as with python -m")
    # What stands behind the program is the program's.
    count = 0
    while count < len(args) and args[count].startswith("-") and not re.match("-m", args[count]):
        count += 1
    own, program = args[:count], list(args[count:])
    if program and program[0].startswith("-m") and program[0] != "-m":
        program[:1] = ["-m", program[0][2:]]
    options = parser.parse_args(own)
    if program[:1] == ["-m"]:
        if len(program) < 2:
            parser.error("-m: expected the name of a module")
        options.module, options.script, options.args = program[1], None, program[2:]
    elif program:
        options.module, options.script, options.args = None, program[0], program[1:]
    else:
        parser.error("expected script.py or -m module")
    return options


def main(args: Sequence[str] | None = None) -> None:
    options = _parse(sys.argv[1:] if args is None else args)
    # As python script.py, or python -m module; before anything looks for an installed flash-attn there.
    folder = os.getcwd() if options.script is None else str(Path(options.script).resolve().parent)
    if sys.path[:1] in ([""], [os.getcwd()]):  # of python -m
        del sys.path[0]
    sys.path.insert(0, folder)
    if serve(options.replace, options.infinite_lse):
        _serve_in_spawned_processes(options.replace, options.infinite_lse)
    if options.module is not None:
        sys.argv = [options.module, *options.args]
        runpy.run_module(options.module, run_name="__main__", alter_sys=True)
        return
    sys.argv = [options.script, *options.args]
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    # Programs import this module under its own name: it must be this one, with this finder.
    import flash_attn_plus

    serve.__module__ = f"{flash_attn_plus.__name__}.as_flash_attn"
    sys.modules[serve.__module__] = flash_attn_plus.as_flash_attn = sys.modules[__name__]
    main()
else:
    serve()
