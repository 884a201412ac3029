"""How results are shown: tables, sizes, progress bars."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from isobit.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

PATIENCE = 1.0
"""Seconds that a person waits without a word before :func:`busy` shows one."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """A Markdown table, aligned so that it reads well as it is.

    The first column is on the left, as are those named in ``left``; the others on the right.
    """
    on_left = [i == 0 or name in left for i, name in enumerate(header)]
    cells = [[c.replace("|", "\\|") for c in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = ["-" * w if on_left[i] else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [
        [
            c.ljust(w) if on_left[i] else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


FORMATS = ("table", "md")
"""How a table can be printed: fitted to the terminal and coloured, or in Markdown."""

_STYLES = {
    "identical": "green",
    "passed": "green",
    "discharged": "green",
    "faulty": "bold red",
    "failing": "bold red",
    "refused": "bold red",
    "propagated": "yellow",
    "not run": "yellow",
    "not replayed": "yellow",
}
"""Of a cell that is, or begins with, one of these words."""


def add_format(parser: argparse._ActionsContainer) -> None:
    """How tables are printed."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="tables fitted to the terminal, or Markdown (default: table on a terminal, else md)",
    )


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    form: str | None = None,
    *,
    drop: Sequence[str] = (),
    left: Sequence[str] = (),
) -> None:
    """Print a table; ``form`` is what :func:`add_format` asks for, ``left`` as for markdown.

    On a terminal that is too narrow the columns named in ``drop`` are left out, the first of them
    first, and a line says so; what is still too wide is folded within its cells.
    """
    rows = [[printable(cell) for cell in row] for row in rows]  # a file may say anything
    if form == "md" or (form is None and not sys.stdout.isatty()):
        print(markdown(header, rows, left))
        return
    from rich.console import Console  # noqa: PLC0415 - 0.2 s that most calls do not need

    console = Console(highlight=False)
    print_fitted(console, header, rows, drop, left)


def print_document(text: str, form: str | None = None) -> None:
    """Print Markdown, laid out for a terminal; ``form`` is what :func:`add_format` asks for."""
    if form == "md" or (form is None and not sys.stdout.isatty()):
        print(text, end="")
        return
    from rich.console import Console  # noqa: PLC0415 - 0.2 s that most calls do not need
    from rich.markdown import Markdown  # noqa: PLC0415

    Console(highlight=False).print(Markdown(shown_as_is(text)))


def print_fitted(
    console: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    drop: Sequence[str] = (),
    left: Sequence[str] = (),
) -> None:
    """A table as wide as the console at most; see :func:`print_table`."""
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    kept = list(range(len(header)))
    widths = [max([len(header[i]), *(len(row[i]) for row in rows)]) for i in kept]
    left_out = []
    for name in drop:
        if sum(widths[i] + 3 for i in kept) <= console.width + 3:  # two spaces and a rule
            break
        if name in header:
            kept.remove(list(header).index(name))
            left_out.append(name)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for i in kept:
        side: Literal["left", "right"] = "left" if i == 0 or header[i] in left else "right"
        table.add_column(header[i], justify=side, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[i], style=verdict_style(row[i])) for i in kept))
    console.print(table)
    if left_out:
        console.print(f"left out for want of room: {', '.join(left_out)}", style="dim")


def verdict_style(cell: str) -> str:
    """The colour of a cell that is a verdict; "" for any other."""
    return next((style for word, style in _STYLES.items() if cell.startswith(word)), "")


def size(nbytes: float) -> str:
    """A number of bytes in words: "20.4 MB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def count(n: int, what: str) -> str:
    """A number of things in words: "1 token", "1,024 tokens"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


_VISIBLE = {c: repr(chr(c))[1:-1] for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"}


def shown_as_is(text: str) -> str:
    """Text of a model for a terminal, where control characters are commands: these escaped."""
    return text.translate(_VISIBLE)


def visible(text: str, limit: int = 80) -> str:
    """Text from a file on one line: control characters escaped, cut after ``limit`` characters."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    return printable(cut)


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
        redirect_stdout=False,  # what is printed is for stdout, which may be a file
        auto_refresh=False,
        disable=not sys.stderr.isatty(),
    )


@contextmanager
def bar(text: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A :func:`progress_bar` of one line; gives ``step(done, total)``."""
    with progress_bar() as progress:
        task = progress.add_task(text, total=None)

        def step(done: int, total: int) -> None:
            shown = f"{text} {done:,} of {total:,}{unit and ' ' + unit}"
            progress.update(task, completed=done, total=total, description=shown)
            progress.refresh()

        yield step


@contextmanager
def busy(text: str) -> Iterator[Callable[[str], None]]:
    """A turning wheel on stderr while something works; gives a function that changes its text.

    It comes after a second, leaves nothing behind, and shows nothing if stderr is no terminal. It
    has a thread of its own, so the steps of a benchmark take :func:`progress_bar` instead.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    latest = [text]
    shown: list[tuple[Progress, TaskID]] = []

    def show() -> None:
        from rich.console import Console  # noqa: PLC0415 - 0.2 s that most calls do not need
        from rich.progress import (  # noqa: PLC0415
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        progress = Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            refresh_per_second=4,
        )
        shown.append((progress, progress.add_task(visible(latest[0]), total=None)))
        progress.start()

    def change(text: str) -> None:
        latest[0] = text
        for progress, task in shown:
            progress.update(task, description=visible(text))

    timer = threading.Timer(PATIENCE, show)
    timer.daemon = True
    timer.start()
    try:
        yield change
    finally:
        timer.cancel()
        timer.join()
        for progress, _ in shown:
            progress.stop()
