"""The documentation: its Python runs, its links exist, both languages say the same, it names the files that exist."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import flash_attn_plus
from flash_attn_plus import native
from flash_attn_plus.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(flash_attn_plus.__file__).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TRANSLATED = {
    page: chinese
    for page in PAGES
    for chinese in (
        page.with_name(f"{page.stem}_CN.md"),
        page.with_name(f"{page.stem}_cn.md"),
        page.with_name(f"{page.stem.removesuffix('_en')}.md"),
    )
    if chinese in PAGES and chinese != page
}
ARCHITECTURE = ROOT / "docs" / "architecture.md"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^(#+) +(.+)$", re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*\n?)+", re.MULTILINE)
RUNNABLE = ("python", "sh")


def named(pages: list[Path]) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def prose(page: Path) -> str:
    """A page without its code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives a page's headings."""
    slugs = (re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in HEADING.findall(prose(page)))
    return set(slugs)


class Structure(NamedTuple):
    heading_levels: list[int]
    rows_and_columns_of_tables: list[list[int]]
    languages: list[str]
    links: int


def structure(page: Path) -> Structure:
    text = prose(page)
    tables = [[row.replace(r"\|", "").count("|") for row in table.splitlines()] for table in TABLE.findall(text)]
    languages = [language for language, _ in blocks(page)]
    return Structure([len(marks) for marks, _ in HEADING.findall(text)], tables, languages, len(LINK.findall(text)))


# Translations hold the same code, which TestTranslation sees to.
PYTHON = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    if page not in TRANSLATED.values()
    for number, (language, code) in enumerate(blocks(page), 1)
    if language == "python"
]


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs_as_written(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor needs a C++ compiler, which a machine that runs these tests need not have.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    if "as_flash_attn" in code:
        run_with_the_front_door(script)
        return
    runpy.run_path(str(script), run_name="__main__")


def run_with_the_front_door(script: Path) -> None:
    """In a process of its own: whatever imports flash_attn later would be served."""
    spec = importlib.util.find_spec("flash_attn")
    if spec is not None and spec.origin and not Path(spec.origin).is_relative_to(PACKAGE):
        pytest.skip("flash-attn is installed, and stays in its place")
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not native.loaded(), reason="the sample was printed where the native library is built")
def test_the_sample_of_explain_is_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    contents = [content for _, content in blocks(ROOT / "README.md")]
    code = next(i for i, content in enumerate(contents) if "explain(" in content)
    script = tmp_path / "block.py"
    script.write_text(contents[code], encoding="utf-8")
    runpy.run_path(str(script))
    printed, sample = (
        re.sub(r"\w+ kernel$", "_ kernel", s.strip()) for s in (capsys.readouterr().out, contents[code + 1])
    )
    assert printed == sample


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        destination = (page.parent / path).resolve() if path else page
        assert destination.exists(), f"{page.name}: {target}"
        assert not fragment or fragment in anchors(destination), f"{page.name}: {target}"


def test_the_translations_are_all_found() -> None:
    assert {page.name for page in TRANSLATED} == {
        "README.md",
        "architecture.md",
        "flaggems_analysis_report_en.md",
        "migrating.md",
        "performance.md",
        "troubleshooting.md",
        "vendors.md",
    }


@pytest.mark.parametrize("page", named(list(TRANSLATED)))
class TestTranslation:
    def test_has_the_same_structure(self, page: Path) -> None:
        assert structure(TRANSLATED[page]) == structure(page)

    def test_has_the_same_code(self, page: Path) -> None:
        english, chinese = ([b for b in blocks(p) if b[0] in RUNNABLE] for p in (page, TRANSLATED[page]))
        assert chinese == english

    def test_names_the_same_things(self, page: Path) -> None:
        """Functions, options and files stand in backquotes, which are not translated."""
        english, chinese = (set(re.findall(r"`([^`\n]+)`", prose(p))) for p in (page, TRANSLATED[page]))
        assert chinese == english


@pytest.mark.parametrize("page", named([ARCHITECTURE, TRANSLATED[ARCHITECTURE]]))
class TestArchitecture:
    def test_lists_exactly_the_modules_that_exist(self, page: Path) -> None:
        tree = blocks(page)[0][1]
        listed = re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE)
        assert sorted(listed) == sorted(path.name for path in PACKAGE.glob("*.py"))

    def test_gives_every_module_a_floor(self, page: Path) -> None:
        floors = TABLE.findall(prose(page))[0].splitlines()[2:]
        placed = [name for row in floors for name in re.findall(r"`(\w+)`", row.split("|")[2])]
        assert sorted(placed) == sorted(path.stem for path in PACKAGE.glob("*.py"))

    def test_shows_the_schemas_as_they_are(self, page: Path) -> None:
        text = next(content for _, content in blocks(page) if content.startswith("<variant>"))
        definitions, operators = text.split("\n\n")
        parts = dict(re.findall(r"^(<\w+>)\s+(.*?)(?=^<|\Z)", definitions, re.MULTILINE | re.DOTALL))
        for name, part in parts.items():
            operators = operators.replace(name, " ".join(part.split()))
        shown = dict(re.findall(r"^(\w+)(\(.*)$", operators, re.MULTILINE))
        assert shown == {name: schema for name, schema in SCHEMAS.items() if not name.startswith("_")}


def test_readme_names_every_public_function() -> None:
    text = prose(ROOT / "README.md")
    assert [name for name in flash_attn_plus.__all__ if f"`{name}`" not in text] == []
