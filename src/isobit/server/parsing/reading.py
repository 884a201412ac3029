"""From an answer's text as it comes to events: thinking, text, tool calls."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Protocol

from isobit.server.parsing.events import CallArguments, CallBegins, CallEnds, Event, Reasoning, Text
from isobit.server.parsing.source import BLANK, Parsing, Source
from isobit.server.parsing.thinking import Thinking

Name = Callable[[int], str]
"""What makes a call's id of its number."""


def drawn(_call: int) -> str:
    """A name by chance."""
    return secrets.token_hex(12)


class Reader(Protocol):
    """Reads the text of one choice, which may come in pieces of any size."""

    special: Mapping[int, str]
    """Tokens of the vocabulary that are tags, and their texts."""

    def mark(self, offset: int) -> None:
        """The text that begins at this offset of all that comes is that of a special token."""

    def push(self, text: str) -> list[Event]:
        """More text came."""

    def flush(self, *, cut: bool = False) -> list[Event]:
        """No more will come; ``cut``: though the model would have gone on."""

    @property
    def reasoning(self) -> bool:
        """Whether what comes now is thinking."""

    @property
    def done(self) -> bool:
        """Whether the answer is over, whatever the model would go on to say."""


class Dialect(Protocol):
    """How a model writes calls."""

    def read(self, source: Source, out: Events) -> Parsing[None]:
        """Text and calls, to the end of an answer."""


class TextReader:
    """All is text."""

    special: Mapping[int, str] = {}
    reasoning = done = False

    def mark(self, offset: int) -> None:
        """There is no tag."""

    def push(self, text: str) -> list[Event]:
        """As it is."""
        return [Text(text)] if text else []

    def flush(self, *, cut: bool = False) -> list[Event]:  # noqa: ARG002 - as others
        """Nothing is held."""
        return []


class AnswerReader:
    """Tells thinking, text and calls apart."""

    def __init__(
        self,
        special: Mapping[int, str],
        thinking: Thinking | None,
        dialect: Dialect | None,
        name: Name = drawn,
        *,
        one_call: bool = False,
    ) -> None:
        """``special``: tokens of the vocabulary that are tags of these; ``name``: what makes a
        call's id of its number; ``one_call``: no more.
        """
        self.special = special
        self._source = Source(special.values())
        self._out = Events(name)
        self._one_call = one_call
        self._parsing = self._parse(thinking, dialect)
        next(self._parsing)

    @property
    def reasoning(self) -> bool:
        """Whether what comes now is thinking."""
        return self._out.reasoning

    @property
    def done(self) -> bool:
        """Whether the only call is complete."""
        return self._one_call and self._out.complete > 0

    def mark(self, offset: int) -> None:
        """The text that begins at this offset of all that comes is that of a special token."""
        self._source.mark(offset)

    def push(self, text: str) -> list[Event]:
        """More text came."""
        if self.done or not text:
            return []
        self._source.text += text
        next(self._parsing)
        return self._new()

    def flush(self, *, cut: bool = False) -> list[Event]:
        """No more will come; ``cut``: though the model would have gone on."""
        if not self.done:
            self._source.ended, self._source.cut = True, cut
            next(self._parsing)
        return self._new()

    def _new(self) -> list[Event]:
        events = self._out.take()
        ends = (n for n, event in enumerate(events, start=1) if isinstance(event, CallEnds))
        return events[: next(ends, None)] if self._one_call else events

    def _parse(self, thinking: Thinking | None, dialect: Dialect | None) -> Parsing[None]:
        source, out = self._source, self._out
        if thinking is not None:
            yield from thinking.read(source, out)
        if dialect is None:
            yield from source.until((), out.text)
        else:
            yield from dialect.read(source, out)
        out.end()
        yield


class Events:
    """Collects events: blanks between text and calls say nothing and are left out."""

    def __init__(self, name: Name = drawn) -> None:
        """``name``: what makes a call's id of its number."""
        self._name = name
        self.reasoning = False
        self.calls = self.complete = 0
        self._events: list[Event] = []
        self._blank = ""  # the end of the text or thinking so far
        self._bare = ""  # characters that are left out at the beginning of what follows

    def take(self) -> list[Event]:
        """What is new, neighbours of a kind joined."""
        events, self._events = self._events, []
        joined: list[Event] = []
        for event in events:
            match joined[-1] if joined else None, event:
                case Text(before), Text(text):
                    joined[-1] = Text(before + text)
                case Reasoning(before), Reasoning(text):
                    joined[-1] = Reasoning(before + text)
                case CallArguments(call, before), CallArguments(same, more) if call == same:
                    joined[-1] = CallArguments(call, before + more)
                case _:
                    joined.append(event)
        return joined

    def text(self, text: str) -> None:
        """More text."""
        self._events += [Text(part) for part in self._parts(text)]

    def begin_thinking(self) -> None:
        """What follows is thinking."""
        self.reasoning, self._blank, self._bare = True, "", BLANK

    def think(self, text: str) -> None:
        """More thinking."""
        self._events += [Reasoning(part) for part in self._parts(text)]

    def end_thinking(self) -> None:
        """What follows is the answer."""
        self.reasoning, self._blank, self._bare = False, "", BLANK

    def begin_call(self, name: str) -> None:
        """A call begins."""
        self._blank, self._bare = "", BLANK
        self._events.append(CallBegins(self.calls, f"call_{self._name(self.calls)[:24]}", name))
        self.calls += 1

    def arguments(self, json: str) -> None:
        """More of its arguments."""
        if json:
            self._events.append(CallArguments(self.calls - 1, json))

    def end_call(self) -> None:
        """It is complete."""
        self.complete += 1
        self._events.append(CallEnds(self.calls - 1))

    def end(self) -> None:
        """Nothing follows."""
        if self._blank and not self.reasoning:
            self._events.append(Text(self._blank))
        self._blank = ""

    def _parts(self, text: str) -> list[str]:
        """What can be said now: blanks at its end may turn out to stand before a call."""
        if self._bare and not (text := text.lstrip(self._bare)):
            return []
        self._bare = ""
        text = self._blank + text
        said = text.rstrip(BLANK)
        self._blank = text[len(said) :]
        return [said] if said else []
