"""What an answer is made of as it grows, whatever interface tells it to a client.

A choice is a stream of these: reasoning, text and tool calls in the order in which the model gave
them, a call's arguments as pieces of one JSON text, and the finish last. An interface encodes them;
it does not look at tokens. What comes without streaming is :func:`gathered` from the same events,
so that the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """A tool call; calls of a choice are numbered from 0, and do not interleave."""

    call: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments; all of a call's, joined, are one JSON object."""

    call: int
    json: str


@dataclass(frozen=True)
class CallEnds:
    """A call is complete. One that max_tokens or a stop string cut has no such event."""

    call: int


@dataclass(frozen=True)
class Finish:
    """The last event of a choice."""

    reason: FinishReason
    stop: str | None = None
    """The stop string that ended it."""


Event = Text | Reasoning | CallBegins | CallArguments | CallEnds | Finish


@dataclass
class Call:
    """A tool call, gathered."""

    id: str
    name: str
    arguments: str = ""
    """JSON."""
    complete: bool = False


@dataclass
class Answer:
    """A choice, gathered."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    finish: Finish | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt: int
    cached: int
    """Of the prompt: found in the cache."""
    generated: int
    """Of all choices."""
    reasoning: int = 0
    """Of those generated: thinking."""


def gathered(events: Iterable[Event]) -> Answer:
    """A choice's events as one answer."""
    answer = Answer()
    texts: list[str] = []
    reasoning: list[str] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case Text(text):
                texts.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallBegins(_, id_, name):
                answer.calls.append(Call(id_, name))
                arguments.append([])
            case CallArguments(call, json):
                arguments[call].append(json)
            case CallEnds(call):
                answer.calls[call].complete = True
            case Finish():
                answer.finish = event
    answer.text, answer.reasoning = "".join(texts), "".join(reasoning)
    for made, parts in zip(answer.calls, arguments, strict=True):
        made.arguments = "".join(parts)
    return answer
