"""Tools for a model whose template has no words for them: they are told in plain messages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from isobit.text.conversation import checked_name

_TOLD = """\
These functions can be called, each described by a JSON schema of its arguments:
{tools}
To call one, write exactly this, and after it the next if there is more to call:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
What it gave follows between <tool_response> and </tool_response>."""


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages of which the first tells of the tools; their contents are texts.

    Raises UsageError for a tool without a name.
    """
    first, *others = [dict(message) for message in messages]
    described = [_described(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    text = _TOLD.format(tools="\n".join(described))
    said = first.get("content") or ""
    parts = [said, text] if first["role"] == "system" else [text, said]
    return [first | {"content": "\n\n".join(filter(None, parts))}, *others]


def _described(tool: Mapping[str, Any], where: str) -> str:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    found: dict[str, Any] = {"name": checked_name(name, f"{where}.name")}
    if function.get("description"):
        found["description"] = function["description"]
    found["parameters"] = function.get("parameters") or {"type": "object", "properties": {}}
    return json.dumps(found, ensure_ascii=False)


def without_calls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which calls and what they gave are text."""
    return [_plain(message) for message in messages]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    said = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{said}\n</tool_response>"}
    calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, [said, *calls]))}


def _call(function: Mapping[str, Any]) -> str:
    name, arguments = json.dumps(function["name"], ensure_ascii=False), function["arguments"]
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
