"""Adding an entry to a contract's history, and its version wherever it stands.

The text is edited at the places that the parser gave, so comments, quotes and every other byte
stay. What comes out is read again; if more changed than was meant, nothing is written.
"""

import json
import re
import textwrap
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from isobit.contracts.document import Document, Key, Span, parse
from isobit.contracts.lint import future, numbers
from isobit.contracts.schema import VERSION
from isobit.errors import UsageError

Bump = Literal["major", "minor", "patch"]
_STATUS: tuple[Key, ...] = (("status",), ("metadata", "status"))


def bumped(version: str, bump: Bump) -> str:
    """The next version."""
    major, minor, patch = numbers(version)
    if bump == "major":
        return f"{major + 1}.0.0"
    return f"{major}.{minor + 1}.0" if bump == "minor" else f"{major}.{minor}.{patch + 1}"


def amended(
    document: Document,
    entry: dict[str, str],
    status: str | None = None,
    divergences: Mapping[int, str | None] | None = None,
) -> str:
    """The document's text with ``entry`` (version, date, kind, title, …) in its history.

    ``status`` also replaces the contract's status, ``divergences`` the classes of obligations by
    their place in the list (None takes one away). Raises UsageError where the text is written in
    a way that this does not edit, and for a version or date that is not after the newest,
    or a day that has not come.
    """
    data = document.data
    _check(document, entry)
    if "description" in entry:
        entry = entry | {"description": _wrapped(entry["description"])}
    edits: list[tuple[int, int, str]] = []
    wanted = deepcopy(data)
    places: list[tuple[Key, str]] = [(("metadata", "version"), entry["version"])]
    if "version" in data:
        places.append((("version",), entry["version"]))
    if status is not None:
        there: list[Key] = [at for at in _STATUS if at in document.values]
        places += [(at, status) for at in there or _STATUS[:1]]
    for at, value in places:
        if at not in document.values:
            raise UsageError(f"{document.path}: expected {'.'.join(map(str, at))}, found none")
        edits.append(_scalar(document, document.values[at], value))
        _set(wanted, at, value)
    for i, divergence in (divergences or {}).items():
        obligation = wanted["proof_obligations"][i]
        if obligation.get("divergence") != divergence:
            edits.append(_divergence(document, i, divergence))
            obligation["divergence"] = divergence
            if divergence is None:
                del obligation["divergence"]
    edits.append(_history(document, entry))
    history = wanted["metadata"].get("amendment_history") or []
    first = _newest_first(history)
    wanted["metadata"]["amendment_history"] = [entry, *history] if first else [*history, entry]
    text = document.text
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    again = parse(text, document.path)
    if again.findings or again.data != wanted:
        raise UsageError(
            f"{document.path}: expected block style that can be edited; write this entry by hand"
        )
    return text


def write(path: str | Path, text: str) -> None:
    """Replace a file at once; raises UsageError."""
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
        part.replace(target)
    except (OSError, ValueError) as error:
        part.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot write the contract: {error}") from None


def _check(document: Document, entry: dict[str, str]) -> None:
    history = document.data["metadata"].get("amendment_history") or []
    versions = [document.data["metadata"]["version"], *(a["version"] for a in history)]
    newest = max(versions, key=numbers)
    if not re.fullmatch(VERSION, entry["version"]):
        raise UsageError(f"version: expected one such as 1.0.0, got {entry['version']!r}")
    if numbers(entry["version"]) <= numbers(newest):
        raise UsageError(f"version: expected one after {newest}, got {entry['version']}")
    last = max((a["date"] for a in history), default="")
    if entry["date"] < last:
        raise UsageError(f"date: expected {last} or later, got {entry['date']}")
    if message := future(entry["date"]):
        raise UsageError(f"date: {message}")


def _set(data: Any, at: Key, value: str) -> None:
    for step in at[:-1]:
        data = data[step]
    data[at[-1]] = value


def _scalar(document: Document, span: Span, value: str) -> tuple[int, int, str]:
    """Replace one word, in the quotes it stands in."""
    old = document.text[span.start : span.end]
    quote = old[0] if old[:1] in ("'", '"') else ""
    return span.start, span.end, f"{quote}{value}{quote}"


