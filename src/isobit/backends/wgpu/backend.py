"""The wgpu backend: a model's weights on a device, batches in, logits and traced stages out."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import (
    F32,
    I32,
    ROUTES,
    Backend,
    Batch,
    Limits,
    Memory,
    Results,
    Routes,
    Tap,
    Wanted,
)
from isobit.backends.base.kv_pages import Headroom, fit_kv_cache
from isobit.backends.base.rope_rows import RopeRows
from isobit.backends.base.row_results import MAX_WORDS, RowRequest, RowResults
from isobit.backends.wgpu.commands import Commands
from isobit.backends.wgpu.device import driver
from isobit.backends.wgpu.device.gpu import (
    Copy,
    Device,
    OutOfDeviceMemory,
    Step,
    open_device,
)
from isobit.backends.wgpu.device.memory import Plan, headroom
from isobit.backends.wgpu.graph import LoweredGraph
from isobit.backends.wgpu.lowering import STATES, Pass
from isobit.backends.wgpu.sampler import DeviceSampler, read_bandwidth
from isobit.config import EngineConfig
from isobit.model.weights import Weights
from isobit.numerics import KV_PAGE, Weight
from isobit.numerics.ops import LOGIT_ROWS, TOKENS

Trace = Callable[[str, int | None, NDArray[np.generic]], None]
Take = Callable[[NDArray[np.intp], I32], None]
"""Takes numbers of rows of the batch's that something is wanted of, and their words."""


