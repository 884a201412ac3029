"""A call in the form of Qwen3-Coder and Qwen3.5.

``<function=NAME>``, then for each argument ``<parameter=KEY>``, its value in lines of its own and
``</parameter>``, then ``</function>``. Values are bare text; what of JSON they are, the tool's
schema says.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from isobit.server.parsing.reading import Events
from isobit.server.parsing.source import Parsing, Source
from isobit.server.tool_calls.tools import Tool, dumped, kind_of, kinds

FUNCTION, PARAMETER = "<function=", "<parameter="
END_PARAMETER, END_FUNCTION = "</parameter>", "</function>"
_ENDS = (END_PARAMETER, "\n" + END_PARAMETER)
_FOLLOWS = (PARAMETER, END_FUNCTION)
_MOST_LITERAL = 1 << 16  # characters of a list that is written as Python writes it


def read_xml_call(source: Source, out: Events, tools: Sequence[Tool], close: str) -> Parsing[bool]:
    """A call, after ``<function=``, and whether it is one. False: nothing was given out."""
    name = yield from source.line_until(">")
    if name is None:
        return False
    tool = next((t for t in tools if t.name == name), Tool(name))
    out.begin_call(name)
    said: set[str] = set()
    while True:
        yield from source.skip()
        if (yield from source.took(END_FUNCTION)) or (yield from source.has(close)):
            out.arguments("}" if said else "{}")
            out.end_call()
            return True
        if not (yield from source.took(PARAMETER)):
            return True  # not complete, and what follows is text
        key = yield from source.line_until(">")
        if key is None:
            return True
        scratch = out if key not in said else Events()  # a second value has no place
        scratch.arguments(f"{', ' if said else '{'}{dumped(key)}: ")
        said.add(key)
        if not (yield from _value(source, scratch, tool.parameter(key))):
            return True


def _value(source: Source, out: Events, schema: Mapping[str, Any] | None) -> Parsing[bool]:
    """A value to the end of its tag; False if it is cut."""
    yield from source.took("\n")
    allowed = frozenset({"string"}) if schema is None else kinds(schema)
    if allowed == {"string"}:
        out.arguments('"')
        whole = yield from _text(source, out)
        if whole:
            out.arguments('"')
        return whole
    parts = _Parts()
    whole = yield from _text(source, parts)
    if whole:
        out.arguments(_typed("".join(parts), allowed))
    return whole


class _Parts(list[str]):
    """Text that is gathered."""

    def arguments(self, json_text: str) -> None:
        """A piece of it, as :func:`_text` writes it."""
        self.append(json.loads(f'"{json_text}"'))


def _text(source: Source, out: Events | _Parts) -> Parsing[bool]:
    """Bare text as the inside of a JSON string, to the tag that ends it.

    A tag ends it only if what follows belongs to a call; else it is part of the text.
    """

    def say(n: int) -> None:
        out.arguments(dumped(source.take(n))[1:-1])

    while True:
        at = source.text.find(END_PARAMETER)
        if at < 0:
            ends = source.ended and not source.cut
            held = 0 if ends else max(_held(source.text, tag) for tag in _ENDS)
            say(len(source.text) - held)
            if source.ended:
                return False
            yield
            continue
        text = at - source.text[:at].endswith("\n")
        rest = source.text[at + len(END_PARAMETER) :].lstrip()
        begins = any(tag.startswith(rest) for tag in _FOLLOWS)
        if rest.startswith(_FOLLOWS) or (source.ended and (not rest or (source.cut and begins))):
            say(text)
            source.take(at - text + len(END_PARAMETER))
            return True
        if source.ended or not begins:
            say(at + len(END_PARAMETER))
        else:
            say(text)
            yield


def _held(text: str, tag: str) -> int:
    """So many characters at the end of a text may be the beginning of a tag."""
    return max((n for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)


def _typed(text: str, allowed: frozenset[str]) -> str:
    """A value's JSON, of one of these types if the text can be read so; else it is a string."""
    bare = text.strip()
    python = {"True": True, "False": False, "None": None}
    found: Any = python.get(bare, ...)
    if found is ...:
        with suppress(ValueError, RecursionError):
            found = json.loads(bare, parse_constant=_no_constant)
    if found is ... and bare[:1] in ("[", "{") and len(bare) < _MOST_LITERAL:
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            found = json.loads(json.dumps(ast.literal_eval(bare), allow_nan=False))
    if isinstance(found, float) and found.is_integer() and "number" not in allowed:
        found = int(found)
    return dumped(text if found is ... or kind_of(found) not in allowed else found)


def _no_constant(text: str) -> None:
    raise ValueError(text)
