"""Checks of arguments: what is of another type or out of range is a UsageError that names it.

NumPy's numbers and truth values are as good as Python's own. A truth value is no number.
"""

import os
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from isobit.errors import UsageError, shown


def wrong(name: str, expected: str, found: object) -> UsageError:
    """What to raise for an argument."""
    return UsageError(f"{name}: expected {expected}, got {shown(found)}")


def whole(name: str, value: object, least: int, most: int | None = None, also: str = "") -> int:
    """An integer within bounds. ``also`` is what else may be given, for the message: " or None"."""
    if (n := _index(value)) is not None and least <= n and (most is None or n <= most):
        return n
    which = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
    which = f"{least} or {most}" if most == least + 1 else which
    raise wrong(name, which + also, value)


def number(name: str, value: object, least: float, most: float, expected: str = "") -> float:
    """A number within bounds, as it is given."""
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    if is_number and not isinstance(value, bool) and least <= value <= most:  # type: ignore[operator]
        return value  # type: ignore[return-value]
    raise wrong(name, expected or f"a number from {least:g} to {most:g}", value)


def flag(name: str, value: object) -> bool:
    """True or false."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise wrong(name, "True or False", value)


def text(name: str, value: object, also: str = "") -> str:
    """A string that UTF-8 can write."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise wrong(name, f"a text without lone surrogates{also}", value) from None
        return value
    raise wrong(name, f"a text{also}", value)


def texts(name: str, value: object) -> list[str]:
    """A list of texts that are not empty."""
    found = listed(name, value, "a list of texts")
    return [filled(name, item) for item in found]


def filled(name: str, value: object) -> str:
    """A text that is not empty."""
    if not text(name, value):
        raise wrong(name, "a text that is not empty", value)
    return str(value)


def listed(name: str, value: object, what: str = "a list") -> Sequence[object]:
    """A list, a tuple, an array, …, as it is: no text, bytes or mapping."""
    if isinstance(value, (Sequence, np.ndarray)) and not isinstance(
        value, (str, bytes, bytearray, memoryview)
    ):
        return value  # type: ignore[return-value]
    raise wrong(name, what, value)


def wholes(name: str, value: object, least: int, most: int, expected: str = "") -> tuple[int, ...]:
    """Integers within bounds."""
    expected = expected or f"integers from {least} to {most}"
    found = []
    for item in listed(name, value, expected):
        if (n := _index(item)) is None or not least <= n <= most:
            raise wrong(name, expected, value if n is None else item)
        found.append(n)
    return tuple(found)


def path(name: str, value: object) -> str | Path:
    """A path, which need not be there."""
    if isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str):
        return value  # type: ignore[return-value]
    raise wrong(name, "a name or path", value)


def function(name: str, value: object) -> None:
    """What can be called, or None."""
    if value is not None and not callable(value):
        raise wrong(name, "a function or None", value)


def instance(name: str, value: object, kind: type, what: str) -> None:
    """An object of a class."""
    if not isinstance(value, kind):
        raise wrong(name, what, value)


def token_ids(name: str, ids: Iterable[object], most: int | None = None) -> list[int]:
    """Integers as a list of int: what only looks like them is refused, and more than ``most``."""
    # Bytes' items are numbers, and what has no order is no prompt.
    if isinstance(ids, (bytes, bytearray, memoryview, str, Mapping, Set)):
        raise wrong(name, "text or token ids", ids)
    try:
        given = list(ids if most is None else islice(ids, most + 1))
    except TypeError:
        raise wrong(name, "text or token ids", ids) from None
    if most is not None and len(given) > most:
        got = len(ids) if isinstance(ids, Sized) else "more"
        raise UsageError(f"{name}: expected at most {most} tokens (the context), got {got}")
    found = list(map(_index, given))
    if None in found:
        raise wrong(name, "token ids", given[found.index(None)])
    return found  # type: ignore[return-value]


def _index(value: Any) -> int | None:
    """Anything that is an integer, as one; else None."""
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None
