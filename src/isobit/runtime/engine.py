"""Many generations at once on one model: each gets the bits that it would get alone.

A pass is scheduled, run, sampled and handed out. Whoever waits for a token runs passes for all, so
that no thread is needed; where nobody waits, in a server, :meth:`Engine.start` gives it one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace as changed
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import CHOSEN, Routes, Tap, by_sequence
from isobit.errors import CacheLost, ContextFull, IsobitError, UsageError
from isobit.numerics import KV_PAGE
from isobit.runtime.batches import Batches, Part, PassOutcome, PassRequest
from isobit.runtime.blocks import Blocks, PageTable
from isobit.runtime.grammar import Constraint
from isobit.runtime.pass_lock import PassLock
from isobit.runtime.prefill_budget import PrefillBudget
from isobit.runtime.request import Request, State
from isobit.runtime.sampler import Sampler, Sampling
from isobit.runtime.scheduler import Limits, Load, QueueFull, Scheduler, Work
from isobit.runtime.tokens import FinishReason, Generation, Listener, TakeRows, Watcher

if TYPE_CHECKING:
    from isobit.runtime.model import Model

_LISTENER_SECONDS = 0.02
"""Seconds that listeners on the processors that passes run on have before the next pass: threads of
a pass meet many times, and one that another thread keeps from running holds up all."""
_MANY = 8
"""Generations in a pass from which on that is more than they would lose by waiting."""

_IDLE = 0.05
"""Seconds between two passes from which on they do not count as the later one's."""

_log = logging.getLogger("isobit.engine")


