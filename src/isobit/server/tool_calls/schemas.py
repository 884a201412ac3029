"""Grammars of calls, written in the form of Lark that llguidance reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isobit.errors import UsageError
from isobit.server.tool_calls.tools import Tool, dumped

# Between the parts of JSON stands what Python's json.dumps writes, as templates do: were blanks
# free, a model could write no end of them.
AS_TEMPLATES = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


class Lark:
    """Rules of one grammar."""

    def __init__(self, special: Mapping[str, int]) -> None:
        """``special``: the tags that are tokens."""
        self._special = special
        self._rules: list[str] = []

    def rule(self, body: str, attributes: str = "") -> str:
        """A rule's name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def terminal(self, body: str) -> str:
        """The name of a rule of characters, made of strings, patterns and other such rules."""
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def has(self, tag: str) -> bool:
        """Whether a tag is a token."""
        return tag in self._special

    def tag(self, text: str) -> str:
        """A tag, as the token that it is or as text."""
        return f"<[{self._special[text]}]>" if text in self._special else dumped(text)

    def text_to(self, tag: str) -> str:
        """Any text, and the tag that ends it."""
        if tag not in self._special:
            return self.text_until(tag)
        return f"{self.rule('/(?s:.*)/')} {self.tag(tag)}"

    def text_until(self, end: str, least: int = 0, most: int | None = None) -> str:
        """A text of so many characters, and the first of these ends."""
        times = f"{{{least},{'' if most is None else most}}}"
        return self.rule(f"/(?s:.{times})/", f"[suffix={dumped(end)}]")

    def json(self, schema: Mapping[str, Any], tool: Tool) -> str:
        """JSON of a schema, in which a tool that is not strict may have what is not enforced."""
        options = {**AS_TEMPLATES, "lenient": not tool.strict}
        return self.rule(f"%json {dumped({**schema, 'x-guidance': options})}")

    def grammar(self, start: str) -> str:
        """All of it."""
        return "\n".join([f"start: {start}", *self._rules])


def arguments(tool: Tool) -> dict[str, Any]:
    """The schema of all arguments: an object's, whatever is missing from it."""
    schema = {"type": "object", "properties": {}, **tool.parameters}
    return schema | {"type": "object"}


def unsupported(tool: Tool, what: str) -> UsageError:
    """What a tool's schema asks for that cannot be enforced."""
    return UsageError(f"tools: expected what can be enforced, got {what} of {tool.name!r:.80}")
