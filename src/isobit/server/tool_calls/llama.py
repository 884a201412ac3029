"""Calls as Llama 3 writes them: the answer is ``{"name": …, "parameters": {…}}``, and after a
semicolon perhaps another. There is no tag: an answer is a call if it begins like one, with the name
of a tool; some models write ``"type": "function"`` before it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from isobit.server.parsing.reading import Events
from isobit.server.parsing.source import BLANK, Parsing, Source
from isobit.server.tool_calls import schemas
from isobit.server.tool_calls.json_call import ARGUMENTS, read_json_call
from isobit.server.tool_calls.schemas import Lark
from isobit.server.tool_calls.tools import Tool, dumped

_PYTHON = "<|python_tag|>"  # some begin a call with it; it says nothing
_TYPE = ('"type"', ":", '"function"', ",")
_NAME = ('"name"', ":")
_STRING_OR_BLANK = re.compile(r'("(?:[^"\\]|\\.)*"?)|[ \t\r\n]+')


class Llama:
    """``{"name": …, "parameters": {…}}``."""

    call = ""
    tags: tuple[str, ...] = ()
    framed = False

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._names = {tool.name for tool in tools}
        named = [f"{''.join(_NAME)}{dumped(name)}" for name in self._names]
        self._heads = [f"{{{before}{name}" for before in ("", "".join(_TYPE)) for name in named]

    def read(self, source: Source, out: Events) -> Parsing[None]:
        """Text and calls, to the end of an answer."""
        while (yield from self._is_call(source, BLANK + ";" if out.calls else BLANK)):
            if not (yield from read_json_call(source, out, self._names)):
                yield from source.until((), out.arguments)
        if (out.calls or source.cut) and self._begins(_spelt(source, BLANK + ";")):
            return  # a call, cut short before it named its tool
        yield from source.until((), out.text)

    def _is_call(self, source: Source, before: str) -> Parsing[bool]:
        """Whether a call comes; if so, what stands before it is read."""
        while True:
            comes = _spelt(source, before)
            if any(map(comes.startswith, self._heads)):
                yield from source.skip(before)
                return True
            if source.ended or not self._begins(comes):
                return False
            yield

    def _begins(self, comes: str) -> bool:
        """Whether a call may come of it."""
        return any(head.startswith(comes) for head in self._heads)

    def required(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        """The rule of an answer that consists of calls."""
        call = lark.rule(" | ".join(self._one(lark, tool) for tool in tools))
        return f'{call} ("; " {call})*' if parallel else call

    def answer(self, _lark: Lark, rule: str) -> str:
        """The rule of an answer that has a form."""
        return rule

    def after_tag(self, lark: Lark, tools: Sequence[Tool]) -> str:
        """The rule of an answer of calls, or of a text that does not begin like one.

        Blanks may stand wherever :meth:`read` reads over them.
        """
        blank = lark.terminal(r"/[ \t\r\n]*/")

        def parts(*texts: str) -> str:
            return " ".join(f"{dumped(text)} {blank}" for text in texts)

        before_name = lark.terminal(f"{blank} {parts('{')} ({parts(*_TYPE)})? {parts(*_NAME)}")
        heads = [lark.terminal(f"{before_name} {dumped(dumped(tool.name))}") for tool in tools]
        keys = " | ".join(dumped(dumped(key)) for key in ARGUMENTS)
        middle = lark.terminal(f"{blank} {parts(',')} ({keys}) {blank} {parts(':')}")
        end = lark.terminal(f"{blank} {parts('}')}")
        calls = (
            f"{head} {middle} {lark.json(schemas.arguments(tool), tool)} {end}"
            for head, tool in zip(heads, tools, strict=True)
        )
        call = lark.rule(" | ".join(calls))
        text = lark.terminal(f"/(?s:.+)/ & ~(({' | '.join(heads)}) /(?s:.*)/)")
        begin = f"{lark.tag(_PYTHON)}? " if lark.has(_PYTHON) else ""
        return f'{begin}({call} (";" {call})* | {text}?)'

    def _one(self, lark: Lark, tool: Tool) -> str:
        begin = f'{{"name": {dumped(tool.name)}, "parameters": '
        return f"{dumped(begin)} {lark.json(schemas.arguments(tool), tool)} {dumped('}')}"


def _spelt(source: Source, before: str) -> str:
    """What has come, as the heads of calls are spelt."""
    return _STRING_OR_BLANK.sub(r"\1", source.text.lstrip(before))