class Engine(PassLock):
    """Runs generations together; it has the KV cache of its model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        limits = model.backend.limits
        self.scheduler = Scheduler(Blocks(limits.pages, limits.states), Limits())
        self._prefill_budget = PrefillBudget(model.backend.padded)
        self.scheduler.prefill_budget = self._prefill_budget.tokens
        self.limit(Limits.of(model.backend.engine))
        self._batches = Batches(model.graph.logits.shape.width)
        self.no_routes = model.backend.no_routes
        self._of: dict[Request, Generation] = {}
        self._in_pass: set[Request] = set()
        self._losses = model.backend.losses
        self._closed = False
        self._thread: threading.Thread | None = None
        self._following: list[Part] = []
        """What runs in the next pass, whatever arrives meanwhile: a device may have begun."""
        self._since = 0.0
        """When the pass began, at the latest."""
        self._notified: set[Listener] = set()
        """By the last pass, if it was of many."""

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._closed

    @property
    def serving(self) -> bool:
        """Whether it has a thread of its own."""
        thread = self._thread  # looked at once: another thread may be stopping it
        return thread is not None and thread.is_alive()

    def load(self) -> Load:
        """What it has to do, between two changes of the books."""
        with self._lock:
            return self.scheduler.load

    def limit(self, limits: Limits) -> None:
        """How much runs together from now on, and how much may wait."""
        if self.model.graph.recurrent:  # so many sequences have a state
            running = min(limits.running, self.model.backend.engine.max_sequences)
            limits = changed(limits, running=running)
        with self._lock:
            self.scheduler.limits = limits
            self._prefill_budget.steady = limits.steady

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
                self.scheduler.add(request)
                self._of[request] = generation
            else:
                generation.finish_reason = "length"
            try:
                if watch is not None:  # now that it is not asked for again
                    watch.begin(model, ids, sampling, generation.sampler.seed)
            except BaseException as error:
                self._fail(generation, error)
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

    def start(self) -> None:
        """Run passes in a thread, until :meth:`stop`; nothing if there is one already."""
        with self._lock:
            self._require_open()
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="isobit", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End all generations, and the thread."""
        with self.turn(), self._lock:
            self._end_all(None)
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def close(self) -> None:
        """Stop for good, after the pass that is running; who reads then gets the reason."""
        with self.turn(), self._lock:
            self._closed = True
            self._end_all(self.model.closed_error())
        self.stop()

    def _serve(self) -> None:
        me = threading.current_thread()
        while self._thread is me:
            try:
                if not self.step():
                    with self._lock:
                        self._changed.wait_for(lambda: self._of or self._thread is not me)
                elif self.model.backend.on_host:
                    for listener in self._notified:
                        listener.wait_taken(_LISTENER_SECONDS)
            except Exception:  # those of the pass have it; the others go on
                _log.exception("a pass failed")

    # Sequences that a caller runs, who has the turn

    def hold(self, table: PageTable, length: int) -> None:
        """The pages of a sequence's first ``length`` tokens, and its state; or ContextFull."""
        with self._lock:
            self._require_open()
            self._copy_states()  # if an interruption kept a pass from it
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
        parts: list[Part] = []
        listeners: set[Listener] = set()
        self._stepping = True
        try:
            with self._lock:
                if self._losses != self.model.backend.losses:
                    self._lost()
                work: list[Work] = []
                if self._following:  # the pass may have begun as the last one ended
                    work = self.scheduler.go_on([work for work, _ in self._following])
                if not work:
                    work, self._since = self.scheduler.schedule(), begun
                if not work:
                    return self._refuse_first()
                parts = [(w, self._of[w.request]) for w in work]
                self._in_pass = {w.request for w in work}
                if self.scheduler.copies:
                    self._copy_states()
                if self.model.backend.goes_ahead and not self.model.graph.recurrent:
                    after = self.scheduler.following(work)
                    self._following = [(w, self._of[w.request]) for w in after]
                    # What is about to be queued is read without the lock, too.
                    self._in_pass.update(w.request for w in after)
            found, seen = self._run(parts)
            with self._lock:
                self._hand_out(parts, found, seen, begun, listeners)
        except CacheLost:
            with self._lock:
                self._following = []
                self._pass_over()
            return True  # the next pass begins again
        except BaseException as error:
            with self._lock:
                self._following = []
                self._failed(parts, error)
            if parts and isinstance(error, IsobitError):
                return True  # whoever waits for one of these gets it
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
        if self._following and not self._prefill_budget.piece_comes:  # it takes long to queue
            if (following := asked.following(self._following)) is not None:
                wanted = changed(wanted, following=following)
            else:
                self._following = []
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

    def _hand_out(
        self,
        parts: Sequence[Part],
        found: Sequence[PassOutcome],
        seen: Routes | None,
        begun: float,
        listeners: set[Listener],
    ) -> None:
        """Tokens to their generations; adds the listeners to be notified."""
        now, start = time.perf_counter_ns(), 0
        spent = now * 1e-9 - begun
        prompt = attended = 0
        for (part, generation), (token, digest, error) in zip(parts, found, strict=True):
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
                self.scheduler.computed(part, () if token is None else (token.id,), pages)
                if token is not None:
                    generation.give(token, digest, now)
                self._end_if_over(generation)
            except KeyboardInterrupt:  # this one has half of what the pass gave
                self._fail(generation)
                raise
            except BaseException as wrong:  # of one generation, as of what watches it
                self._fail(generation, wrong)
            start = stop
            if generation.listen is not None and (generation.ready or generation.ended):
                listeners.add(generation.listen)
        self._pass_over()
        if begun - self._since < _IDLE:  # else it was the caller who let the device wait
            self._prefill_budget.ran(start - prompt, prompt, attended, now * 1e-9 - self._since)
        self._since = now * 1e-9
        if self.scheduler.copies:
            self._copy_states()

    def _end_if_over(self, generation: Generation) -> None:
        request = generation.request
        generated = request.generated
        if generation.cancelled:
            self._end(generation, "interrupted")
        elif generated and request.tokens[-1] in generation.ends:
            self._end(generation, "stop")
        elif generated == request.max_tokens and (generated or not request.behind):
            self._end(generation, "length")

    def _pass_over(self) -> None:
        """End those who were cancelled during the pass, and had no part in it but in the next."""
        for request in self._in_pass:
            if (generation := self._of.get(request)) is not None and generation.cancelled:
                self._fail(generation)
        self._in_pass.clear()

    def _failed(self, parts: Sequence[Part], error: BaseException) -> None:
        """A pass did not end well. An interruption is the concern of whoever ran it alone; the
        others' tokens run again, but for those that have what it gave."""
        for work, generation in parts:
            if work.request not in self._in_pass:
                continue
            if isinstance(error, Exception) or generation.cancelled:
                self._fail(generation, None if generation.cancelled else error)
            else:
                self.scheduler.rerun(work.request)
        self._pass_over()
        self._changed.notify_all()

    def _lost(self) -> None:
        """The backend has lost its KV cache: what runs begins again, unless somebody watches stages
        and would see them twice."""
        self._losses = self.model.backend.losses
        for request in list(self.scheduler.running):
            watch = self._of[request].watch
            if watch is not None and watch.stages - {CHOSEN}:
                self._fail(self._of[request], CacheLost("KV cache: it was lost: begin again"))
        self.scheduler.lost()

    def _refuse_first(self) -> bool:
        """Nothing can run; what waits then waits for sequences that callers hold open."""
        waiting = self.scheduler.waiting
        if not waiting:
            return False
        full = "KV cache: expected room for a generation, got sequences that hold it; close one"
        self._fail(self._of[waiting[0]], ContextFull(f"{full}, or load the model with more"))
        return True

    def _copy_states(self) -> None:
        for source, target in self.scheduler.copies:
            self.model.backend.copy_state(source, target)
        self.scheduler.copies.clear()

    def _saw(self, generation: Generation, start: int, routes: Routes) -> None:
        """The experts of tokens that ran, from a position on; also of those before it which were
        found in the cache. Those that ran before, in a pass or a cache that was lost, are known."""
        known = generation.n_seen
        new = [routes[max(known - start, 0) :]]
        if known < start and (cached := self.scheduler.blocks.routes(generation.request.table)):
            new = [np.concatenate(cached)[known:], *new]
        watch = generation.watch
        for experts in filter(len, new):
            generation.seen.append(experts)
            generation.n_seen += len(experts)
            if watch is not None and CHOSEN in watch.stages:
                watch.routed(experts)

    # Ends

    def cancel(self, generation: Generation) -> None:
        """See :meth:`Generation.cancel`."""
        with self._lock:
            generation.cancelled = True
            if generation.request not in self._in_pass:
                self._fail(generation)
                self._changed.notify_all()

    def _fail(self, generation: Generation, error: BaseException | None = None) -> None:
        if generation.ended:
            return
        generation.error = error
        self._end(generation, "interrupted")
        if generation.listen is not None:
            generation.listen.notify()

    def _end(self, generation: Generation, reason: FinishReason) -> None:
        request = generation.request
        if self._of.pop(request, None) is None:
            return
        generation.finish_reason = reason
        if request.state is not State.FINISHED:
            self.scheduler.finish(request)

    def _end_all(self, error: IsobitError | None) -> None:
        for generation in list(self._of.values()):
            self._fail(generation, error)

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


def _pages(generation: Generation) -> list[Routes]:
    """The experts of each page of the sequence."""
    routes = generation.routes
    generation.seen = [
        routes
    ]  # only whoever adds to them may: a reader has the one list or the other
    return [routes[i : i + KV_PAGE] for i in range(0, len(routes), KV_PAGE)]
