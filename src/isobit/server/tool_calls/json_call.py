"""A call as a JSON object: ``{"name": …, "arguments": {…}}``."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from isobit.server.parsing.reading import Events
from isobit.server.parsing.source import BLANK, Parsing, Source

ARGUMENTS = ("arguments", "parameters")


def read_json_call(
    source: Source, out: Events, names: Collection[str] | None = None
) -> Parsing[bool]:
    """A call, and whether it is a whole one; the object must come next.

    Arguments are given out as they come once the name is known; before that, nothing is.
    ``names``: others are no calls.
    """
    if not (yield from source.took("{")):
        return False
    call = _Call(source, out, names)
    while True:
        yield from source.skip(BLANK + ",")
        if (yield from source.took("}")):
            return call.end()
        key = yield from _string(source)
        yield from source.skip()
        if key is None or not (yield from source.took(":")):
            return False
        yield from source.skip()
        if not (yield from call.take(key)):
            return False


class _Call:
    """The parts of a call, in whatever order they come."""

    def __init__(self, source: Source, out: Events, names: Collection[str] | None) -> None:
        self._source, self._out, self._names = source, out, names
        self._name: str | None = None
        self._before: list[str] = []  # arguments that came before the name
        self._given = False

    def take(self, key: str) -> Parsing[bool]:
        """The value of a key."""
        if key == "name" and self._name is None:
            self._name = yield from _string(self._source)
            if self._name is None or (self._names is not None and self._name not in self._names):
                return False
            self._out.begin_call(self._name)
            self._out.arguments("".join(self._before))
            return True
        if key in ARGUMENTS and not self._given:
            self._given = True
            say = self._before.append if self._name is None else self._out.arguments
            return (yield from _arguments(self._source, say))
        return (yield from read_value(self._source, lambda _: None))

    def end(self) -> bool:
        """The object is complete."""
        if self._name is None:
            return False
        if not self._given:
            self._out.arguments("{}")
        self._out.end_call()
        return True


def _arguments(source: Source, say: Callable[[str], None]) -> Parsing[bool]:
    """Arguments; as a string, or null, they become what they stand for."""
    first = yield from source.peek()
    if first == "{":
        return (yield from read_value(source, say))
    if first == '"':
        text = yield from _string(source)
        say((text or "").strip() or "{}")
        return text is not None
    parts: list[str] = []
    whole = yield from read_value(source, parts.append)
    text = "".join(parts)
    say("{}" if text == "null" else text)
    return whole


def _string(source: Source) -> Parsing[str | None]:
    if (yield from source.peek()) != '"':
        return None
    parts: list[str] = []
    if not (yield from read_value(source, parts.append)):
        return None
    try:
        text = json.loads("".join(parts))
    except ValueError:
        return None
    return text if isinstance(text, str) else None


def read_value(source: Source, say: Callable[[str], None]) -> Parsing[bool]:
    """A JSON value as it stands; False if it is cut, or a tag stands where none can."""
    scan = _Scan()
    while not scan.over and (source.text or not source.ended):
        if source.text:
            n, said = scan.read(source.text)
            source.take(n)
            say(said)
        else:
            yield
    return scan.over and not scan.broken


class _Scan:
    """Finds the end of a JSON value; what stands within is not checked."""

    def __init__(self) -> None:
        self.over = self.broken = False
        self._depth = 0
        self._quoted = self._escaped = False
        self._any = False

    def read(self, text: str) -> tuple[int, str]:
        """So many characters of a text are read; what they say, control characters escaped."""
        said = []
        for n, c in enumerate(text):
            inside = self._in_string(c) if self._quoted else self._in_value(c)
            if inside:
                self._any = True
                said.append(json.dumps(c)[1:-1] if self._quoted and c < " " else c)
            if self.over:
                self.broken |= not self._any
                return n + inside, "".join(said)
        return len(text), "".join(said)

    def _in_string(self, c: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif c == "\\":
            self._escaped = True
        elif c == '"':
            self._quoted = False
            self.over = self._depth == 0
        return True

    def _in_value(self, c: str) -> bool:
        """Whether a character belongs to the value."""
        if c == '"':
            self._quoted = True
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
            self.over = self._depth <= 0
            return self._depth >= 0
        elif c == "<" or (self._depth == 0 and (c == "," or c in BLANK)):
            self.over, self.broken = True, c == "<"
            return False
        return True
