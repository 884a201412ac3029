"""Imports point one way: each part of the package imports only what stands below it.

Checked on the syntax tree, so imports inside functions, which run late, count as well.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import isobit

PACKAGE = Path(isobit.__file__).parent

# Lowest first; parts in one row do not import each other. A module belongs to the longest prefix.
ROWS = [
    ["arrays", "errors", "backend_names"],
    ["arguments"],
    ["files", "machine"],
    ["config", "gguf", "hub"],
    ["numerics", "text"],
    ["backends.cpu._cpu", "backends.hardware"],
    ["backends.cpu.sampler", "model"],
    ["backends.base.draws", "backends.base.kv_pages", "backends.base.workspace"],
    ["backends.base.batch"],
    ["backends.base"],
    ["backends.base.row_results"],
    ["backends.reference", "backends.cpu", "backends.cuda", "backends.wgpu"],
    ["backends"],
    ["runtime"],
    ["verify", "inspect", "bench", "convert"],
    ["contracts", "server"],
    ["cli"],
    ["__init__"],
    ["__main__"],
]
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}
ONLY = {"text": {"text", "gguf", "arguments", "errors"}}  # what the rows alone do not say


def part_of(module: str) -> str:
    """The part that a module name (without "isobit.") belongs to."""
    names = module.split(".")
    prefixes = (".".join(names[:n]) for n in range(len(names), 0, -1))
    return next((p for p in prefixes if p in RANK), module)


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or any(path.with_suffix(end).exists() for end in (".py", ".pyi"))


def imported(source: str) -> set[str]:
    """Modules of the package that a source file imports, without "isobit."."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if is_module(inner.removeprefix("isobit.")) else module)
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            first = node.args[0]  # a name put together at run time stays within its package
            text = first.values[0] if isinstance(first, ast.JoinedStr) else first
            if isinstance(text, ast.Constant):
                found.add(str(text.value).rstrip("."))
    names = {n for n in found if n.split(".")[0] == "isobit"} - {"isobit"}
    return {n.removeprefix("isobit.") for n in names}


def wrong(module: str, source: str) -> list[str]:
    part = part_of(module)
    below = [
        name
        for name in sorted(imported(source))
        if (target := part_of(name)) != part
        and (RANK[target] >= RANK[part] or target not in ONLY.get(part, {target}))
    ]
    return [f"isobit.{module} imports isobit.{name}" for name in below]


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert part_of(module) in RANK, f"isobit.{module}: give it a place in ROWS"
    assert wrong(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "import isobit.config"),
        ("gguf.reader", "from isobit.numerics import matmul"),
        ("text.tokenizer", "from isobit import config"),
        ("numerics.matmul", "def f():\n    from isobit.backends import base"),
        ("backends.reference.backend", "from isobit.backends.cpu import CpuBackend"),
        ("backends.base", "from isobit.backends import open_backend"),
        ("runtime.model", "from importlib import import_module\nimport_module('isobit.cli.run')"),
        ("bench", "from isobit.cli import say"),
    ],
)
def test_the_check_itself_sees_a_wrong_import(module: str, source: str) -> None:
    assert is_module(module)
    assert len(wrong(module, source)) == 1


@pytest.mark.parametrize("part", [*RANK, *ONLY])
def test_the_rows_name_what_is_there(part: str) -> None:
    assert is_module(part), f"{part}: no module of isobit; right or remove it"


HEAVY = {
    *("asyncio", "cuda", "huggingface_hub", "jinja2", "llguidance", "pydantic", "rich"),
    *("safetensors", "starlette", "subprocess", "tempfile", "transformers", "uvicorn", "wgpu"),
}
"""What takes 4 to 200 ms to import."""


@pytest.mark.parametrize(
    ("modules", "also"),
    [
        ("isobit.__main__, isobit.cli", {"numpy", "tokenizers", "isobit.runtime"}),
        ("isobit.cli.run", set()),
        ("isobit.runtime.model, isobit.backends.cpu.backend", set()),
        ("isobit.backends.cuda, isobit.runtime.model", set()),
    ],
)
def test_what_a_start_does_not_need_is_not_imported(modules: str, also: set[str]) -> None:
    code = f"import sys, {modules}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY.union(also).intersection(done.stdout.split()) == set()


def names_in(module: str) -> set[str]:
    """What can be imported from a module of the package: names it binds, and modules within."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    inner = {p.stem for p in path.iterdir()} if path.is_dir() else set()
    files = (path / "__init__.py", path.with_suffix(".py"), path.with_suffix(".pyi"))
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        return inner
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            inner |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            inner.add(node.id)
    return inner


BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_what_benchmarks_import_is_there(path: Path) -> None:
    """They are run by hand, some on other machines: a name that has gone would show there."""
    asked = {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("isobit.")
        for alias in node.names
    }
    assert sorted(f"{m}.{name}" for m, name in asked if name not in names_in(str(m))) == []


def test_there_are_benchmarks() -> None:
    assert len(BENCHMARKS) > 20
    assert "no_such_name" not in names_in("isobit.runtime.model")
