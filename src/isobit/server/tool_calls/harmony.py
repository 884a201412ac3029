"""The messages of gpt-oss: an answer is several, each with a head that says what it is.

``<|channel|>analysis<|message|>…<|end|>`` is thinking, ``<|channel|>final<|message|>…`` the answer,
``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>`` a call, and each
but the first begins with ``<|start|>assistant``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from isobit.server.parsing.reading import Events
from isobit.server.parsing.source import Parsing, Source
from isobit.server.tool_calls import schemas
from isobit.server.tool_calls.json_call import read_value
from isobit.server.tool_calls.schemas import Lark
from isobit.server.tool_calls.tools import Tool, dumped

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
_HEAD = re.compile(r"\s*(<\|start\|>|<\|channel\|>|to=)")
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")


class Harmony:
    """Messages with heads."""

    call = f"{CHANNEL}commentary to=functions."
    tags: tuple[str, ...] = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
    framed = True

    def __init__(self, _tools: Sequence[Tool] = ()) -> None:
        """Tools as other dialects have them."""

    def read(self, source: Source, out: Events) -> Parsing[None]:
        """Messages, to the end of an answer."""
        said = False
        while True:
            head: list[str] = []
            if (yield from source.until((MESSAGE,), head.append)) is None:
                break
            said = yield from self._message(source, out, "".join(head), said)
        if not said and not out.calls and not _HEAD.match("".join(head)):
            out.text("".join(head))  # an answer without heads

    def _message(self, source: Source, out: Events, head: str, said: bool) -> Parsing[bool]:
        """A message; whether text was said until its end."""
        call = _RECIPIENT.search(head)
        if call is not None:
            out.begin_call(call[1])
            yield from source.skip()
            if (yield from read_value(source, out.arguments)):
                out.end_call()
            yield from source.until(ENDS, lambda _: None)
        elif "analysis" in head:
            out.begin_thinking()
            if (yield from source.until(ENDS, out.think)) is not None:
                out.end_thinking()
        else:
            if said:
                out.text("\n\n")
            yield from source.until(ENDS, out.text)
            return True
        return said

    def after_tag(self, lark: Lark, tools: Sequence[Tool]) -> str:
        """The rule of a call after its first tag."""
        head = f'" " ({lark.tag(CONSTRAIN)})? "json" {lark.tag(MESSAGE)}'
        return " | ".join(
            f"{dumped(tool.name)} {head} {lark.json(schemas.arguments(tool), tool)}"
            for tool in tools
        )

    def required(
        self,
        lark: Lark,
        tools: Sequence[Tool],
        *,
        parallel: bool,  # noqa: ARG002 - as others
    ) -> str:
        """The rule of an answer that is a call; there is one in an answer, and no more."""
        calls = f'{lark.tag(CHANNEL)} "commentary to=functions." ({self.after_tag(lark, tools)})'
        return f"{self._thinking(lark)} {calls}"

    def answer(self, lark: Lark, rule: str) -> str:
        """The rule of an answer that has a form."""
        return f'{self._thinking(lark)} {lark.tag(CHANNEL)} "final" {lark.tag(MESSAGE)} {rule}'

    def _thinking(self, lark: Lark) -> str:
        begin = f'{lark.tag(CHANNEL)} "analysis" {lark.tag(MESSAGE)} {lark.text_to(ENDS[0])}'
        return f'({begin} {lark.tag(START)} "assistant")?'
