"""An answer on a terminal as it comes: its text on stdout, thinking on stderr, calls in lines."""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from isobit.cli.output import shown_as_is
from isobit.errors import UsageError
from isobit.server.parsing.events import (
    Answer,
    CallArguments,
    CallBegins,
    CallEnds,
    Event,
    Reasoning,
    Text,
    gathered,
)
from isobit.server.request.chat import Chat

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class StreamPrinter:
    """Prints one answer."""

    def __init__(self, chat: Chat) -> None:
        self._reader = chat.reader(tokens=False)
        self._events: list[Event] = []
        self._mid_line = False
        self._thought = False

    def write(self, piece: str, *_: object) -> None:
        """More of the answer came."""
        self._print(self._reader.push(piece))

    def end(self, *, cut: bool) -> Answer:
        """All of it came; what it was. ``cut``: the model would have gone on."""
        self._print(self._reader.flush(cut=cut))
        if self._thought:
            self._write("\n", sys.stderr)
        if self._mid_line and sys.stdout.isatty():
            print()
        return gathered(self._events)

    def _print(self, events: list[Event]) -> None:
        self._events += events
        for event in events:
            match event:
                case Reasoning(text):
                    self._thought = True
                    self._write(text, sys.stderr, *((_DIM, _PLAIN) if sys.stderr.isatty() else ()))
                    continue
                case Text(text):
                    said = text
                case CallBegins(_, _, name):
                    said = ("\n" if self._mid_line else "") + f"→ {name} "
                case CallArguments(_, text):
                    said = text
                case CallEnds():
                    said = "\n"
            if self._thought:
                self._write("\n\n", sys.stderr)
                self._thought = False
            self._mid_line = not said.endswith("\n")
            self._write(said, sys.stdout)

    def _write(self, text: str, file: TextIO, before: str = "", after: str = "") -> None:
        file.write(before + (shown_as_is(text) if file.isatty() else text) + after)
        file.flush()


def message(answer: Answer) -> dict[str, Any]:
    """An answer as a message of the conversation."""
    said: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        said["reasoning_content"] = answer.reasoning
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in answer.calls
        if c.complete
    ]
    return said | ({"tool_calls": calls} if calls else {})


def read_json(text: str, where: str, kind: type) -> Any:
    """JSON that an option gives. Raises UsageError."""
    expected = "a list" if kind is list else "an object"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: expected {expected} in JSON, got: {error}") from None
    if not isinstance(found, kind):
        raise UsageError(f"{where}: expected {expected} in JSON, got {text!r:.60}")
    return found
