"""Reading YAML that nobody has checked: data, and the line and column of every part of it.

Only what JSON can say too is read: no tags, no aliases (which can make a small file huge), each
key once. What is wrong becomes a finding, and reading goes on where that makes sense.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from isobit.contracts.findings import Finding, Severity
from isobit.errors import FileRefused
from isobit.files import regular

MAX_BYTES = 1 << 20
MAX_PARTS = 50_000
MAX_DEPTH = 32
MAX_FINDINGS = 1000

Key = tuple[str | int, ...]
"""Where a value is: ("proof_obligations", 2, "type")."""

_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")
_WORDS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True)
class Span:
    """Where a part stands: offsets in the text, and its first line and column, from 1."""

    start: int
    end: int
    line: int
    column: int
    block: bool = False
    """A list or mapping written on lines of its own."""


@dataclass
class Document:
    """A file's data and where each part of it stands."""

    path: str
    text: str
    data: Any = None
    values: dict[Key, Span] = field(default_factory=dict)
    keys: dict[Key, Span] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether more findings would be left out: then there is no use in looking for them."""
        return len(self.findings) > MAX_FINDINGS

    def find(self, rule: str, message: str, at: Key = (), severity: Severity = "error") -> None:
        """Add a finding at a value, or at the nearest part around it that exists."""
        while at and at not in self.values and at not in self.keys:
            at = at[:-1]
        span = self.values.get(at) or self.keys.get(at) or Span(0, 0, 1, 1)
        self._add(rule, message, span.line, span.column, severity)

    def find_key(self, rule: str, message: str, at: Key, severity: Severity = "error") -> None:
        """Add a finding at a key, rather than at its value."""
        span = self.keys.get(at) or self.values[at]
        self._add(rule, message, span.line, span.column, severity)

    def _add(self, rule: str, message: str, line: int, column: int, severity: Severity) -> None:
        if len(self.findings) == MAX_FINDINGS:
            rule, severity = "yaml-limit", "error"
            message = f"expected at most {MAX_FINDINGS} findings, got more, which are left out"
        if len(self.findings) <= MAX_FINDINGS:
            self.findings.append(Finding(self.path, line, column, severity, rule, message))


def read(path: str | Path) -> Document:
    """Read a file. Raises FileRefused if it cannot be opened; all else becomes findings."""
    try:
        with regular(path, "a readable contract").open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileRefused(f"{path}: expected a readable contract, got: {reason}") from None
    if len(data) > MAX_BYTES:
        document = Document(str(path), "")
        document.find("yaml-limit", f"expected at most {MAX_BYTES} bytes, got more")
        return document
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        document = Document(str(path), "")
        document.find("yaml-syntax", f"expected UTF-8, got {error.reason} at byte {error.start}")
        return document
    return parse(text, str(path))


def parse(text: str, path: str = "contract") -> Document:
    """The data of a text; what is wrong with it is in ``findings``."""
    document = Document(path, text)
    builder = _Builder(document)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        for event in yaml.parse(text, Loader=loader):
            builder.take(event)
    except _Stop as stop:
        if stop.args:
            document.find("yaml-limit", str(stop), builder.here())
        document.data = None
    except (yaml.YAMLError, UnicodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        # some versions of libyaml have a limit of their own, and look ahead far enough to reach it
        rule = "yaml-limit" if "nesting depth" in what else "yaml-syntax"
        document._add(rule, f"expected YAML, got: {what}", line, column, "error")
        document.data = None
    return document


class _Stop(Exception):
    """Reading cannot go on: a limit was passed, or (without words) a finding says why."""


@dataclass
class _Open:
    """A list or mapping that has not ended."""

    value: Any
    at: Key
    start: Span
    key: str | None = None
    """Mappings: the key whose value is awaited."""
    drop: bool = False
    """The awaited value has a key that was there before."""


class _Builder:
    """Puts a document together from parser events; the nesting is on a stack of its own."""

    def __init__(self, document: Document) -> None:
        self._d = document
        self._stack: list[_Open] = []
        self._parts = 0
        self._documents = 0

    def here(self) -> Key:
        """The innermost part that is open."""
        return self._stack[-1].at if self._stack else ()

    def take(self, event: Any) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                span = _span(event)
                message = "expected one document, got a second; put it in a file of its own"
                self._d._add("yaml-syntax", message, span.line, span.column, "error")
        elif isinstance(event, yaml.CollectionEndEvent):
            self._close(event)
        elif isinstance(event, yaml.NodeEvent):
            self._node(event)

    def _node(self, event: Any) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _Stop(f"expected at most {MAX_PARTS} values, got more")
        span = _span(event)
        if getattr(event, "tag", None) not in (None, "!"):
            message = f"expected a value without a tag, got {event.tag}; leave the tag out"
            self._d._add("yaml-tag", message, span.line, span.column, "error")
        parent = self._stack[-1] if self._stack else None
        if parent is not None and isinstance(parent.value, dict) and parent.key is None:
            self._key(parent, event, span)
            return
        at = self._place(parent)
        if isinstance(event, yaml.AliasEvent):
            message = f"expected a value, got the alias *{event.anchor}; write the value out"
            self._d._add("yaml-alias", message, span.line, span.column, "error")
            self._put(parent, at, None, span)
        elif isinstance(event, yaml.ScalarEvent):
            self._put(parent, at, _scalar(event), span)
        else:
            value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            self._open(_Open(value, at, span))

    def _key(self, parent: _Open, event: Any, span: Span) -> None:
        if not isinstance(event, yaml.ScalarEvent):
            message = "expected a word as key, got a list, a mapping or an alias"
            self._d._add("yaml-key", message, span.line, span.column, "error")
            raise _Stop
        name = event.value
        at = (*parent.at, name)
        parent.key, parent.drop = name, name in parent.value
        if parent.drop:
            first = self._d.keys[at].line
            message = f"expected each key once, got {name!r} again (first on line {first})"
            self._d._add("duplicate-key", message, span.line, span.column, "error")
        else:
            self._d.keys[at] = span

    def _place(self, parent: _Open | None) -> Key:
        if parent is None:
            return ()
        if isinstance(parent.value, list):
            return (*parent.at, len(parent.value))
        name = str(parent.key)
        return (*parent.at, f"{name} (again)" if parent.drop else name)

    def _open(self, node: _Open) -> None:
        if len(self._stack) >= MAX_DEPTH:
            raise _Stop(f"expected at most {MAX_DEPTH} levels, got more")
        self._stack.append(node)

    def _close(self, event: Any) -> None:
        node = self._stack.pop()
        end = event.end_mark.index
        span = Span(node.start.start, end, node.start.line, node.start.column, node.start.block)
        self._put(self._stack[-1] if self._stack else None, node.at, node.value, span)

    def _put(self, parent: _Open | None, at: Key, value: Any, span: Span) -> None:
        if parent is None:
            if self._documents == 1:
                self._d.data = value
                self._d.values[()] = span
            return
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif not parent.drop:
            parent.value[parent.key] = value
        if not (isinstance(parent.value, dict) and parent.drop):
            self._d.values[at] = span
        parent.key, parent.drop = None, False


def _span(event: Any) -> Span:
    mark = event.start_mark
    block = getattr(event, "flow_style", True) is False
    return Span(mark.index, event.end_mark.index, mark.line + 1, mark.column + 1, block)


def _scalar(event: Any) -> object:
    """Text, number, true, false or null, by YAML 1.2's core schema; dates stay text."""
    text: str = event.value
    if event.style is not None and event.style != "":
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
