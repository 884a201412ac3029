"""Tools for a model whose template has no words for them: they are told in plain messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isobit.server.tool_calls.tools import Tool, dumped

_TOLD = """\
These functions can be called, each described by a JSON schema of its arguments:
{tools}
To call one, write exactly this, and after it the next if there is more to call:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
What it gave follows between <tool_response> and </tool_response>."""


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> list[dict[str, Any]]:
    """Messages of which the first tells of the tools; their contents are texts."""
    first, *others = [dict(message) for message in messages]
    text = _TOLD.format(tools="\n".join(map(_described, tools)))
    said = first.get("content") or ""
    parts = [said, text] if first["role"] == "system" else [text, said]
    return [first | {"content": "\n\n".join(filter(None, parts))}, *others]


def _described(tool: Tool) -> str:
    about = {"description": tool.description} if tool.description else {}
    return dumped({"name": tool.name, **about, "parameters": dict(tool.parameters)})


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
    name, arguments = dumped(function["name"]), function["arguments"]
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
