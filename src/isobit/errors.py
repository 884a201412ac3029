"""The few exceptions isobit raises on purpose.

Each says what went wrong in one line: what was expected, what was found and, where there is
something to do about it, what to do. The command line prints that line and ends with the
exception's ``exit_code``; a traceback therefore always means a bug in isobit.
"""

import difflib
import os
import reprlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'run'?" if a known word is close to the one found, or goes on from it."""
    words = list(known)
    longer = [w for w in words if len(word) > 2 and w.startswith(word)]
    near = longer or difflib.get_close_matches(word[:100], words, 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def no_such_file(path: str | os.PathLike[str], *others: str) -> str:
    """ "no such file: 'smaple'", with a name that is close, among ``others`` or in its folder."""
    shown, file = os.fspath(path), Path(path)
    hint = "" if file.name != shown else did_you_mean(shown, others)
    with suppress(OSError, ValueError):
        names = [] if hint else [p.name for p in file.parent.iterdir()]
        for near in difflib.get_close_matches(file.name[:100], names, 1, 0.75):
            hint = f"; did you mean {str(file.with_name(near))!r}?"
    return f"no such file: {shown!r}{hint}"


def printable(text: str) -> str:
    """A text that may come from a file, for a line: control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A value for a message: on one line, and short whatever it is; None is "nothing"."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:59] + "…")
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = _SHORT.repr(value[:60] if isinstance(value, (bytes, bytearray)) else value)
    except Exception:
        text = type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:79] + "…"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class IsobitError(Exception):
    """Base class: catch this to catch everything isobit raises on purpose."""

    exit_code = 1


class GateFailed(IsobitError):
    """A comparison or check that was asked for did not hold."""

    exit_code = 1


class UsageError(IsobitError, ValueError):
    """An argument is missing, malformed or out of range."""

    exit_code = 2


class ModelRefused(IsobitError):
    """A model file is damaged, hostile, or asks for something that is not implemented."""

    exit_code = 3


class BackendUnavailable(IsobitError):
    """The requested backend cannot run on this machine."""

    exit_code = 4


class CacheLost(BackendUnavailable):
    """What was in the KV cache is gone, and is to be run again; the backend works."""


class FileRefused(IsobitError):
    """A trace, receipt or text file is damaged, or of another kind than expected."""

    exit_code = 3


class NothingCompared(IsobitError):
    """A comparison that could only have passed vacuously: nothing in it, or not what was asked."""

    exit_code = 5


class NotRun(IsobitError):
    """A measure could not be taken: a model, device or dependency is missing. Never a pass."""

    exit_code = 6


class ContextFull(IsobitError):
    """A sequence needs more positions than its KV cache holds."""

    exit_code = 2
