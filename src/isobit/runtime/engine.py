"""Many generations at once on one model: each gets the bits that it would get alone.

A pass is scheduled, run, sampled and handed out. Whoever waits for a token runs passes for all, so
that no thread is needed; a server gives the engine one, in :meth:`Engine.run`. Two locks: one is
held by whoever runs a pass, the other for a moment by whoever reads or changes the books.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace as changed

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32, LOGITS, Batch
from isobit.errors import IsobitError, UsageError
from isobit.numerics import TILE
from isobit.runtime.blocks import Blocks
from isobit.runtime.generation import FinishReason, Watcher
from isobit.runtime.grammar import Constraint
from isobit.runtime.model import Model
from isobit.runtime.request import Request, State
from isobit.runtime.sampler import Sampler, Sampling, choose
from isobit.runtime.scheduler import Limits, Scheduler, Work
from isobit.runtime.tokens import Generation, Token

ROUTES = "moe_router_indices"
STATE = "final_norm"


class Engine:
    """Runs generations together. It has all the KV cache of its model until it is closed."""

    def __init__(self, model: Model, limits: Limits | None = None) -> None:
        """Raises ContextFull if sequences of the model are open."""
        self.model = model
        limits = limits or Limits(pass_tokens=max(model.engine.chunk, Limits.running))
        self._recurrent = model.graph.recurrent
        if self._recurrent:  # so many sequences have a state
            limits = changed(limits, running=min(limits.running, model.engine.max_sequences))
        self._pages = model.take_all_pages()
        self.scheduler = Scheduler(Blocks(len(self._pages)), limits)
        self._states = list(range(model.engine.max_sequences - 1, -1, -1))
        self._of: dict[Request, Generation] = {}
        self._in_pass: set[Request] = set()
        self._turn = threading.Lock()
        self._books = threading.Condition()
        self._closed = False

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
        hidden: bool = False,
        watch: Watcher | None = None,
        salt: str = "",
        listen: Callable[[], None] | None = None,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Line a generation up.

        Args:
            prompt: token ids.
            max_tokens: the most to generate; None goes on to the end of the context.
            sampling: how tokens are chosen.
            choice: which of several outputs to one prompt this is.
            ends: tokens that end it; None: the model's.
            logprobs: measure every token, and the k likeliest at its place.
            of_prompt: with ``logprobs``, measure the prompt's tokens too.
            hidden: keep the model's state after the prompt, what its head is given.
            watch: sees the experts and the choices of this generation alone.
            salt: pages are shared between generations of the same.
            listen: called by whoever runs the pass when there is something new to take, or it has
                ended; it must neither wait nor raise.
            constraint: what the tokens are held to, compiled from ``sampling.grammar``.

        Raises UsageError for what the model cannot do, QueueFull if too many wait.
        """
        ids = self.model.checked(prompt)
        sampling.check_ids(self.model.config.vocab)
        if watch is not None and watch.stages - {ROUTES}:
            raise UsageError(f"watch: expected the stage {ROUTES} alone, got others")
        room = self.model.context - len(ids)
        most = room if max_tokens is None else min(max_tokens, room)
        routes = watch is not None and self.model.config.is_moe
        measure = of_prompt and logprobs is not None
        request = Request(
            ids,
            most,
            salt=None if self._recurrent else salt,
            logits_from=0 if measure else None,
            routes=routes,
        )
        generation = Generation(
            self,
            request,
            Sampler(sampling, ids, choice, constraint),
            ends=self.model.stop_ids if ends is None else ends,
            logprobs=logprobs,
            hidden=hidden,
            watch=watch,
            listen=listen,
        )
        if watch is not None:
            watch.begin(self.model, ids, sampling, generation.sampler.seed)
        with self._books:
            if self._closed:
                raise UsageError("engine: expected an open one, got one that was closed")
            if most == 0 and not (measure or hidden):
                generation.finish_reason = "length"
                return generation
            self.scheduler.add(request)
            self._of[request] = generation
            self._books.notify_all()
        return generation

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._closed

    def step(self) -> bool:
        """One pass for all; False if there was nothing to do."""
        with self._turn:
            return self._step()

    def run(self) -> None:
        """Run passes until the engine is closed: for a thread of its own."""
        while True:
            if not self.step():
                with self._books:
                    self._books.wait_for(lambda: self._closed or self.scheduler.waiting)
            if self._closed:
                return

    def close(self) -> None:
        """End all generations and give the cache back, after the pass that is running."""
        with self._turn, self._books:
            if self._closed:
                return
            self._closed = True
            for generation in list(self._of.values()):
                self._end(generation, "interrupted")
            self.scheduler.blocks.forget()
            self.model.give_pages_back(self._pages)
            self._books.notify_all()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _advance(self, generation: Generation) -> None:
        with self._turn:
            waits = not generation._ready and generation.finish_reason is None
            if waits and generation.error is None:  # else another's pass brought something
                self._step()

    def _cancel(self, generation: Generation) -> None:
        with self._books:
            generation._cancelled = True
            if generation.request not in self._in_pass:
                self._end(generation, "interrupted")

    def _step(self) -> bool:
        with self._books:
            work = self.scheduler.schedule()
            parts = [(w, self._of[w.request]) for w in work]
            for part, generation in parts:
                self._in_pass.add(part.request)
                if self._recurrent and generation._state < 0:
                    generation._state = self._states.pop()
                if part.request.routes and part.start == part.request.cached:
                    self._recall(generation)
        if not work:
            return False
        seen: dict[str, list[NDArray[np.generic]]] = {ROUTES: [], STATE: []}
        stages = {ROUTES for _, generation in parts if generation._watch is not None}
        stages |= {STATE for _, generation in parts if generation._wants_hidden}
        try:
            results = self.model.run_batch(
                _batch(work, [generation._state for _, generation in parts]),
                LOGITS,
                (lambda stage, _, value: seen[stage].append(np.array(value))) if stages else None,
                frozenset(stages) if stages else None,
            )
            logits = results.logits
            assert logits is not None
            self._keep_hidden(parts, seen[STATE])
            self._measure_prompts(parts, logits)
            new = self._chosen(parts, logits)
        except BaseException as error:
            with self._books:
                for _, generation in parts:
                    self._fail(generation, error)
            if isinstance(error, IsobitError):
                return True  # whoever waits for one of these is told
            raise
        with self._books:
            routes = seen[ROUTES]
            self._hand_out(parts, new, np.stack(routes, axis=1) if routes else None)
        return True

    def _chosen(
        self, parts: Sequence[tuple[Work, Generation]], logits: F32
    ) -> dict[Request, tuple[Token | IsobitError, F32]]:
        """For each request that has caught up its next token, and the logits it is from."""
        rows, choosing, row = [], [], -1
        for part, generation in parts:
            row += len(part.tokens) - part.first_row
            caught_up = part.start + len(part.tokens) == len(part.request.tokens)
            if caught_up and part.request.max_tokens:
                rows.append(row)
                choosing.append(generation)
        if not rows:
            return {}
        if len(rows) < len(logits):
            logits = logits[rows]
        ids = choose(self.model.rows, logits, [g.sampler for g in choosing])
        measured = self._measured(choosing, logits, ids)
        return {
            g.request: (measured.get(i, Token(token)) if isinstance(token, int) else token, row)
            for i, (g, token, row) in enumerate(zip(choosing, ids, logits, strict=True))
        }

    def _keep_hidden(
        self, parts: Sequence[tuple[Work, Generation]], states: Sequence[NDArray[np.generic]]
    ) -> None:
        """The states after the prompts that end in this pass, if they are wanted."""
        row = -1
        for part, generation in parts:
            row += len(part.tokens)
            if generation._wants_hidden and part.start + len(part.tokens) == len(
                part.request.prompt
            ):
                generation.hidden = states[0][row].astype(np.float32)

    def _measure_prompts(self, parts: Sequence[tuple[Work, Generation]], logits: F32) -> None:
        row = 0
        for part, generation in parts:
            ids, n = part.request.prompt, len(part.tokens) - part.first_row
            rows, row = logits[row : row + n], row + n
            first = part.start + part.first_row + 1
            if part.request.logits_from is None or first >= len(ids):
                continue
            said = np.array(ids[first : first + n], np.int32)
            k = generation._logprobs or 0
            values, top_ids, top = self.model.logprobs(rows[: len(said)], said[:, None], k)
            generation.prompt += [
                Token(token, value, tuple(zip(likeliest, theirs, strict=True)))
                for token, value, likeliest, theirs in zip(
                    said.tolist(),
                    values[:, 0].tolist(),
                    top_ids.tolist(),
                    top.tolist(),
                    strict=True,
                )
            ]

    def _measured(
        self, choosing: Sequence[Generation], logits: F32, ids: Sequence[int | IsobitError]
    ) -> dict[int, Token]:
        wanted = {
            i: g._logprobs
            for i, g in enumerate(choosing)
            if g._logprobs is not None and isinstance(ids[i], int)
        }
        if not wanted:
            return {}
        at = list(wanted)
        chosen = {i: token for i, token in enumerate(ids) if isinstance(token, int)}
        values, top_ids, top = self.model.logprobs(
            logits[at], [[chosen[i]] for i in at], max(wanted.values())
        )
        return {
            i: Token(
                chosen[i],
                float(values[n, 0]),
                tuple(zip(top_ids[n, :k].tolist(), top[n, :k].tolist(), strict=True)),
            )
            for n, (i, k) in enumerate(wanted.items())
        }

    def _recall(self, generation: Generation) -> None:
        """The experts of the tokens that were found in the cache."""
        if generation.request.cached and not generation._routes:
            for page in self.scheduler.blocks.routes(generation.request.table):
                self._saw(generation, page.astype(np.int16))

    def _saw(self, generation: Generation, routes: NDArray[np.int16]) -> None:
        generation._routes.append(routes)
        assert generation._watch is not None
        for layer in range(routes.shape[1]):
            generation._watch.tap(ROUTES, layer, routes[:, layer])

    def _hand_out(
        self,
        parts: Sequence[tuple[Work, Generation]],
        new: dict[Request, tuple[Token | IsobitError, F32]],
        routes: NDArray[np.generic] | None,
    ) -> None:
        start = 0
        for part, generation in parts:
            self._in_pass.discard(part.request)
            stop = start + len(part.tokens)
            if routes is not None and part.request.routes:
                self._saw(generation, routes[start:stop].astype(np.int16))
            start = stop
            token, logits = new.get(part.request, (None, None))
            if isinstance(token, IsobitError):
                self._fail(generation, token)
                continue
            ids = [] if token is None else [token.id]
            full = (part.start + len(part.tokens)) // TILE > part.request.table.known
            self.scheduler.computed(part, ids, _pages_of(generation) if full else None)
            if generation._cancelled:
                self._end(generation, "interrupted")
            elif token is not None and logits is not None:
                self._give(generation, token, logits)
            elif not part.request.behind:  # only the prompt was wanted
                self._end(generation, "length")
        self._books.notify_all()

    def _give(self, generation: Generation, token: Token, logits: F32) -> None:
        generation.sampler.append(token.id)
        if generation._watch is not None:
            generation._watch.chose(logits, token.id)
        generation._ready.append(token)
        if token.id in generation._ends:
            self._end(generation, "stop")
        elif generation.request.generated == generation.request.max_tokens:
            self._end(generation, "length")
        elif generation._listen is not None:
            generation._listen()

    def _fail(self, generation: Generation, error: BaseException) -> None:
        generation._error = error
        self._end(generation, "interrupted")

    def _end(self, generation: Generation, reason: FinishReason) -> None:
        request = generation.request
        self._in_pass.discard(request)
        if self._of.pop(request, None) is None:
            return
        generation.finish_reason = reason
        if request.state is not State.FINISHED:
            self.scheduler.finish(request)
        if generation._state >= 0:
            self._states.append(generation._state)
            generation._state = -1
        if generation._listen is not None:
            generation._listen()


