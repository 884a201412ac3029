"""Which form of calls a model speaks: what its chat template writes says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from isobit.errors import UsageError
from isobit.server.parsing.reading import Events
from isobit.server.parsing.source import Parsing, Source
from isobit.server.tool_calls.harmony import CHANNEL, MESSAGE, Harmony
from isobit.server.tool_calls.llama import Llama
from isobit.server.tool_calls.schemas import Lark
from isobit.server.tool_calls.tagged import Hermes, QwenXml
from isobit.server.tool_calls.tools import Tool
from isobit.text.prompt import knows


class Dialect(Protocol):
    """How a model writes calls: one file each."""

    call: str
    """The tag before a call in text; empty if there is none."""
    tags: tuple[str, ...]
    """All tags that may be tokens."""
    framed: bool
    """Whether every answer is written so, one without calls too."""

    def read(self, source: Source, out: Events) -> Parsing[None]:
        """Text and calls, to the end of an answer."""

    def after_tag(self, lark: Lark, tools: Sequence[Tool]) -> str:
        """The rule of a call after its first tag.

        Where calls have no tag it is that of an answer: calls, or text.
        """

    def required(self, lark: Lark, tools: Sequence[Tool], *, parallel: bool) -> str:
        """The rule of an answer that consists of calls."""

    def answer(self, lark: Lark, rule: str, /) -> str:
        """The rule of an answer whose text is held to a rule."""


def frame_of(template: str) -> Dialect | None:
    """What every answer of a model is written in, if it is."""
    return Harmony() if CHANNEL in template and MESSAGE in template else None


def dialect_of(template: str, tools: Sequence[Tool]) -> Dialect:
    """The form of a model's calls.

    One whose template says nothing of tools is told of them and of Hermes' form
    (:mod:`isobit.text.plain`). Raises UsageError for a form that is not known.
    """
    if (frame := frame_of(template)) is not None:
        return frame
    if "<function=" in template and "<parameter=" in template:
        return QwenXml(tools)
    if "<tool_call>" in template or not knows(template, "tools"):
        return Hermes(tools)
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return Llama(tools)
    raise UsageError(
        "tools: expected a model whose template writes calls as Qwen, Hermes, Llama 3 or "
        "gpt-oss do, got another form"
    )
