"""Print the include directory of the installed torch without importing it, or say on stderr why there is none.

torch is never a build requirement: that would download gigabytes into every isolated build. Under pip's build
isolation the outer environment is off sys.path, but the interpreter is still its own, so its site-packages are also
looked at by path.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

OLDEST = (2, 11)
HEADER = "include/torch/csrc/stable/library.h"


def candidates() -> Iterator[Path]:
    """Directories where a torch package may lie, the one that would be imported first."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    prefixes = [os.environ[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    sites = [Path(prefix, "lib", python, "site-packages") for prefix in prefixes]
    sites += [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    sites += [Path(path) for path in site.getsitepackages()]
    for path in sites:
        yield path / "torch"


def version_of(package: Path) -> tuple[int, int] | None:
    """(major, minor) of the torch package in a directory; None when there is none."""
    try:
        text = (package / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"""^__version__\s*(?::[^=]*)?=\s*['"](\d+)\.(\d+)""", text, re.MULTILINE)
    return (int(match[1]), int(match[2])) if match else None


def find(packages: Iterable[Path]) -> tuple[Path | None, str]:
    """(include directory, "") of the first usable torch, else (None, the reason)."""
    reasons: list[str] = []
    oldest = ".".join(map(str, OLDEST))
    for package in packages:
        version = version_of(package)
        if version is None:
            continue
        found = ".".join(map(str, version))
        if version < OLDEST:
            reason = f"torch {found} in {package} is too old, {oldest} or newer is needed"
        elif not (package / HEADER).is_file():
            reason = f"torch {found} in {package} comes without its headers ({HEADER})"
        else:
            return package / "include", ""
        if reason not in reasons:
            reasons.append(reason)
    return None, "; ".join(reasons) or "torch is not installed for this Python"


if __name__ == "__main__":
    include, why = find(candidates())
    if include is None:
        sys.exit(why)
    print(include)