def _pages_of(generation: Generation) -> list[NDArray[np.int16]] | None:
    """The experts of each page of the sequence, if they are recorded."""
    request = generation.request
    if not request.routes or not generation._routes:
        return None
    if len(generation._routes) > 1:
        generation._routes = [np.concatenate(generation._routes)]
    whole = generation._routes[0]
    return [whole[i : i + TILE] for i in range(0, len(whole), TILE)]


def _batch(work: Sequence[Work], states: Sequence[int]) -> Batch:
    lengths = [len(w.tokens) for w in work]
    pages = np.zeros((len(work), max(len(w.request.table.pages) for w in work)), np.int32)
    for row, part in zip(pages, work, strict=True):
        row[: len(part.request.table.pages)] = part.request.table.pages
    starts = np.cumsum([0, *lengths])
    rows = [
        np.arange(start + w.first_row, start + n)
        for w, start, n in zip(work, starts, lengths, strict=False)
    ]
    return Batch(
        tokens=np.concatenate([np.array(w.tokens, np.int32) for w in work]),
        positions=np.concatenate(
            [np.arange(w.start, w.start + len(w.tokens), dtype=np.int32) for w in work]
        ),
        sequence=np.repeat(np.arange(len(work), dtype=np.int32), lengths),
        pages=pages,
        logit_rows=np.concatenate(rows).astype(np.int32),
        states=np.array(states, np.int32) if min(states) >= 0 else None,
    )
