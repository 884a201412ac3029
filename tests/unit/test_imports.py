"""Imports point one way: each part of the package imports only what stands below it.

Checked on the syntax tree, so imports inside functions, which run late, count as well.
"""

import ast
from pathlib import Path

import pytest

import isobit

PACKAGE = Path(isobit.__file__).parent

# Lowest first; parts in one row do not import each other. A module belongs to the longest prefix.
ROWS = [
    ["errors", "backend_names"],
    ["arguments"],
    ["files", "machine"],
    ["config", "gguf", "hub"],
    ["numerics", "text"],
    ["backends.cpu._cpu", "backends.hardware"],
    ["backends.cpu.sampler", "model"],
    ["backends.base.draws", "backends.base.kv_pages", "backends.base.workspace"],
    ["backends.base"],
    ["backends.base.device_rows"],
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
        ("backends.reference.forward", "from isobit.backends.cpu import CpuBackend"),
        ("backends.base", "from isobit.backends import open_backend"),
        ("runtime.model", "from importlib import import_module\nimport_module('isobit.cli.run')"),
        ("bench", "from isobit.cli import say"),
    ],
)
def test_the_check_itself_sees_a_wrong_import(module: str, source: str) -> None:
    assert len(wrong(module, source)) == 1
