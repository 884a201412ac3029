"""From what a request asks for to the grammar that its answer is held to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from isobit.errors import UsageError
from isobit.runtime.grammar import Constraint, Grammar
from isobit.runtime.model import Model
from isobit.server.parsing.thinking import Thinking
from isobit.server.request.formats import Format
from isobit.server.tool_calls.dialects import Dialect
from isobit.server.tool_calls.schemas import Lark
from isobit.server.tool_calls.tools import Choice, Tool

COMPILE_SECONDS = 10.0

Write = Callable[[Sequence[Tool]], str]
"""A grammar of calls of these tools."""


async def pattern_of(
    model: Model,
    form: Format | None,
    thinking: Thinking | None = None,
    dialect: Dialect | None = None,
    choice: Choice | None = None,
) -> Constraint | None:
    """What each choice is held to, compiled; None if all is free.

    Raises UsageError, which names the field, for what cannot be enforced.
    """
    field = "tools" if form is None else form.field
    try:
        work = asyncio.to_thread(_pattern, model, form, thinking, dialect, choice)
        return await asyncio.wait_for(work, COMPILE_SECONDS)
    except TimeoutError:
        raise UsageError(
            f"{field}: expected what can be compiled within {COMPILE_SECONDS:g} s"
        ) from None


def _pattern(
    model: Model,
    form: Format | None,
    thinking: Thinking | None,
    dialect: Dialect | None,
    choice: Choice | None,
) -> Constraint | None:
    grammar = _grammar(model, form, thinking, dialect, choice)
    return None if grammar is None else model.grammars.constraint(grammar)


def _grammar(
    model: Model,
    form: Format | None,
    thinking: Thinking | None,
    dialect: Dialect | None,
    choice: Choice | None,
) -> Grammar | None:
    think: dict[str, Any] = {}
    if thinking is not None:
        tags = {"opens": thinking.opens, "closes": thinking.closes}
        think = {"thinking": thinking.begun, **tags}
    if dialect is None or choice is None or choice.mode == "none":
        if form is None:
            return None
        text = form.text()
        if dialect is not None:
            lark = Lark(model.grammars.special)
            text = lark.grammar(dialect.answer(lark, lark.rule(form.rule())))
        grammar = Grammar(text, **think)
        _compiled(model, grammar, form.field)
        return grammar
    if choice.mode == "auto" and form is None:
        return Grammar(_calls(model, choice.tools, _after_tag(model, dialect)), **think,
                       call=dialect.call)  # fmt: skip
    form = form if choice.mode == "auto" else None  # what must be called comes first
    return Grammar(_calls(model, choice.tools, _whole(model, dialect, choice, form)), **think)


def _after_tag(model: Model, dialect: Dialect) -> Write:
    def write(tools: Sequence[Tool]) -> str:
        lark = Lark(model.grammars.special)
        return lark.grammar(dialect.after_tag(lark, tools))

    return write


def _whole(model: Model, dialect: Dialect, choice: Choice, form: Format | None) -> Write:
    def write(tools: Sequence[Tool]) -> str:
        lark = Lark(model.grammars.special)
        start = dialect.required(lark, tools, parallel=choice.parallel)
        if form is not None:
            answer = dialect.answer(lark, lark.rule(form.rule()))
            start = f"{lark.rule(start)} | {lark.rule(answer)}"
        return lark.grammar(start)

    return write


def _calls(model: Model, tools: Sequence[Tool], write: Write) -> str:
    """A grammar of calls. Where a schema cannot be enforced, any object will do for a tool that is
    not strict: clients offer tools whose schemas they did not write."""
    try:
        text = write(tools)
        _compiled(model, Grammar(text), "tools")
    except UsageError:
        text = write([_possible(model, tool, write) for tool in tools])
        _compiled(model, Grammar(text), "tools")
    return text


def _possible(model: Model, tool: Tool, write: Write) -> Tool:
    try:
        _compiled(model, Grammar(write([tool])), f"tools: {tool.name!r:.80}")
    except UsageError:
        if tool.strict:
            raise
        return replace(tool, parameters={"type": "object"})
    return tool


def _compiled(model: Model, grammar: Grammar, field: str) -> None:
    try:
        model.grammars.constraint(grammar)
    except UsageError as error:
        raise UsageError(f"{field}: expected what can be enforced, got: {error}") from None
