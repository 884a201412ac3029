"""Markdown: prose within 100 columns, and links that lead somewhere. Files that sources name."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import isobit
from tests.unit import record_modules

ROOT = Path(__file__).parents[2]
PACKAGE = Path(isobit.__file__).parent
WIDTH = 100


ELSEWHERE = {"ggml-common.h", "modeling_rope_utils.py", "llama.cpp", "NAME.simd.cpp", "ops/KIND.py"}
"""Files of other projects, that one itself, and names that stand for any."""


def documents() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    found = [ROOT / name for name in names] or [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    return [path for path in found if path.is_file()]


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, but for code and tables."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.lstrip().startswith("|") and not line.startswith("    "):
            yield number, line


def too_long(text: str) -> list[int]:
    """Of prose; a line of one word cannot be shorter."""
    return [n for n, line in prose(text) if len(line) > WIDTH and len(line.split()) > 1]


def anchors(text: str) -> set[str]:
    """What headings are called in links, as code hosts make it of them."""
    titles = [line.lstrip("#").strip() for _, line in prose(text) if line.startswith("#")]
    kept = [re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", title.lower())) for title in titles]
    return {title.replace(" ", "-") for title in kept}


def broken(path: Path, text: str) -> list[str]:
    """Links to files that are not there, and to headings that are not in them."""
    found = []
    without_code = "\n".join(re.sub(r"`[^`]*`", "", line) for _, line in prose(text))
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code + _tables(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        to = (path.parent / name) if name else path
        if not to.exists() or (anchor and anchor not in anchors(to.read_text())):
            found.append(link)
    return found


def _tables(text: str) -> str:
    rows = (line for line in text.splitlines() if line.lstrip().startswith("|"))
    return "\n".join(re.sub(r"`[^`]*`", "", row) for row in rows)


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_document(path: Path) -> None:
    text = path.read_text()
    assert too_long(text) == [], "lines to wrap"
    assert broken(path, text) == []


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_paths_in_it_are_there(name: str) -> None:
    """``X``, ``KIND`` and ``B`` stand for any; names in a sentence about a folder are of it."""
    text = (ROOT / name).read_text()
    paths = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.(?:py|h|md|json))?)`", text)
    assert len(paths) > 10
    missing = [
        path for path in paths if not (ROOT / path).exists() and not any(PACKAGE.glob(f"**/{path}"))
    ]
    assert missing == []


def test_every_module_is_named_with_its_sentence() -> None:
    text = record_modules.PAGE.read_text("utf-8")
    assert text == record_modules.whole(text), "run python -m tests.unit.record_modules"
    for path in PACKAGE.rglob("*.py"):
        assert path.name == "__init__.py" or re.search(rf"^\| `{path.stem}[.`]", text, re.M), path


def named(path: Path) -> set[str]:
    """Source files that a source speaks of: in comments, and but for Python, in strings."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        text = "\n".join(re.findall(r"#.*|\"{3}[\s\S]*?\"{3}", text))
    else:
        text = re.sub(r"#include.*", "", text)
    return set(
        re.findall(r"(?<![\w/.*{-])((?:\w+/)*[\w-]+(?:\.simd)?\.(?:py|cpp|cuh?))\b(?!\()", text)
    )


def test_files_that_sources_name_are_there() -> None:
    folders = (ROOT / name for name in ("src", "tests", "benchmarks"))
    files = {p.as_posix(): p for folder in folders for p in folder.rglob("*.*") if p.is_file()}
    sources = [
        p
        for p in files.values()
        if p.is_relative_to(ROOT / "src") and p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
    ]
    assert len(sources) > 400
    missing = [
        f"{source.relative_to(ROOT)}: {name}"
        for source in sources
        for name in named(source) - ELSEWHERE
        if not any(path.endswith(f"/{name}") for path in files)
    ]
    assert missing == []


def test_there_are_documents() -> None:
    assert {"README.md", "CONTRIBUTING.md"} <= {path.name for path in documents()}


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("# One, *two* `x`\n\n## Three\n")
    good = "[a](a.md) [b](#one-two-x) [c](a.md#three) [d](https://e.f/g) `[h](i)`\n| [j](a.md) |"
    assert broken(path, path.read_text() + good) == []
    bad = "[a](b.md) [b](#four) [c](a.md#four)\n\n| [d](c.md) |\n"
    assert broken(path, path.read_text() + bad) == ["b.md", "#four", "a.md#four", "c.md"]
    word = "x" * 60
    fenced = f"```\n{word} {word}\n```\n| {word} {word} |\n{word}{word}\n"
    assert too_long(fenced + f"{word} {word}\n") == [6]
    path = tmp_path / "a.cu"
    path.write_text(
        '#include "b.cuh"\n// See c.cpp. Or d/e.simd.cpp\nstatic_assert(X, "f.py knows");'
    )
    assert named(path) == {"c.cpp", "d/e.simd.cpp", "f.py"}
    path = tmp_path / "a.py"
    path.write_text('"""See c.cpp."""\nx = y.py()  # and d.py\n')
    assert named(path) == {"c.cpp", "d.py"}
