"""Makes the last part of docs/architecture.md: a sentence a module, the first of its docstring.

Kernels have theirs in the comment that they begin with. The files of an operation are a row.

usage: python -m tests.unit.record_modules
"""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "src" / "isobit"
TITLE = "\n## Every module\n"
BACKENDS = "cpu", "cuda", "wgpu"
OPS = "numerics/ops"


def main() -> None:
    PAGE.write_text(whole(PAGE.read_text("utf-8")), "utf-8")


def whole(text: str) -> str:
    """The page with that part as the sources have it."""
    return text.partition(TITLE)[0] + TITLE + "\n" + "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "Made by `python -m tests.unit.record_modules`; a test holds it to the sources."
    ops = {Path(f"backends/{b}/ops") for b in BACKENDS}
    for folder in sorted({p.parent for p in _sources()}):
        about = _sentence(PACKAGE / folder / "__init__.py")
        if folder in ops:
            continue
        yield f"\n### `{folder.as_posix()}/`\n" if folder.name else "\n### `isobit`\n"
        if about:
            yield f"{fill(about, 100, break_on_hyphens=False)}\n"
        if folder.as_posix() == OPS:
            yield from _operations()
            continue
        yield "| | |\n|---|---|"
        for name, sentence in _files(folder).items():
            yield f"| `{name}` | {sentence} |"


def _operations() -> Iterator[str]:
    """A row a kind: what it is, and what each backend has of it."""
    rows: dict[str, dict[str, str]] = {}
    for b in BACKENDS:
        for name, _ in _files(Path(f"backends/{b}/ops")).items():
            stem, _, endings = name.partition(".")
            rows.setdefault(stem, {})[b] = endings
    said = _files(Path(OPS))
    heads = (f"`backends/{b}/ops`" for b in BACKENDS)
    yield f"| `{OPS}` | | {' | '.join(heads)} |\n|---|---|---|---|---|"
    for name, sentence in said.items():
        there = rows.pop(name.removesuffix(".py"), {})
        yield _row(name, sentence, there)
    yield "\nWhat several of them need, and kernels of an operation beside its own:\n"
    yield "| | | cpu | cuda | wgpu |\n|---|---|---|---|---|"
    for stem, there in sorted(rows.items()):
        b = next(b for b in ("cuda", "wgpu", "cpu") if b in there)
        yield _row(stem, _files(Path(f"backends/{b}/ops"))[f"{stem}.{there[b]}"], there)


def _row(name: str, sentence: str, there: Mapping[str, str]) -> str:
    cells = (f"`.{there[b]}`" if b in there else "" for b in BACKENDS)
    return f"| `{name}` | {sentence} | {' | '.join(cells)} |"


def _files(folder: Path) -> dict[str, str]:
    """Names of a folder's sources, one for those that differ in their endings, and sentences."""
    of: dict[str, list[Path]] = {}
    for path in _sources():
        if path.parent == folder and path.name != "__init__.py":
            of.setdefault(path.name.partition(".")[0], []).append(path)
    found = {}
    for stem, paths in of.items():
        endings = [p.name.removeprefix(f"{stem}.") for p in paths]
        name = f"{stem}.{endings[0]}" if len(endings) == 1 else f"{stem}.{{{','.join(endings)}}}"
        found[name] = next(filter(None, (_sentence(PACKAGE / p) for p in paths)), "")
    return found


@cache
def _sources() -> list[Path]:
    found = (p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.*") if "vendor" not in p.parts)
    endings = (".py", ".cpp", ".h", ".cu", ".cuh", ".wgsl", ".js")
    order = {".py": 0, ".h": 1}
    return sorted(
        (p for p in found if p.suffix in endings),
        key=lambda p: (p.with_suffix(""), order.get(p.suffix, 2)),
    )


def _sentence(path: Path) -> str:
    """The first sentence of a docstring, or of the comment that a kernel begins with."""
    if not path.exists():
        return ""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = re.match(r"(?:// .*\n)*", text)
        said = re.sub("^// ", "", lines[0] if lines else "", flags=re.MULTILINE)
    first = re.match(r"(?:[^.]|\.(?!\s|$))*\.?", " ".join(said.split("\n\n")[0].split()))
    return re.sub(
        r":\w+:`~?([^`]+)`", r"`\1`", (first[0] if first else "").replace("``", "`")
    ).replace("|", "\\|")


if __name__ == "__main__":
    main()
