"""Which tokens of which requests run in the next pass. Pure: no device, no clock, no thread.

Computed tokens catch up with known tokens, under one budget of tokens a pass. A request that is one
token behind generates; one that is many behind is in its prompt; drafts are tokens beyond the known
that are run on trial. Requests are admitted in order of arrival, and only when the pages are there
that they and all running ones can still need: what runs is never stopped for want of room.

Where there are recurrent states, a prompt is cut so that passes end where states are kept: at
every KEEP_EVERY tokens, and at its own last full page, from where the next turn of a conversation
goes on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from isobit.backends.base import Routes
from isobit.config import EngineConfig
from isobit.errors import IsobitError, UsageError
from isobit.numerics import KV_PAGE
from isobit.runtime.blocks import Blocks
from isobit.runtime.request import Request, State

KEEP_EVERY = 4 * KV_PAGE
UNKNOWN = -1
"""A token that the pass before will give."""


class QueueFull(IsobitError):
    """Too many requests wait already; try again later."""


@dataclass(slots=True)
class Work:
    """Consecutive tokens of one request, to be run in one pass."""

    request: Request
    start: int
    """Position of the first."""
    tokens: list[int]
    drafts: int
    """So many of them, the last, are drafts."""
    rows: Sequence[int]
    """Those of them whose logits are wanted, counted from 0."""
    scored: int = 0
    """So many of these, the first, are of the request's ``wanted``."""


@dataclass(frozen=True)
class Limits:
    """What a pass and the queue hold."""

    pass_tokens: int = 512
    """Most tokens of a pass."""
    prompt_tokens: int = 512
    """Most tokens of prompts in a pass in which others generate; few, so that these wait little."""
    pass_rows: int = 128
    """Most rows of logits of a pass, beside those that others go on with."""
    running: int = 64
    """Most requests in a pass."""
    waiting: int = 1024
    """Most requests that wait, beside as many as may run."""
    steady: bool = False
    """See :attr:`isobit.runtime.prefill_budget.PrefillBudget.steady`."""

    @classmethod
    def of(cls, engine: EngineConfig, waiting: int = 1024, *, steady: bool = False) -> Limits:
        """Those of a model's settings."""
        running = max(cls.running, engine.max_sequences)
        most = max(engine.chunk, running)
        return cls(most, running=running, waiting=waiting, steady=steady)

    @property
    def requests(self) -> int:
        """Most requests that run or wait: so many are taken where there are none yet."""
        return self.running + self.waiting

    def __post_init__(self) -> None:
        """Refuse what would starve a request."""
        if not 1 <= self.running <= self.pass_tokens:
            raise UsageError("running: expected from 1 to pass_tokens, so that each has a token")
        if min(self.prompt_tokens, self.pass_rows, self.waiting) < 1:
            raise UsageError("limits: expected 1 or more of each")


class Load(NamedTuple):
    """What a scheduler has to do, and the pages of its KV cache."""

    running: int
    """Generations in the passes."""
    waiting: int
    """Generations in the queue."""
    held: int
    """Pages in use."""
    cached: int
    """Pages kept for whoever begins alike."""
    free: int
    """Pages that hold nothing."""


