"""A reader that sees thinking, text and two calls in whatever a model says, a character at a time.

So that every interface's way to write them can be tested with a model that knows of none.
"""

from collections.abc import Mapping

from isobit.server.parsing.events import CallArguments, CallBegins, CallEnds, Event, Reasoning, Text

ARGUMENTS = '{"path": "a\\"b", "n": [1, 2]}'
THOUGHT, SAID = 6, 9  # characters of each


class ScriptedReader:
    """Characters 1 to 6 are thinking, the next 9 text; each further one is one of a call's."""

    special: Mapping[int, str] = {}

    def __init__(self) -> None:
        self._n = 0
        self.done = False

    @property
    def reasoning(self) -> bool:
        return self._n < THOUGHT

    def mark(self, offset: int) -> None: ...

    def push(self, text: str) -> list[Event]:
        return [event for character in text for event in self._read(character)]

    def flush(self, *, cut: bool = False) -> list[Event]:  # noqa: ARG002 - as others
        return []

    def _read(self, character: str) -> list[Event]:
        at, self._n = self._n, self._n + 1
        if at < THOUGHT:
            return [Reasoning(character)]
        if at < THOUGHT + SAID:
            return [Text(character)]
        call, at = divmod(at - THOUGHT - SAID, len(ARGUMENTS))
        if call > 1:
            self.done = True
            return []
        found: list[Event] = [CallArguments(call, ARGUMENTS[at])]
        if at == 0:
            found.insert(0, CallBegins(call, f"call_{call}", f"tool{call}"))
        if at == len(ARGUMENTS) - 1:
            found.append(CallEnds(call))
        return found
