"""Calls as Llama 3 writes them: the answer is ``{"name": …, "parameters": {…}}``, and after a
semicolon perhaps another. There is no tag, so an answer is a call if it begins like one, and names
one of the tools."""

from __future__ import annotations

from collections.abc import Sequence

from isobit.server.reading import Events
from isobit.server.source import BLANK, Parsing, Source
from isobit.server.tool_calls import schemas
from isobit.server.tool_calls.json_call import read_json_call
from isobit.server.tool_calls.schemas import Lark
from isobit.server.tool_calls.tools import Tool, dumped


class Llama:
    """``{"name": …, "parameters": {…}}``."""

    call = ""
    tags: tuple[str, ...] = ()
    framed = False

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._names = {tool.name for tool in tools}

    def read(self, source: Source, out: Events) -> Parsing[None]:
        """Text and calls, to the end of an answer."""
        while True:
            source.keep()
            yield from source.skip(BLANK + ";" if out.calls else BLANK)
            before = out.calls
            whole = yield from read_json_call(source, out, self._names)
            if out.calls == before:
                source.put_back()
                break
            if not whole:
                yield from source.until((), out.arguments)
        yield from source.until((), out.text)

    def after_tag(self, lark: Lark, tools: Sequence[Tool]) -> str:
        """There is no tag."""
        raise NotImplementedError

    def required(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        """The rule of an answer that consists of calls."""
        call = lark.rule(" | ".join(self._one(lark, tool) for tool in tools))
        return f'{call} ("; " {call})*' if parallel else call

    def answer(self, _lark: Lark, rule: str) -> str:
        """The rule of an answer that has a form."""
        return rule

    def _one(self, lark: Lark, tool: Tool) -> str:
        begin = f'{{"name": {dumped(tool.name)}, "parameters": '
        return f"{dumped(begin)} {lark.json(schemas.arguments(tool), tool)} {dumped('}')}"
