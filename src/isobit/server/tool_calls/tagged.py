"""Calls between ``<tool_call>`` and ``</tool_call>``: Hermes and Qwen3 with JSON, Qwen3-Coder and
Qwen3.5 with tags. Both are read wherever one is expected; they differ in what is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from isobit.server.parsing.reading import Events
from isobit.server.parsing.source import Parsing, Source
from isobit.server.tool_calls import schemas
from isobit.server.tool_calls.json_call import read_json_call
from isobit.server.tool_calls.schemas import Lark
from isobit.server.tool_calls.tools import Tool, dumped, kinds
from isobit.server.tool_calls.xml_call import (
    END_FUNCTION,
    END_PARAMETER,
    FUNCTION,
    PARAMETER,
    read_xml_call,
)

OPENS, CLOSES = "<tool_call>", "</tool_call>"
LINE = "\n"
_FORMS = {"pattern", "format"}  # of texts


class Hermes:
    """``{"name": …, "arguments": {…}}``."""

    call = OPENS
    tags: tuple[str, ...] = (OPENS, CLOSES)
    starts: tuple[str, ...] = (OPENS,)
    framed = False

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = tools

    def read(self, source: Source, out: Events) -> Parsing[None]:
        """Text and calls, to the end of an answer."""
        while (tag := (yield from source.until(self.starts, out.text))) is not None:
            source.keep()
            before = out.calls
            whole = yield from self._call(source, out, tag)
            if whole and tag == OPENS:
                yield from source.skip()
                yield from source.took(CLOSES)
            if source.cut:  # what is left is a part of a call
                return
            if out.calls == before:  # no call: the tag is text, and so is what follows
                source.put_back()
                out.text(tag)
            elif not whole:  # said as it is, so that whoever reads the arguments sees the fault
                yield from source.until((CLOSES,), out.arguments)

    def _call(self, source: Source, out: Events, tag: str) -> Parsing[bool]:
        yield from source.skip()
        if tag == FUNCTION or (yield from source.took(FUNCTION)):
            return (yield from read_xml_call(source, out, self._tools, CLOSES))
        return (yield from read_json_call(source, out))

    def after_tag(self, lark: Lark, tools: Sequence[Tool]) -> str:
        """The rule of a call after its first tag."""
        each = " | ".join(self._one(lark, tool) for tool in tools)
        return f"/\\n?/ ({each}) /\\n?/ {lark.tag(CLOSES)}"

    def required(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        """The rule of an answer that consists of calls."""
        call = lark.rule(f"{lark.tag(OPENS)} {self.after_tag(lark, tools)}")
        return f"{call} (/\\n?/ {call})*" if parallel else call

    def answer(self, _lark: Lark, rule: str) -> str:
        """The rule of an answer that has a form."""
        return rule

    def _one(self, lark: Lark, tool: Tool) -> str:
        begin = f'{{"name": {dumped(tool.name)}, "arguments": '
        return f"{dumped(begin)} {lark.json(schemas.arguments(tool), tool)} {dumped('}')}"


class QwenXml(Hermes):
    """``<function=NAME>`` and ``<parameter=KEY>``."""

    starts = (OPENS, FUNCTION)

    def _one(self, lark: Lark, tool: Tool) -> str:
        parts = [dumped(FUNCTION + tool.name + ">" + LINE)]
        properties = tool.parameters.get("properties")
        required = tool.parameters.get("required")
        for key in properties if isinstance(properties, dict) else ():
            if not isinstance(key, str) or ">" in key or not key.isprintable():
                raise schemas.unsupported(tool, f"the name of property {key!r:.60}")
            value = self._value(lark, tool, key)
            one = f"{dumped(PARAMETER + key + '>' + LINE)} {value}"
            wanted = isinstance(required, list) and key in required
            parts.append(one if wanted else f"({one})?")
        return " ".join([*parts, dumped(END_FUNCTION)])

    def _value(self, lark: Lark, tool: Tool, key: str) -> str:
        schema = tool.parameter(key) or {}
        end = f"\n{END_PARAMETER}\n"
        if "string" not in kinds(schema):
            return f"{lark.json(schema, tool)} {dumped(end)}"
        values = schema.get("enum")
        if isinstance(values, list) and values:
            each = (v if isinstance(v, str) else dumped(v) for v in values)
            return f"({' | '.join(map(dumped, each))}) {dumped(end)}"
        if tool.strict and (wrong := _FORMS & schema.keys()):
            raise schemas.unsupported(tool, f"{min(wrong)!r} of bare text in property {key!r:.60}")
        least, most = schema.get("minLength"), schema.get("maxLength")
        return lark.text_until(
            end, least if isinstance(least, int) else 0, most if isinstance(most, int) else None
        )
