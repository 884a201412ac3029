"""From an answer's text as it comes to events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from isobit.server.events import Event, Text


class Reader(Protocol):
    """Reads the text of one choice, which may come in pieces of any size."""

    special: Mapping[int, str]
    """Tokens of the vocabulary that are tags, and their texts."""

    def mark(self, offset: int) -> None:
        """The text that begins at this offset of all that comes is that of a special token."""

    def push(self, text: str) -> list[Event]:
        """More text came."""

    def flush(self) -> list[Event]:
        """No more will come."""

    @property
    def reasoning(self) -> bool:
        """Whether what comes now is thinking."""

    @property
    def done(self) -> bool:
        """Whether the answer is over, whatever the model would go on to say."""


class TextReader:
    """All is text."""

    special: Mapping[int, str] = {}
    reasoning = done = False

    def mark(self, offset: int) -> None:
        """There is no tag."""

    def push(self, text: str) -> list[Event]:
        """As it is."""
        return [Text(text)] if text else []

    def flush(self) -> list[Event]:
        """Nothing is held."""
        return []
