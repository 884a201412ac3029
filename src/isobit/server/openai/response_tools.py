"""The tools of ``/v1/responses`` that a client runs, as the functions that a chat offers.

A custom tool takes a text; as a function it has one argument, ``input``. A tool in a namespace has
the namespace's name before its own. Tools that OpenAI would run are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from isobit.errors import UsageError

_CUT = re.compile(r"\\(u[0-9a-fA-F]{0,3})?$")  # the beginning of an escape
KINDS = ("function", "custom", "namespace")
_FIELDS = ("name", "description", "parameters", "strict")


@dataclass(frozen=True)
class Offer:
    """A tool, and what a model is told of it."""

    function: dict[str, Any]
    name: Any
    """What the client calls it."""
    namespace: str | None = None
    custom: bool = False

    def item(self) -> dict[str, Any]:
        """What an item of a call to it begins with."""
        kind = "custom_tool_call" if self.custom else "function_call"
        found = {"type": kind, "input" if self.custom else "arguments": "", "name": self.name}
        return found if self.namespace is None else found | {"namespace": self.namespace}


def offers(tools: Iterable[dict[str, Any]]) -> list[Offer]:
    """Each of the tools, those of namespaces too."""
    return list(_offers(tools, None))


def _offers(tools: Iterable[dict[str, Any]], namespace: str | None) -> Iterator[Offer]:
    for tool in tools:
        kind, name = tool.get("type"), tool.get("name")
        if kind == "namespace" and namespace is None:
            yield from _offers(checked_list(tool.get("tools"), "tools"), str(name))
        elif kind == "function":
            fields = {key: tool[key] for key in _FIELDS if tool.get(key) is not None}
            yield Offer(fields | {"name": joined(namespace, name)}, name, namespace)
        elif kind == "custom":
            yield Offer(_as_function(tool, joined(namespace, name)), name, namespace, custom=True)


def checked_list(tools: object, where: str) -> list[dict[str, Any]]:
    """Tools that stand within another thing. Raises UsageError."""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError(f"{where}: expected a list of tools, got {tools!r:.60}")
    return tools


def joined(namespace: object, name: Any) -> Any:
    """What a model knows a tool in a namespace by."""
    if not namespace:
        return name
    return f"{namespace}{name}" if str(namespace).endswith("_") else f"{namespace}__{name}"


def arguments_of(text: object) -> str:
    """A custom tool's input as the function's arguments."""
    return json.dumps({"input": text if isinstance(text, str) else ""}, ensure_ascii=False)


def input_of(arguments: str) -> str:
    """The input in a function's arguments; of arguments that are cut, what there is of it."""
    for text in (arguments, f'{_CUT.sub("", arguments)}"}}'):
        with suppress(ValueError, LookupError, TypeError):
            return str(json.loads(text)["input"])
    return ""


def _as_function(tool: dict[str, Any], name: Any) -> dict[str, Any]:
    said = [str(tool["description"])] if tool.get("description") else []
    form = tool.get("format")
    if isinstance(form, dict) and form.get("definition"):
        said.append(f"The input's {form.get('syntax')} grammar:\n{form['definition']}")
    parameters = {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
        "additionalProperties": False,
    }
    return {"name": name, "description": "\n\n".join(said), "parameters": parameters}