def _divergence(document: Document, index: int, value: str | None) -> tuple[int, int, str]:
    """The edit that gives an obligation a class, another class, or none."""
    text = document.text
    at: Key = ("proof_obligations", index)
    old = (*at, "divergence")
    by_hand = UsageError(
        f"{document.path}: expected obligation {index + 1} in lines of its own; write its "
        f"divergence ({value or 'none'}) by hand"
    )
    if old in document.values:
        span, key = document.values[old], document.keys[old]
        if value is not None:
            return _scalar(document, span, value)
        start, end = _line_start(text, key.start), text.find("\n", span.end)
        if text[start : key.start].strip() or not document.values[at].block:
            raise by_hand
        return start, len(text) if end < 0 else end + 1, ""
    if not document.values[at].block:
        raise by_hand
    for name in document.data["proof_obligations"][index]:
        span, key = document.values[*at, name], document.keys[*at, name]
        end = text.find("\n", span.end)
        if end >= 0 and not span.block and "\n" not in text[key.start : span.end]:
            line = f"{' ' * (key.column - 1)}divergence: {value}"
            return end + 1, end + 1, line + ("\r\n" if text[end - 1] == "\r" else "\n")
    raise by_hand


def _newest_first(history: list[dict[str, str]]) -> bool:
    """The order of a history; newest first if it does not show."""
    if len(history) < 2:
        return True
    return numbers(history[0]["version"]) > numbers(history[-1]["version"])


def _history(document: Document, entry: dict[str, str]) -> tuple[int, int, str]:
    """Where the entry goes, and its text."""
    text = document.text
    at: Key = ("metadata", "amendment_history")
    newline = "\r\n" if "\r\n" in text else "\n"
    history = document.data["metadata"].get("amendment_history")
    if history:
        span = document.values[at]
        if not span.block:
            raise UsageError(f"{document.path}: expected amendment_history in lines of its own")
        place = _line_start(text, span.start)
        indent = span.start - place
        if not _newest_first(history):
            place = _after(document, document.values[*at, len(history) - 1])
        return place, place, _written(text, place, entry, indent, newline)
    if at in document.keys:
        raise UsageError(f"{document.path}: expected no empty amendment_history; leave it out")
    metadata = document.data["metadata"]
    first = document.keys["metadata", next(iter(metadata))]
    place = _line_start(text, first.start)
    indent = first.column - 1
    head = f"{' ' * indent}amendment_history:{newline}"
    return place, place, head + _written(text, place, entry, indent + 2, newline)


def _line_start(text: str, at: int) -> int:
    return text.rfind("\n", 0, at) + 1


def _after(document: Document, span: Span) -> int:
    """The start of the line after a part, comments and empty lines behind it left where they are.

    A block ends, for the parser, where the next part starts; its last line is the last one that
    is indented deeper.
    """
    text = document.text
    lines = text[: span.end].splitlines(keepends=True)
    while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    if lines and not lines[-1].endswith("\n"):
        rest = text.find("\n", span.end)
        return len(text) if rest < 0 else rest + 1
    return sum(map(len, lines))


def _written(text: str, place: int, entry: dict[str, str], indent: int, newline: str) -> str:
    lines = []
    for key, value in entry.items():
        if key == "description":
            lines.append("description: |")
            lines += [f"  {line}".rstrip() for line in value.splitlines()]
        else:
            lines.append(f"{key}: {_quoted(value)}")
    margin = " " * indent
    out = [f"{margin}{'- ' if i == 0 else '  '}{line}".rstrip() for i, line in enumerate(lines)]
    start = newline if place and not text[:place].endswith("\n") else ""
    return start + newline.join(out) + newline


def _wrapped(description: str) -> str:
    parts = [textwrap.wrap(p, 84) or [""] for p in description.strip().splitlines()]
    return "\n".join(line for part in parts for line in part) + "\n"


def _quoted(value: str) -> str:
    """A plain word as it is, anything else in quotes that YAML and JSON share."""
    if re.fullmatch(r"[a-z][a-z -]*[a-z]", value) or re.fullmatch(r"[A-Z][A-Z_]+", value):
        return value
    return json.dumps(value, ensure_ascii=False)
