"""Many generations at once on one model: each gets the bits that it would get alone.

A pass is scheduled, run, sampled and handed out. Whoever waits for a token runs passes for all, so
that no thread is needed; where nobody may wait, in an event loop, it has one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace as changed
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import CHOSEN, Routes, Tap, by_sequence
from isobit.errors import UsageError
from isobit.numerics import KV_PAGE
from isobit.runtime.batches import Batches, Part, PassOutcome, PassRequest
from isobit.runtime.blocks import Blocks, PageTable
from isobit.runtime.books import Books
from isobit.runtime.grammar import Constraint
from isobit.runtime.pass_lock import PassLock
from isobit.runtime.pass_thread import PassThread
from isobit.runtime.prefill_budget import PrefillBudget
from isobit.runtime.request import Request
from isobit.runtime.sampler import Sampler, Sampling
from isobit.runtime.scheduler import Limits, Load, QueueFull, Scheduler
from isobit.runtime.tokens import Generation, Listener, TakeRows, Watcher

if TYPE_CHECKING:
    from isobit.runtime.model import Model

_LISTENER_SECONDS = 0.02
"""Seconds that listeners on the processors that passes run on have before the next pass: threads of
a pass meet many times, and one that another thread keeps from running holds up all."""
_MANY = 8
"""Generations in a pass from which on that is more than they would lose by waiting."""


class Engine(PassLock):
    """Runs generations together; it has the KV cache of its model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        limits = model.backend.limits
        self.scheduler = Scheduler(Blocks(limits.pages, limits.states), Limits())
        self.prefill_budget = PrefillBudget(model.backend.padded)
        self.scheduler.prefill_budget = self.prefill_budget.tokens
        self.limit(Limits.of(model.backend.engine))
        self._batches = Batches(model.graph.logits.shape.width)
        self.no_routes = model.backend.no_routes
        self._books = Books(model, self.scheduler, self.prefill_budget)
        self._closed = False
        self._thread = PassThread(self._changed, self._thread_step, lambda: bool(self._books))
        self._notified: set[Listener] = set()
        """By the last pass, if it was of many."""

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._closed

    @property
    def serving(self) -> bool:
        """Whether it has a thread of its own."""
        return self._thread.alive

    def load(self) -> Load:
        """What it has to do, between two changes of the books."""
        with self._lock:
            return self.scheduler.load

    def limit(self, limits: Limits) -> None:
        """How much runs together from now on, and how much may wait."""
        running = min(limits.running, self.model.backend.limits.pages)  # each has at least one
        if self.model.graph.recurrent:  # so many sequences have a state
            running = min(running, self.model.backend.engine.max_sequences)
        limits = changed(limits, running=running)
        with self._lock:
            self.scheduler.limits = limits
            self.prefill_budget.steady = limits.steady

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int | None,
        sampling: Sampling,
        *,
        choice: int = 0,
        ends: frozenset[int] | None = None,
        logprobs: int | None = None,
        of_prompt: bool = False,
        routes: bool = False,
        hidden: bool = False,
        watch: Watcher | None = None,
        constraint: Constraint | None = None,
        wanted: Sequence[int] = (),
        take_rows: TakeRows | None = None,
        salt: str | None = "",
        begun: Sequence[int] = (),
        listen: Listener | None = None,
    ) -> Generation:
        """Line a generation up.

        Args:
            prompt: token ids.
            max_tokens: the most to generate; None goes on to the end of the context.
            sampling: how tokens are chosen.
            choice: which of several outputs to one prompt this is.
            ends: tokens that end it; None: the model's.
            logprobs: measure every token, and the k most likely at its place.
            of_prompt: with ``logprobs``, measure the prompt's tokens too.
            routes: keep the experts of each token: :meth:`Generation.routes`.
            hidden: keep the model's state after the prompt, what its head is given.
            watch: sees the stages and the choices of this generation alone.
            constraint: what the tokens are held to, compiled from ``sampling.grammar``.
            wanted, take_rows: ascending positions of the prompt whose logits are given to
                ``take_rows``, after each pass those that are new.
            salt: pages are shared between generations of the same; None: with none.
            begun: tokens that were generated elsewhere, fewer than ``max_tokens``; this goes on
                from there, and gives none of them.
            listen: is notified when there is something new to take, or it has ended.

        Raises UsageError for what the model cannot do, QueueFull if too many wait.
        """
        model = self.model
        ids = model.checked(prompt)
        sampling.check_ids(model.config.vocab)
        room = model.context - len(ids)
        most = room if max_tokens is None else min(max_tokens, room)
        if of_prompt and logprobs is not None:
            wanted = range(len(ids) - 1)
        if hidden:
            wanted = (len(ids) - 1,)
        if watch is not None and watch.stages - {CHOSEN}:
            salt = None  # of tokens that are not run there are no stages
        if model.graph.recurrent and not model.backend.copies_states:
            salt = None
        request = Request(
            ids,
            most,
            salt=salt,
            wanted=wanted,
            routes=model.config.is_moe and (routes or _sees_routes(watch)),
        )
        sampler = Sampler(sampling, ids, choice, constraint)
        if begun:
            if len(begun) >= most or watch is not None:
                raise UsageError("begun: expected fewer than max_tokens, and nobody who watches")
            request.tokens += model.checked(begun)
            for token in begun:
                sampler.append(token)
        generation = Generation(
            self,
            request,
            sampler,
            ends=model.stop_ids if ends is None else ends,
            logprobs=logprobs,
            hidden=hidden,
            watch=watch,
            take_rows=take_rows,
            listen=listen,
        )
        with self._lock:
            self._require_open()
            if most or wanted:
                self._books.add(generation)
            else:
                generation.finish_reason = "length"
            try:
                if watch is not None:  # now that it is not asked for again
                    watch.begin(model, ids, sampling, generation.sampler.seed)
            except BaseException as error:
                self._books.fail(generation, error)
                raise
            self._changed.notify_all()
        return generation

    def line_up(self, *args: Any, **settings: Any) -> Generation:
        """:meth:`submit`, and while too many wait, run passes until one less does."""
        while True:
            try:
                return self.submit(*args, **settings)
            except QueueFull:
                self.advance(lambda: self.scheduler.has_room)

    def cancel(self, generation: Generation) -> None:
        """See :meth:`Generation.cancel`."""
        with self._lock:
            if self._books.cancel(generation):
                self._changed.notify_all()

    def start(self) -> None:
        """Run passes in a thread, until :meth:`stop`; nothing if there is one already."""
        with self._lock:
            self._require_open()
            self._thread.start()

    def awaited(self) -> AbstractContextManager[None]:
        """While inside, where an event loop waits for a pass, a thread runs them."""
        return self._thread.awaited(self._require_open)

    def stop(self) -> None:
        """End all generations, and the thread."""
        with self.turn(), self._lock:
            self._books.fail_all(None)
            thread = self._thread.end()
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """Stop for good, after the pass that is running; who reads then gets the reason."""
        with self.turn(), self._lock:
            self._closed = True
            self._books.fail_all(self.model.closed_error())
        self.stop()

    def _thread_step(self) -> bool:
        """A pass of the thread that runs them where nobody may wait."""
        if not self.step():
            return False
        if self.model.backend.on_host:
            for listener in self._notified:
                listener.wait_taken(_LISTENER_SECONDS)
        return True

    # Sequences that a caller runs, who has the turn

    def hold(self, table: PageTable, length: int) -> None:
        """The pages of a sequence's first ``length`` tokens, and its state; or ContextFull."""
        with self._lock:
            self._require_open()
            self._books.copy_states()  # if an interruption kept a pass from it
            blocks = self.scheduler.blocks
            if blocks.states and table.state < 0:
                blocks.hold_state(table)
            missing = -(-length // KV_PAGE) - len(table.pages)
            if missing > 0:
                blocks.extend(table, missing, spare=self.scheduler.promised)

    def release(self, table: PageTable) -> None:
        """Give them back."""
        with self._lock:
            self.scheduler.blocks.close(table)

    # A pass

    def _step(self) -> bool:
        begun = time.perf_counter()
        parts: Sequence[Part] = ()
        listeners: set[Listener] = set()
        self._stepping = True
        try:
            with self._lock:
                parts = self._books.begin_pass(begun)
                if not parts:
                    return self._books.refuse_first()
            found, seen = self._run(parts)
            with self._lock:
                self._books.hand_out(found, seen, begun, listeners)
        except BaseException as error:
            with self._lock:
                told = self._books.failed(error)
                self._changed.notify_all()
            if not told:
                raise
        finally:
            self._stepping = False
            for listener in listeners:
                listener.notify()
            self._notified = listeners if len(parts) >= _MANY else set()
        return True

    def _run(self, parts: Sequence[Part]) -> tuple[list[PassOutcome], Routes | None]:
        """What it gives to each part, and the experts of all tokens if somebody wants them."""
        model = self.model
        asked = PassRequest(parts, self._batches)
        batch, wanted = self._batches.of([work for work, _ in parts]), asked.wanted
        books = self._books
        if books.following and not self.prefill_budget.piece_comes:  # it takes long to queue
            if (following := asked.following(books.following)) is not None:
                wanted = changed(wanted, following=following)
            else:
                books.following = []
        watched = {
            i: generation.watch
            for i, (_, generation) in enumerate(parts)
            if generation.watch is not None and generation.watch.stages - {CHOSEN}
        }
        if not watched:
            results = model.run_batch(batch, wanted)
        else:
            stages = frozenset[str]().union(*(w.stages for w in watched.values())) - {CHOSEN}
            tap = by_sequence(model.graph, batch, {i: _seen_by(w) for i, w in watched.items()})
            results = model.run_batch(batch, wanted, tap, stages)
        return asked.answer(wanted, results), results.routes

    def _require_open(self) -> None:
        if self._closed:
            raise self.model.closed_error()


def _sees_routes(watch: Watcher | None) -> bool:
    return watch is not None and CHOSEN in watch.stages


def _seen_by(watch: Watcher) -> Tap:
    def tap(stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
        if stage in watch.stages:
            watch.tap(stage, layer, np.array(value))

    return tap
