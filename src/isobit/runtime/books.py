"""The generations of an engine: who has a part in a pass, what each is given, and how each ends.

The engine holds its lock whenever it calls any of this.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from isobit.backends.base import CHOSEN, Routes
from isobit.errors import CacheLost, ContextFull, IsobitError
from isobit.numerics import KV_PAGE
from isobit.runtime.batches import Part, PassOutcome
from isobit.runtime.prefill_budget import PrefillBudget
from isobit.runtime.request import Request, State
from isobit.runtime.scheduler import Scheduler, Work
from isobit.runtime.tokens import FinishReason, Generation, Listener

if TYPE_CHECKING:
    from isobit.runtime.model import Model

_IDLE = 0.05
"""Seconds between two passes from which on they do not count as the later one's."""


class Books:
    """What is written down of generations between passes."""

    def __init__(self, model: Model, scheduler: Scheduler, prefill_budget: PrefillBudget) -> None:
        self.parts: list[Part] = []
        """Of the pass that runs."""
        self.following: list[Part] = []
        """What runs in the next pass, whatever arrives meanwhile: a device may have begun."""
        self._model, self._scheduler, self._prefill_budget = model, scheduler, prefill_budget
        self._of: dict[Request, Generation] = {}
        self._in_pass: set[Request] = set()
        self._losses = model.backend.losses
        self._since = 0.0
        """When the pass began, at the latest."""

    def __bool__(self) -> bool:
        """Whether there are generations that have not ended."""
        return bool(self._of)

    def add(self, generation: Generation) -> None:
        """A generation waits for its first pass. Raises QueueFull if too many do."""
        self._scheduler.add(generation.request)
        self._of[generation.request] = generation

    # A pass

    def begin_pass(self, begun: float) -> Sequence[Part]:
        """Who has a part in the pass that begins now; none if nothing can run."""
        if self._losses != self._model.backend.losses:
            self._lost()
        work: list[Work] = []
        if self.following:  # the pass may have begun as the last one ended
            work = self._scheduler.go_on([work for work, _ in self.following])
        if not work:
            work, self._since = self._scheduler.schedule(), begun
        self.parts = [(w, self._of[w.request]) for w in work]
        self._in_pass = {w.request for w in work}
        if not work:
            return ()
        self.copy_states()
        if self._model.backend.goes_ahead and not self._model.graph.recurrent:
            after = self._scheduler.following(work)
            self.following = [(w, self._of[w.request]) for w in after]
            # What is about to be queued is read without the lock, too.
            self._in_pass.update(w.request for w in after)
        return self.parts

    def hand_out(
        self,
        found: Sequence[PassOutcome],
        seen: Routes | None,
        begun: float,
        listeners: set[Listener],
    ) -> None:
        """Tokens to their generations; adds the listeners to be notified."""
        now, start = time.perf_counter_ns(), 0
        spent = now * 1e-9 - begun
        prompt = attended = 0
        for (part, generation), (token, digest, error) in zip(self.parts, found, strict=True):
            request = part.request
            n = len(part.tokens)
            stop = start + n
            attended += n * (part.start + (n + 1) // 2)
            if part.start == len(request.tokens) - 1 >= len(request.prompt):
                generation.decode_seconds += spent
            else:
                generation.prefill_seconds += spent
                prompt += n
            try:
                self._in_pass.discard(request)
                if error is not None:
                    raise error
                if seen is not None and request.routes:
                    self._saw(generation, part.start, seen[start:stop])
                pages = None
                if request.routes and (part.start + n) // KV_PAGE > request.table.known:
                    pages = _pages(generation)
                self._scheduler.computed(part, () if token is None else (token.id,), pages)
                if token is not None:
                    generation.give(token, digest, now)
                self._end_if_over(generation)
            except KeyboardInterrupt:  # this one has half of what the pass gave
                self.fail(generation)
                raise
            except BaseException as wrong:  # of one generation, as of what watches it
                self.fail(generation, wrong)
            start = stop
            if generation.listen is not None and (generation.ready or generation.ended):
                listeners.add(generation.listen)
        self._pass_over()
        if begun - self._since < _IDLE:  # else it was the caller who let the device wait
            self._prefill_budget.ran(start - prompt, prompt, attended, now * 1e-9 - self._since)
        self._since = now * 1e-9
        self.copy_states()

    def failed(self, error: BaseException) -> bool:
        """A pass did not end well; whether those in it are told, and nobody else need be.

        Of a lost cache nobody is: all begin again with the next pass. An interruption is the
        concern of whoever ran the pass alone; the others' tokens run again, but for those that have
        what it gave.
        """
        lost = isinstance(error, CacheLost)
        told = lost or (bool(self.parts) and isinstance(error, IsobitError))
        self.following = []
        for work, generation in () if lost else self.parts:
            if work.request not in self._in_pass:
                continue
            if isinstance(error, Exception) or generation.cancelled:
                self.fail(generation, None if generation.cancelled else error)
            else:
                self._scheduler.rerun(work.request)
        self._pass_over()
        return told

    def refuse_first(self) -> bool:
        """Nothing can run; what waits then waits for sequences that callers hold open."""
        waiting = self._scheduler.waiting
        if not waiting:
            return False
        full = "KV cache: expected room for a generation, got sequences that hold it; close one"
        self.fail(self._of[waiting[0]], ContextFull(f"{full}, or load the model with more"))
        return True

    def copy_states(self) -> None:
        """Bring states where the scheduler has promised them."""
        for source, target in self._scheduler.copies:
            self._model.backend.copy_state(source, target)
        self._scheduler.copies.clear()

    def _pass_over(self) -> None:
        """End those who were cancelled during the pass, and had no part in it but in the next."""
        for request in self._in_pass:
            if (generation := self._of.get(request)) is not None and generation.cancelled:
                self.fail(generation)
        self._in_pass.clear()
        self.parts = []

    def _lost(self) -> None:
        """The backend has lost its KV cache: what runs begins again, unless somebody watches stages
        and would see them twice."""
        self._losses = self._model.backend.losses
        for request in list(self._scheduler.running):
            watch = self._of[request].watch
            if watch is not None and watch.stages - {CHOSEN}:
                self.fail(self._of[request], CacheLost("KV cache: it was lost: begin again"))
        self._scheduler.lost()

    def _saw(self, generation: Generation, start: int, routes: Routes) -> None:
        """The experts of tokens that ran, from a position on; also of those before it which were
        found in the cache. Those that ran before, in a pass or a cache that was lost, are known."""
        known = generation.n_seen
        new = [routes[max(known - start, 0) :]]
        if known < start and (cached := self._scheduler.blocks.routes(generation.request.table)):
            new = [np.concatenate(cached)[known:], *new]
        watch = generation.watch
        for experts in filter(len, new):
            generation.seen.append(experts)
            generation.n_seen += len(experts)
            if watch is not None and CHOSEN in watch.stages:
                watch.routed(experts)

    # Ends

    def cancel(self, generation: Generation) -> bool:
        """End it now, or after the pass that it is in; whether now."""
        generation.cancelled = True
        if generation.request in self._in_pass:
            return False
        self.fail(generation)
        return True

    def fail(self, generation: Generation, error: BaseException | None = None) -> None:
        """End it before its end; None: nothing went wrong."""
        if generation.ended:
            return
        generation.error = error
        self._end(generation, "interrupted")
        if generation.listen is not None:
            generation.listen.notify()

    def fail_all(self, error: IsobitError | None) -> None:
        """End all."""
        for generation in list(self._of.values()):
            self.fail(generation, error)

    def _end_if_over(self, generation: Generation) -> None:
        request = generation.request
        generated = request.generated
        if generation.cancelled:
            self._end(generation, "interrupted")
        elif generated and request.tokens[-1] in generation.ends:
            self._end(generation, "stop")
        elif generated == request.max_tokens and (generated or not request.behind):
            self._end(generation, "length")

    def _end(self, generation: Generation, reason: FinishReason) -> None:
        request = generation.request
        if self._of.pop(request, None) is None:
            return
        generation.finish_reason = reason
        if request.state is not State.FINISHED:
            self._scheduler.finish(request)


def _pages(generation: Generation) -> list[Routes]:
    """The experts of each page of the sequence."""
    routes = generation.routes
    # Only whoever adds to them may: a reader has the one list or the other.
    generation.seen = [routes]
    return [routes[i : i + KV_PAGE] for i in range(0, len(routes), KV_PAGE)]