class Scheduler:
    """Requests from arrival to end."""

    def __init__(self, blocks: Blocks, limits: Limits) -> None:
        self.blocks = blocks
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In order of arrival."""
        self.prefill_budget: Callable[[int, int, int, int, int], int] = lambda *_: (
            limits.prompt_tokens
        )
        """See :meth:`isobit.runtime.prefill_budget.PrefillBudget.tokens`."""
        self.copies: list[tuple[int, int]] = []
        """Recurrent states to be copied before the next pass, in this order: (from, to)."""

    def add(self, request: Request) -> None:
        """Line a request up.

        Raises UsageError if it cannot fit even alone, QueueFull if too many wait.
        """
        if request.pages_needed > self.blocks.total:
            room = self.blocks.total * KV_PAGE
            raise UsageError(
                f"prompt and max_tokens: expected at most {room} positions (the KV cache), got "
                f"{len(request.prompt) + request.max_tokens}"
            )
        if not self.has_room:
            raise QueueFull(f"queue: {len(self.waiting)} requests wait already: try again later")
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
        if self.waiting:
            self._admit()
        behind = [(r, r.behind) for r in self.running]
        generating = [r for r, n in behind if n == 1]
        prompts = [(r, n) for r, n in behind if n > 1]
        prompt = left = self.limits.pass_tokens - len(generating)
        if generating and prompts:
            attended = sum(r.known for r in generating)
            waiting, at = sum(n for _, n in prompts), prompts[0][0].reached
            few = self.prefill_budget(len(generating), attended, len(prompts), waiting, at)
            prompt = min(left, self.limits.prompt_tokens, few)
        rows = self.limits.pass_rows
        work = []
        for request, all_of_it in behind:  # the oldest first
            if all_of_it == 1:
                drafts = 0
                if request.drafts:
                    most = request.max_tokens - request.generated - 1
                    drafts = max(min(len(request.drafts), left, most), 0)
                    left -= drafts
                work.append(self._work(request, 1, drafts))
            elif (n := min(all_of_it, prompt, left)) > 0:  # limits may have become less
                n, wanted = self._cut(request, n, rows)
                if n:
                    prompt, left, rows = prompt - n, left - n, rows - wanted
                    work.append(self._work(request, n, 0))
        return work

    def following(self, works: Sequence[Work]) -> list[Work]:
        """The pass after this one, as if it had run: tokens that it will give are UNKNOWN in it.

        It may begin before they are known. Then :meth:`go_on` with it, or :meth:`schedule` anew.
        """
        for work in works:
            request = work.request
            request.flying = len(work.tokens)
            ends = work.start + len(work.tokens) == len(request.tokens)
            request.coming = int(ends and request.max_tokens > 0)
        try:
            return self.schedule()
        finally:
            for work in works:
                work.request.flying = work.request.coming = 0

    def go_on(self, works: Sequence[Work]) -> list[Work]:
        """What is left of a pass that followed, now that the tokens before it are known."""
        left = []
        for work in works:
            request = work.request
            end = work.start + len(work.tokens)
            at_it = request.computed == work.start and end <= len(request.tokens)
            if request.state is State.RUNNING and at_it:
                work.tokens = request.tokens[work.start : end]
                left.append(work)
        return left

    def computed(
        self, work: Work, new: Sequence[int] = (), routes: Sequence[Routes] | None = None
    ) -> None:
        """A part of a pass was run, and gave these new tokens.

        After drafts, ``new`` is what followed each token that held: all but the last of ``new``
        are drafts that were right. routes: of each full page of the sequence, if recorded.
        """
        request, table = work.request, work.request.table
        done = work.start + len(work.tokens) - work.drafts + max(len(new) - 1, 0)
        request.computed = done
        request.tokens += new
        request.drafts = []
        if done // KV_PAGE > table.known:
            self.blocks.publish(table, request.tokens, done, routes)
        if table.state >= 0 and done == self._keep_at(request, done - 1):
            kept = self.blocks.keep_state(table, done)
            if kept is not None:
                self.copies.append((table.state, kept))

    def rerun(self, request: Request) -> None:
        """The pass that it was in did not end well, and may have left its state anywhere."""
        if request.table.state >= 0:
            _begin_again(request)

    def lost(self) -> None:
        """What was in the cache is gone: all that run wait again, with the tokens that they have,
        and begin before any other."""
        for request in reversed(self.running):
            self.blocks.close(request.table)
            request.state, request.drafts = State.WAITING, []
            _begin_again(request)
        self.waiting.extendleft(reversed(self.running))
        self.running = []
        self.copies.clear()
        self.blocks.forget()

    @property
    def load(self) -> Load:
        """Now."""
        blocks = self.blocks
        waits = len(self.running), len(self.waiting)
        return Load(*waits, blocks.held, blocks.cached, blocks.free)

    @property
    def has_room(self) -> bool:
        """Whether it takes one more. Those that have just come wait for the next pass, and may all
        be in it: what could run at once does not count as waiting."""
        return len(self.running) + len(self.waiting) < self.limits.requests

    @property
    def promised(self) -> int:
        """Pages that running requests may still take."""
        return sum(r.pages_needed - len(r.table.pages) for r in self.running)

    def _admit(self) -> None:
        promised = self.promised
        while self.waiting and len(self.running) < self.limits.running:
            request, blocks = self.waiting[0], self.blocks
            if blocks.states and not blocks.available_states:
                return
            ids = request.prompt[: request.reusable]
            table = blocks.open(ids, request.salt, routes=request.routes)
            need = request.pages_needed - len(table.pages)
            if need > blocks.available - promised:
                blocks.close(table)
                return  # those behind it wait too: else a large one might wait for ever
            promised += need
            if blocks.states:
                blocks.hold_state(table)
                if table.kept is not None and table.kept != table.state:
                    self.copies.append((table.kept, table.state))
            request.table = table
            request.computed = request.cached = len(table.pages) * KV_PAGE
            request.state = State.RUNNING
            self.running.append(self.waiting.popleft())

    def _keep_at(self, request: Request, computed: int) -> int:
        """The next position after ``computed`` at which a state is kept."""
        regular = (computed // KEEP_EVERY + 1) * KEEP_EVERY
        last = request.reusable // KV_PAGE * KV_PAGE
        return min(regular, last) if last > computed else regular

    def _cut(self, request: Request, n: int, rows: int) -> tuple[int, int]:
        """How many of the next n tokens of a prompt may run, and how many rows they have."""
        if request.table.state >= 0:
            n = min(n, self._keep_at(request, request.reached) - request.reached)
        wanted = request.wanted
        if not wanted:
            return n, 0
        first = bisect_left(wanted, request.reached)
        if first + rows < len(wanted):  # no more than up to the first that is too many
            n = min(n, wanted[first + rows] - request.reached)
        return n, bisect_left(wanted, request.reached + n) - first

    def _work(self, request: Request, n: int, drafts: int) -> Work:
        start, end, known = request.reached, request.reached + n, request.known
        tokens = request.tokens[start:end]
        tokens += [UNKNOWN] * (n - len(tokens))
        if drafts:
            tokens += request.drafts[:drafts]
        missing = -(-(end + drafts) // KV_PAGE) - len(request.table.pages)
        if missing > 0:
            self.blocks.extend(request.table, missing)
        rows: list[int] = []
        if request.wanted:
            first = bisect_left(request.wanted, start)
            rows = [p - start for p in request.wanted[first : bisect_left(request.wanted, end)]]
        scored = len(rows)
        if end == known and request.max_tokens:
            rows += range(n if rows[-1:] == [n - 1] else n - 1, n + drafts)
        return Work(request, start, tokens, drafts, rows, scored)


def _begin_again(request: Request) -> None:
    """All its tokens run again; rows that were given are not wanted any more."""
    request.wanted = [p for p in request.wanted if p >= request.computed]
    request.computed = 0
