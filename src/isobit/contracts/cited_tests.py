"""Tests that a contract cites by name: ``file::Class::test``, ``pytest -k``, ``cargo test``."""

import ast
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from isobit.contracts.document import Document, Key

_PYTEST = re.compile(r"\bpytest\b([^\n|;&>)`]*)")
_PYTHON = re.compile(r"(?<![\w./-])(?:[\w./-]+\.py|(?:[\w.-]+/)+[\w.-]*)")
_CARGO = re.compile(r"\bcargo (?:test|nextest run)\b([^\n|;&>)`]*)")
_SELECTED = re.compile(r"(?:^|\s)-k[ =]?(?:'([^']*)'|\"([^\"]*)\"|(\S+))")
_KEYWORDS = ("and", "or", "not")
_CRATE = re.compile(r"(?:^|\s)(?:-p|--package)[ =]([\w-]+)")
_TARGET = re.compile(r"(?:^|\s)--test[ =]([\w-]+)")
_VALUED = (
    "bench|bin|color|config|exclude|example|features|jobs|manifest-path|message-format|package"
    "|profile|target|target-dir|test|test-threads|format|logfile"
)
_TAKES_VALUE = re.compile(rf"-[pFjZC]|--(?:{_VALUED})")
"""Options of ``cargo test``, and of what it runs, whose value is a word of its own."""
_FILTER = re.compile(r"\w+(?:::\w+)*(?:::)?")
_COMMENT = re.compile(r"//.*")


def check(document: Document, root: Path, at: Key, text: str) -> None:
    """Add a finding for each test of a command line in a text that is not in the repository."""
    for line in _PYTEST.findall(text):
        _selected(document, root, at, line)
    for line in _CARGO.findall(text):
        _target(document, root, at, line)


def check_names(document: Document, at: Key, file: Path, shown: str, names: Sequence[str]) -> None:
    """Add a finding for the first of ``names``, outermost first, that a file does not define, or
    that pytest is told not to run, or to let fail."""
    text = file.read_text("utf-8", errors="replace") if names and file.is_file() else ""
    part = _parsed(text) if file.suffix == ".py" else None
    marks = _marks(part)
    for name in names:  # a folder has none
        if file.suffix == ".py":
            part = _defined(part, name)
            there, marks = part is not None, marks + _marks(part)
        else:
            there = bool(re.search(rf"\b(fn|mod|struct|class) {name}\b", _COMMENT.sub("", text)))
        mark = _NOT_RUN.search(marks)
        if not there or mark:
            what, why = ("", "not there") if mark is None else (" that is run", f"marked {mark[1]}")
            message = f"expected a test of {shown}{what}, got {name}, which is {why}"
            document.find("cited-test", message, at)
            return


_DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_NOT_RUN = re.compile(r"(?:^|\.)(skip|xfail|expectedFailure)\b", re.M)


def _parsed(text: str) -> ast.AST | None:
    """A file of Python; None for what is none."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined(part: ast.AST | None, name: str) -> ast.AST | None:
    """The function or class of a name within a part of a file; the last one, as Python has it."""
    inside = [] if part is None else [*ast.walk(part)]
    return next((n for n in reversed(inside) if isinstance(n, _DEFINES) and n.name == name), None)


def _marks(part: ast.AST | None) -> str:
    """The decorators of a test or a class, and what a class or a file has as ``pytestmark``."""
    marks: list[ast.AST] = [*getattr(part, "decorator_list", [])]
    for line in getattr(part, "body", []):
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "pytestmark":
            marks.append(line.value)
    return "\n".join(["", *map(ast.unparse, marks)])


def is_there(file: Path) -> bool:
    """Whether there is such a file; there is none of a name that is longer than names can be."""
    try:
        return file.exists()
    except OSError:
        return False


def _selected(document: Document, root: Path, at: Key, line: str) -> None:
    """``pytest -k``: each word is in the name of a test, a class or a file of those named."""
    expressions = ["".join(groups) for groups in _SELECTED.findall(line)]
    if not expressions:
        return
    named = [root / p for p in _PYTHON.findall(_SELECTED.sub(" ", line)) if is_there(root / p)]
    if not named and not (root / "tests").is_dir():
        return
    there = "\n".join(_test_names(named or [root / "tests"])).lower()
    for word in dict.fromkeys(re.findall(r"\w+", " ".join(expressions))):
        if document.full:
            return
        if word not in _KEYWORDS and word.lower() not in there:
            message = f"expected a test that pytest -k {word} selects, found none"
            document.find("cited-test", message, at)


def _test_names(named: Sequence[Path]) -> Iterator[str]:
    """Names of files and what their texts say: parameters, too, have a part in a test's name."""
    for path in named:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield file.stem
            yield file.read_text("utf-8", errors="replace")


def _target(document: Document, root: Path, at: Key, line: str) -> None:
    """``cargo test``: the target of ``--test`` is there, and each filter selects something."""
    manifests = _manifests(root)
    crates = {m.parent.name: m for m in manifests}
    texts = {m: m.read_text("utf-8", errors="replace") for m in manifests}
    for crate in _CRATE.findall(line):
        owners = [m for m, t in texts.items() if re.search(rf'name *= *"{crate}"', t)]
        if not owners and crate not in crates:
            return  # another repository's
        manifests = owners or [crates[crate]]
    for name in _TARGET.findall(line):
        homes = [m.parent / "tests" for m in manifests]
        there = any((h / f"{name}.rs").is_file() or (h / name / "main.rs").is_file() for h in homes)
        if not there and not any(f'"{name}"' in texts[m] for m in manifests):
            message = f"expected tests that cargo test --test {name} runs, found no tests/{name}.rs"
            document.find("cited-test", message, at)
    for name in _filters(line) if manifests else []:
        words = {word for m in manifests for word in _rust_words(m.parent)}
        if not all(any(part in word for word in words) for part in name.split("::")):
            message = f"expected a test that cargo test {name} selects, found none"
            document.find("cited-test", message, at)


def _manifests(root: Path) -> list[Path]:
    found = [root / "Cargo.toml", *root.glob("*/Cargo.toml"), *root.glob("*/*/Cargo.toml")]
    return [m for m in found if m.is_file()]


def _filters(line: str) -> Iterator[str]:
    """The names that a command line gives, before its ``--`` or after; not the values of options,
    nor of ``--skip``."""
    words = line.split()
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("#") or word in ("Expect", "Asserts"):
            return  # the rest is a comment
        if before == "--skip" or _TAKES_VALUE.fullmatch(before):
            continue
        if _FILTER.fullmatch(word):
            yield word


@lru_cache(maxsize=64)
def _rust_words(folder: Path) -> frozenset[str]:
    """Every word of a crate's Rust files and their names, comments left out: a macro may make a
    test's name from any of them."""
    found: set[str] = set()
    for file in sorted(folder.rglob("*.rs")):
        found |= {*file.relative_to(folder).parts[:-1], file.stem}
        found |= set(re.findall(r"\w+", _COMMENT.sub("", file.read_text("utf-8", "replace"))))
    return frozenset(found)