class WgpuBackend(Backend):
    """Runs a batch of any composition; every stage can be traced."""

    name = "wgpu"
    copies_states = True
    reads_file = True  # rows of the embedding
    on_device = frozenset({ROUTES})

    def __init__(
        self, weights: Weights, engine: EngineConfig, device: Device | None = None
    ) -> None:
        """Refuse a driver that is not exact and a model that exceeds a limit; load the weights.

        Raises BackendUnavailable with the reason. ``device`` is for tests: an open one, tested.
        """
        self._owned = device is None
        self._device = open_device() if device is None else device
        self._commands = Commands(self._device, self._steps, self._copies)
        try:
            self._graph = LoweredGraph(weights.graph, engine.planes)
            self._g = g = self._graph.g
            super().__init__(weights, engine, lambda now: headroom(g, weights, now, self._device))
            if device is None:
                self.inexact = driver.require_exact(
                    self._device, allow_inexact=engine.allow_inexact
                )
            self._plan_for(weights)
            with self._device.guarded():
                self._plan.load(g, self._device)
                rows = self._plan.rows[LOGIT_ROWS]
                vocabulary = weights.graph.logits.shape.width
                self._sampler = DeviceSampler(self._device, rows, vocabulary)
                most = max(self._plan.bytes(self._graph.logits), 4 * MAX_WORDS * rows)
                hidden = weights.graph.hidden
                self._width = hidden.shape.width if hidden else 0
                most += 4 * rows * self._width + self._plan.bytes(self._graph.routes)
                self._staging = self._device.staging(most)
                self._load_caches(weights, engine)
        except BaseException:
            self.close()
            raise
        self._logits, self._vocab = weights.graph.logits.name, weights.graph.logits.shape.width
        self._rope = [RopeRows(table) for table in g.rope_tables]
        self._states = [(slot.buffer, 4 * slot.words) for slot in g.slots if slot.rows == STATES]
        self._between: Any = None
        """A buffer that a state is copied by: none may be both source and target."""

    def _plan_for(self, weights: Weights) -> None:
        """Fit the buffers to the settings."""
        limits = Limits.of(weights, self.engine, keeps=True)
        self._plan = Plan.of(self._g, self.engine, limits, self._device.binding_bytes)
        self.limits = limits._replace(states=self._plan.rows[STATES])

    def _load_caches(self, weights: Weights, asked: EngineConfig) -> None:
        """Take memory for the KV cache: half as much, and half of that, where there is less than
        anyone said, and ``settled`` says so.

        Raises BackendUnavailable if what the caller named does not fit.
        """
        while True:
            try:
                self._plan.load_caches(self._g, self._device)
                return
            except OutOfDeviceMemory:
                page = sum(c.kv_heads * c.page_bytes for c in set(self._g.caches.values()))
                less = Headroom(self._plan.pages // 2 * page, page)
                sequences = self.engine.max_sequences
                asked = replace(asked, max_sequences=sequences, most_sequences=None)
                self.engine, self.settled = fit_kv_cache(weights, asked, lambda _: less)  # noqa: B023
                self._plan_for(weights)

    def memory(self) -> Memory | None:
        """See :class:`isobit.backends.base.Backend`."""
        return self._device.memory()

    def read_bandwidth(self) -> float | None:
        """See :class:`isobit.backends.base.Backend`."""
        return read_bandwidth(self._device)

    @property
    def device(self) -> str:
        """The device in words; says so if it is not exact."""
        inexact = f", INEXACT: {', '.join(self.inexact)}" if self.inexact else ""
        return self._device.name + inexact

    def close(self) -> None:
        """Free the device's memory."""
        self._commands.close()
        if self._owned:
            self._device.close()
        else:
            self._device.forget()

    def copy_state(self, source: int, target: int) -> None:
        """See :class:`isobit.backends.base.Backend`."""
        with self._device.guarded():
            if self._between is None:
                self._between = self._device.empty(sum(size for _, size in self._states))
            out, back, at = [], [], 0
            for buffer, size in self._states:
                out.append((buffer, source * size, self._between, at, size))
                back.append((self._between, at, buffer, target * size, size))
                at += size
            self._device.submit(self._device.encode([], *out, *back))

    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """See :class:`isobit.backends.base.Backend`."""
        return self._logits_of(batch, tap, stages, None, None)

    def _logits_of(
        self,
        batch: Batch,
        tap: Tap | None,
        stages: frozenset[str] | None,
        hidden: F32 | None,
        routes: Routes | None,
    ) -> F32:
        logits = np.empty((len(batch.logit_rows), self._vocab), np.float32)
        traced: dict[tuple[str, int | None], list[NDArray[np.generic]]] = {}

        def collect(stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
            traced.setdefault((stage, layer), []).append(value)

        def take(rows: NDArray[np.intp], words: I32) -> None:
            logits[rows] = words.view(np.float32)

        with self._device.guarded():
            for first in range(0, len(batch.tokens), self._plan.rows[TOKENS]):
                trace = tap and collect
                self._pass(batch, first, take, hidden, routes, trace=trace, stages=stages)
        if tap is not None:
            for (stage, layer), parts in traced.items():
                tap(stage, layer, parts[0] if len(parts) == 1 else np.concatenate(parts))
            if self._logits and (stages is None or self._logits in stages):
                tap(self._logits, None, logits)
        return logits

    def compute(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        """What is wanted, made on the device if that is little and no logits."""
        asked, hidden, routes = RowRequest.of(wanted, self._vocab), None, None
        if wanted.hidden:
            hidden = np.empty((len(batch.logit_rows), self._width), np.float32)
        if wanted.routes:
            none = self.no_routes
            routes = np.empty((len(batch.tokens), *none.shape[1:]), none.dtype)
        if tap is not None or asked is None:
            logits = self._logits_of(batch, tap, stages, hidden, routes)
            return replace(self._measured(logits, wanted, hidden), routes=routes)
        found = RowResults.empty(len(batch.logit_rows), asked)

        def take(rows: NDArray[np.intp], words: I32) -> None:
            found.take(rows, words, asked)

        of_logits = None if wanted.only_hidden else take
        with self._device.guarded():
            for first in range(0, len(batch.tokens), self._plan.rows[TOKENS]):
                self._pass(batch, first, of_logits, hidden, routes, asked, wanted.given)
        if wanted.only_hidden:
            return replace(self._measured(None, wanted, hidden), routes=routes)
        return replace(found.results(wanted), hidden=hidden, routes=routes)

    def _pass(
        self,
        batch: Batch,
        first: int,
        take: Take | None,
        hidden: F32 | None,
        routes: Routes | None,
        asked: RowRequest | None = None,
        given: I32 | None = None,
        trace: Trace | None = None,
        stages: frozenset[str] | None = None,
    ) -> None:
        """Run as many tokens from ``first`` on as the buffers hold.

        ``take`` gets what is asked of rows, some after the other, of ``given`` ids; their logits if
        that is None. Rows that they are made of, and ``routes`` of the batch's tokens, are put
        there; ``trace`` gets ``stages``.
        """
        last = min(first + self._plan.rows[TOKENS], len(batch.tokens))
        wanted = np.flatnonzero((batch.logit_rows >= first) & (batch.logit_rows < last))
        positions = batch.positions[first:last]
        tiles = int(positions.max()) // KV_PAGE + 1
        if last - first == 1:
            # Up to a power of two, so that a recording lasts; what is too many ends at once.
            tiles = min(1 << (tiles - 1).bit_length(), -(-self.limits.positions // KV_PAGE))
        runs = self._runs(batch, first, last)
        p = Pass(
            last - first,
            len(wanted),
            tiles,
            len(runs),
            routes=routes is not None,
            hidden=hidden is not None,
            head=take is not None,
        )
        self._upload(
            p,
            batch.tokens[first:last],
            positions,
            batch.sequence[first:last],
            batch.pages,
            batch.logit_rows[wanted] - first,
            runs,
        )
        for slot in self._g.received:
            assert batch.received is not None
            self._device.write(slot.buffer, batch.received[first:last])
        if trace is not None:
            self._run_traced(p, trace, stages)
        at_once = self._plan.rows[LOGIT_ROWS]
        for row in range(0, max(len(wanted), 1), at_once):
            count = min(at_once, len(wanted) - row)
            now, rows_now = replace(p, first=row, count=count), wanted[row : row + count]
            if row:
                now = replace(now, routes=False)
            if given is not None:
                self._sampler.give(np.ascontiguousarray(given[rows_now]))
            self._device.submit(self._commands.of(now, asked, traced=trace is not None))
            parts = [n for *_, n in self._copies(now, asked)]
            with (
                self._device.fetching(self._staging, sum(parts)) if any(parts) else nullcontext()
            ) as data:
                if row == 0 and p.tokens == 1 and trace is None:
                    # While the device works: the next token's pass is most likely the same.
                    self._commands.encode_ahead(now, asked)
                if data is None:
                    continue
                words = np.split(data().view(np.int32), np.cumsum(parts[:-1]) // 4)
                if count and take is not None:
                    take(rows_now, words[0].reshape(count, -1))
                if count and hidden is not None:
                    hidden[rows_now] = words[1].view(np.float32).reshape(count, -1)
                if now.routes and routes is not None:
                    layers, used = routes.shape[1:]
                    found = words[2].reshape(layers, p.tokens, used)
                    routes[first:last] = found.swapaxes(0, 1)

    def _copies(self, p: Pass, asked: RowRequest | None) -> list[Copy]:
        """What comes to the host: of rows what is asked, or logits; what they are made of; the
        experts."""
        rows = self._graph.logits.buffer if asked is None else self._sampler.found
        words = self._vocab if asked is None else asked.words
        state, routes = self._graph.hidden, self._graph.routes
        parts = [
            (rows, 0, p.count * words * p.head),
            (state.slot.buffer, state.first, p.count * self._width * p.hidden)
            if state
            else (rows, 0, 0),
            (routes.buffer, 0, p.tokens * routes.words * p.routes),
        ]
        found, at = [], 0
        for source, first, count in parts:
            found.append((source, 4 * first, self._staging, at, 4 * count))
            at += 4 * count
        return found

    def _runs(self, batch: Batch, first: int, last: int) -> I32:
        """First token, last token + 1 and state of each sequence in a pass: int32 [n, 3]."""
        if not self._g.recurrent:
            return np.empty((0, 3), np.int32)
        sequence = batch.sequence[first:last]
        starts = np.flatnonzero(np.diff(sequence, prepend=-1))
        states = sequence if batch.states is None else batch.states[sequence]
        ends = np.append(starts[1:], len(sequence))
        return np.stack([starts, ends, states[starts]], axis=1).astype(np.int32)

    def _steps(self, p: Pass, asked: RowRequest | None, body: bool) -> list[Step]:
        """Of the pass, if ``body``, of some logits, and of what is asked of them."""
        steps: list[Step] = []
        if body:
            steps += [s for s in self._graph.steps(p, traced=False) if isinstance(s, Step)]
        if p.count:
            steps += self._graph.head(p)
            if asked is not None and p.head:
                steps += self._sampler.steps(self._graph.logits.buffer, p.count, asked)
        return steps

    def _run_traced(self, p: Pass, trace: Trace, stages: frozenset[str] | None) -> None:
        steps: list[Step] = []
        for s in self._graph.steps(p, traced=True):
            if isinstance(s, Step):
                steps.append(s)
            elif stages is None or s.stage in stages:
                if steps:
                    self._device.run(steps)
                    steps = []
                trace(s.stage, s.value.layer, s.read(self._device, p))
        if steps:
            self._device.run(steps)

    def _upload(
        self,
        p: Pass,
        tokens: I32,
        positions: I32,
        sequence: I32,
        pages: I32,
        rows: I32,
        runs: I32,
    ) -> None:
        """Put a pass's inputs where lowering.BatchAt says they are."""
        page = pages[sequence, positions // KV_PAGE]
        table = np.zeros((len(pages), p.tiles), np.int32)
        table[:, : pages.shape[1]] = pages[:, : p.tiles]
        parts = (
            positions,
            page * KV_PAGE + positions % KV_PAGE,
            sequence * p.tiles,
            rows,
            runs,
            *(_rows_of(rope, positions).view(np.int32) for rope in self._rope),
            table,
        )
        words = np.concatenate([x.reshape(-1) for x in parts]).astype(np.int32, copy=False)
        if words.nbytes > self._g.batch.buffer.size:
            self._g.batch.buffer = self._device.empty(2 * words.nbytes)
            self._commands.retire()
        self._device.write(self._g.batch.buffer, words)
        for w, slot in self._g.embeddings:
            data = w.data.reshape(w.shape[0], w.row_bytes)[tokens].reshape(-1)
            x = Weight(w.name, w.format, (len(tokens), w.shape[1]), data).float32()
            self._device.write(slot.buffer, x)


def _rows_of(rope: RopeRows, positions: I32) -> F32:
    """Float32 [T, size]: cosines, then sines."""
    return np.concatenate([part[positions] for part in rope.upto(int(positions.max()))], axis=1)
