"""Types of arguments: what a text on the command line means, or why it is refused."""

import argparse
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from isobit.files import is_named_pipe


def output_file(path: str) -> str:
    """A file that a run writes at its end, refused before it begins if that will fail."""
    file = Path(path)
    found = "a folder" if file.is_dir() else "a named pipe" if is_named_pipe(file) else ""
    if not found and not file.parent.is_dir():
        found = f"no folder {str(file.parent)!r}"
    if found:
        raise argparse.ArgumentTypeError(f"cannot write {path!r}: expected a file, got {found}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {path!r}: no permission")
    return path


def whole_file(path: str) -> str:
    """:func:`output_file`, of what is written beside its place and renamed: over no device."""
    output_file(path)
    if Path(path).exists() and not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"cannot write {path!r}: expected a file, got a device")
    return path


def at_least(least: int, most: int | None = None, which: str | None = None) -> Callable[[str], int]:
    """An argument's type: a whole number that is not below ``least``, nor above ``most``; ``which``
    says so in other words."""
    which = which or (f"{least} or more" if most is None else f"{least} to {most}")

    def parse(text: str) -> int:
        with suppress(ValueError):
            if (n := int(text)) >= least and (most is None or n <= most):
                return n
        raise argparse.ArgumentTypeError(f"expected a whole number, {which}; got {cut(text)}")

    return parse


def whole(text: str) -> int:
    """An argument's type: a whole number; what it may be is the library's to say."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {cut(text)}") from None


def decimal(text: str) -> float:
    """An argument's type: a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {cut(text)}") from None


def share(text: str) -> float:
    """An argument's type: a share of a whole, 0 to 1."""
    with suppress(ValueError):
        if 0 <= (x := float(text)) <= 1:
            return x
    raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {cut(text)}")


def cut(text: str) -> str:
    """A text as a complaint shows it."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


def comma_list(text: str, complaint: str) -> list[int]:
    """Integers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{complaint}; got {cut(text)}") from None
