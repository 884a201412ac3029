"""Which tokens of which requests run in the next pass. Pure: no device, no clock, no thread.

Computed tokens catch up with known tokens, under one budget of tokens a pass. A request that is one
token behind generates; one that is many behind is in its prompt; drafts are tokens beyond the known
that are run on trial. Requests are admitted in order of arrival, and only when the pages are there
that they and all running ones can still need: what runs is never stopped for want of room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from isobit.errors import IsobitError, UsageError
from isobit.numerics import TILE
from isobit.runtime.blocks import Blocks, Routes
from isobit.runtime.request import Request, State


class QueueFull(IsobitError):
    """Too many requests wait already; try again later."""


@dataclass(frozen=True)
class Work:
    """Consecutive tokens of one request, to be run in one pass."""

    request: Request
    start: int
    """Position of the first."""
    tokens: list[int]
    drafts: int
    """So many of them, the last, are drafts."""
    first_row: int
    """The first of them whose logits are wanted, with all after it; len(tokens): none are."""


@dataclass(frozen=True)
class Limits:
    """What a pass and the queue hold."""

    pass_tokens: int = 512
    """Most tokens of a pass."""
    beside: int = 512
    """Most tokens of prompts in a pass in which others generate; few, so that these wait little."""
    pass_rows: int = 128
    """Most rows of logits of a pass, beside those that others go on with."""
    running: int = 64
    """Most requests in a pass."""
    waiting: int = 1024
    """Most requests that wait."""

    def __post_init__(self) -> None:
        """Refuse what would starve a request."""
        if not 1 <= self.running <= self.pass_tokens:
            raise UsageError("running: expected from 1 to pass_tokens, so that each has a token")
        if min(self.beside, self.pass_rows, self.waiting) < 1:
            raise UsageError("limits: expected 1 or more of each")


class Scheduler:
    """Requests from arrival to end."""

    def __init__(self, blocks: Blocks, limits: Limits) -> None:
        self.blocks = blocks
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In order of arrival."""

    def add(self, request: Request) -> None:
        """Line a request up.

        Raises UsageError if it cannot fit even alone, QueueFull if too many wait.
        """
        if request.pages_needed > self.blocks.total:
            room = self.blocks.total * TILE
            raise UsageError(
                f"prompt and max_tokens: expected at most {room} positions (the KV cache), got "
                f"{len(request.prompt) + request.max_tokens}"
            )
        if len(self.waiting) >= self.limits.waiting:
            raise QueueFull(f"queue: {self.limits.waiting} requests wait already: try again later")
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """End a request, done or not; its full pages stay cached. Not while it is in a pass."""
        if request.state is State.WAITING:
            self.waiting.remove(request)
        elif request.state is State.RUNNING:
            self.running.remove(request)
            self.blocks.close(request.table)
        request.state = State.FINISHED

    def schedule(self) -> list[Work]:
        """The next pass; empty if there is nothing to do. Then :meth:`computed` for each part."""
        self._admit()
        left = self.limits.pass_tokens
        generating = [r for r in self.running if r.behind == 1]
        left -= len(generating)
        prompt = min(left, self.limits.beside) if generating else left
        rows = self.limits.pass_rows
        work = []
        for request in self.running:  # the oldest first
            if request.behind == 1:
                drafts = min(len(request.drafts), left, request.max_tokens - request.generated - 1)
                left -= max(drafts, 0)
                work.append(self._work(request, 1, max(drafts, 0)))
            elif n := min(request.behind, prompt, left):
                if request.logits_from is not None:
                    without = max(request.logits_from - request.computed, 0)
                    n = min(n, without + rows)
                    rows -= max(n - without, 0)
                if n:
                    prompt, left = prompt - n, left - n
                    work.append(self._work(request, n, 0))
        return work

    def computed(
        self, work: Work, new: Sequence[int] = (), routes: Sequence[Routes] | None = None
    ) -> None:
        """A part of a pass was run, and gave these new tokens.

        After drafts, ``new`` is what followed each token that held: all but the last of ``new``
        are drafts that were right. routes: of each full page of the sequence, if recorded.
        """
        request = work.request
        request.computed = work.start + len(work.tokens) - work.drafts + max(len(new) - 1, 0)
        request.tokens += new
        request.drafts = []
        self.blocks.publish(request.table, request.tokens, request.computed, routes)

    @property
    def promised(self) -> int:
        """Pages that running requests may still take."""
        return sum(r.pages_needed - len(r.table.pages) for r in self.running)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.running:
            request = self.waiting[0]
            ids = request.prompt[: request.reusable]
            table = self.blocks.open(ids, request.salt, routes=request.routes)
            need = request.pages_needed - len(table.pages)
            if need > self.blocks.available - self.promised:
                self.blocks.close(table)
                return  # those behind it wait too: else a large one might wait for ever
            request.table = table
            request.computed = request.cached = len(table.pages) * TILE
            request.state = State.RUNNING
            self.running.append(self.waiting.popleft())

    def _work(self, request: Request, n: int, drafts: int) -> Work:
        start, end = request.computed, request.computed + n
        tokens = request.tokens[start:end] + request.drafts[:drafts]
        missing = -(-(start + len(tokens)) // TILE) - len(request.table.pages)
        self.blocks.extend(request.table, max(missing, 0))
        first = request.logits_from
        if first is None or end > len(request.prompt):
            first = len(request.tokens) - 1
        return Work(request, start, tokens, drafts, min(max(first - start, 0), n))
