"""What is known of an answer beside its request, so that another replica can go on with it.

A front (:mod:`isobit.server.front.front`) keeps a journal of every stream: the answer's key, of
which its ids, time and seed are made, and the tokens of each choice so far. A replica writes a
stream for a front as lines of JSON, each a text for the client together with the tokens that made
it. If the replica is lost, another gets the same request with the journal, reads those tokens as it
would have read its own, and writes what comes after them.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from isobit.runtime.tokens import Token

LINES = "application/x-isobit-journal"
"""The type of a stream that is written for a front."""

BY = "isobit-fingerprint"
"""Its header that says whose tokens these are: none but servers of the same go on with it."""

JOURNAL = "isobit.journal"
"""Where in a request's ASGI scope its journal is, if a front keeps one."""


class Emitted(BaseModel):
    """What of a choice was said already."""

    model_config = ConfigDict(extra="forbid")

    tokens: list[Token] = Field(default_factory=list)
    """All that were taken; of one that has ended, with that which ended it."""
    finished: bool = False
    cached: int = 0
    """Tokens of its prompt that the first replica found in its cache."""


class Line(BaseModel):
    """What a front passes on, and keeps, at once."""

    model_config = ConfigDict(extra="forbid")

    text: str
    choice: int | None = None
    """Whose tokens these are; None: of no choice."""
    tokens: list[Token] = Field(default_factory=list)
    finished: bool = False
    cached: int = 0
    end: bool = False
    """Whether it is the stream's last."""


class Journal(BaseModel):
    """One answer's."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(default_factory=lambda: uuid.uuid4().hex)
    created: float = Field(default_factory=time.time)
    by: str = ""
    """The fingerprint of the server that began, if one has."""
    begun: bool = False
    """Whether the client was told how the stream begins."""
    said: dict[int, Emitted] = Field(default_factory=dict)
    """By choice."""

    def name(self, *parts: object) -> str:
        """A name that this answer gives to something, the same on every replica."""
        asked = ":".join(map(str, (self.key, *parts)))
        return hashlib.sha256(asked.encode()).hexdigest()[:32]

    def seed(self, prompt: int) -> int:
        """For the choices of a prompt whose request names none."""
        return int(self.name("seed", prompt)[:8], 16)

    def take(self, line: Line) -> None:
        """A line has come, and goes to the client."""
        self.begun = True
        if line.choice is not None:
            said = self.said.setdefault(line.choice, Emitted(cached=line.cached))
            said.tokens += line.tokens
            said.finished |= line.finished


def line(text: str, **more: Any) -> str:
    """A :class:`Line` as it is sent."""
    return json.dumps({"text": text} | more) + "\n"


def tokens_json(tokens: Sequence[Token]) -> list[Any]:
    """Tokens as a line has them; float32 values survive JSON exactly."""
    return [[t.id, t.logprob, t.top] for t in tokens]
