"""How results are shown: tables, sizes, a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned so that it reads well as it is; columns after the first right."""
    cells = [[c.replace("|", "\\|") for c in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    lines = [
        [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size(nbytes: float) -> str:
    """A number of bytes in words: "20.4 MB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def visible(text: str, limit: int = 80) -> str:
    """Text from a file on one line: control characters escaped, cut after ``limit`` characters."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def progress_bar() -> Progress:
    """A bar on stderr that leaves nothing behind, and shows nothing if that is no terminal.

    It is drawn when it is told of progress and by no thread of its own, which would disturb what
    is being timed.
    """
    from rich.console import Console  # noqa: PLC0415 - 0.2 s that most calls do not need
    from rich.progress import Progress  # noqa: PLC0415

    return Progress(
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
        disable=not sys.stderr.isatty(),
    )
