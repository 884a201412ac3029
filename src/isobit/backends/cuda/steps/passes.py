"""Passes over any batch: cut to what the buffers hold, its inputs put on the device, launched."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32, Batch
from isobit.backends.cuda.graph import Program
from isobit.backends.cuda.ops.attention import MMA_ROWS
from isobit.backends.cuda.steps.captured import Filled
from isobit.backends.cuda.steps.graph_cache import GraphCache
from isobit.backends.cuda.workspace import Inputs, Pass, TracePoint
from isobit.numerics import KV_PAGE

LOGIT_ROWS_AT_ONCE = 64

Take = Callable[[NDArray[np.intp], int], None]
"""Takes numbers of rows that something is wanted of, and where on the device the logits of these
lie, one row after the other."""


class Passes:
    """Runs batches of any composition."""

    def __init__(self, program: Program, tokens: int) -> None:
        """tokens: the most of one pass."""
        self._program, self._g = program, (g := program.g)
        self._most, self._entries = tokens, g.tiles
        self._graphs = GraphCache(g.gpu)
        names = "tokens", "positions", "table", "rows"
        self._each = {name: g.fixed(name, tokens) for name in names}
        self._chunks = g.fixed("chunks", 4 * tokens)
        self._pages = g.fixed("pages", self._entries)
        self._filled = Filled(g, tokens)

    def settle(self, pages: int) -> None:
        """So many pages has the cache: page tables of one pass may have as many entries."""
        self._entries = self._pages.words = max(pages, self._g.tiles)

    def run(
        self,
        batch: Batch,
        states: I32,
        take: Take | None,
        hidden: Take | None = None,
        *,
        stops: bool = True,
    ) -> Iterator[tuple[TracePoint, Pass]]:
        """Run a batch, some rows of logits at a time; ``stops`` where a stage can be
        read.

        ``hidden`` takes the rows that logits are made of; without ``take``, none are made.
        """
        first = 0
        while first < len(batch.tokens):
            last = self._last(batch, first)
            wanted = np.flatnonzero((batch.logit_rows >= first) & (batch.logit_rows < last))
            p = self._set(batch, states, first, last, batch.logit_rows[wanted] - first)
            if stops:
                for mark in self._program.body(p):
                    yield mark, p
            else:
                self._queue(self._program.body, p)
            self._give(p, wanted, take, hidden)
            first = last

    def rehearse(self) -> None:
        """Queue one pass of each kind, of no batch; those of sizes that are close are alike."""
        for n in (*_close_sizes(self._most), self._most):
            for many in (0, 1):
                spans = {length: many * -(-n // length) for length in self._g.spans}
                p = Pass(n, 1, self._inputs(), spans=spans)
                run(self._program.body, p)
            if n <= LOGIT_ROWS_AT_ONCE:
                run(self._program.head, replace(p, count=n))

    def capture(self) -> None:
        """Have the graph of a whole chunk of one prompt, which comes twice by this."""
        n, spans = self._most, {length: -(-self._most // length) for length in self._g.spans}
        p = Pass(n, 1, self._inputs(), spans=spans if n >= MMA_ROWS else dict.fromkeys(spans, 0))
        for _ in range(2):
            self._queue(self._program.body, p)
            self._queue(self._program.head, replace(p, count=1))

    def capture_no_more(self) -> None:
        """Where there are graphs for small batches of any composition, what is left are prompts of
        many tokens: to queue these launch by launch takes the host less time than the device has
        work with them."""
        self._graphs.closed = True

    def takes(self, batch: Batch) -> bool:
        """Whether a batch runs in one pass."""
        return self._last(batch, 0) == len(batch.tokens)

    def put(self, batch: Batch, states: I32) -> None:
        """Bring a batch to the device."""
        self._ready = self._set(batch, states, 0, len(batch.tokens), batch.logit_rows)

    def fill(self, source: int, places: I32) -> None:
        """Take tokens that were not known at :meth:`put`: see :class:`Filled`."""
        self._filled(source, places, len(places), self._each["tokens"].address)

    def queue(self) -> None:
        """Run the batch that is on the device, up to its rows of logits."""
        self._queue(self._program.body, self._ready)

    def give(self, batch: Batch, take: Take) -> None:
        """Have the rows taken of a batch that is queued, some at a time."""
        self._give(self._ready, np.arange(len(batch.logit_rows)), take)

    def _give(
        self, p: Pass, wanted: NDArray[np.intp], take: Take | None, hidden: Take | None = None
    ) -> None:
        """Have rows taken of a pass that is queued."""
        head = self._program.head if take else self._program.state
        for row in range(0, len(wanted), LOGIT_ROWS_AT_ONCE):
            now = wanted[row : row + LOGIT_ROWS_AT_ONCE]
            self._queue(head, replace(p, first=row, count=len(now)))
            if take is not None:
                take(now, self._program.logits.address)
            if hidden is not None:
                assert self._program.hidden is not None
                hidden(now, self._program.hidden.address)

    def _queue(self, what: Callable[[Pass], Iterator[TracePoint]], p: Pass) -> None:
        """Queue a part of a pass; all that its launches depend on is in ``p``."""
        key = what.__name__, p.tokens, p.sequences, p.first, p.count, tuple(p.spans.items())
        self._graphs(key, partial(run, what, p))

    def _last(self, batch: Batch, first: int) -> int:
        """Where the tokens end that run together."""
        sequence, positions = batch.sequence[first:], batch.positions[first:]
        lasts = np.flatnonzero(np.diff(sequence, append=-1))
        if len(sequence) <= self._most and (positions[lasts] // KV_PAGE + 1).sum() <= self._entries:
            return len(batch.tokens)
        end, entries = first, 0
        while end < min(first + self._most, len(batch.tokens)):
            s = batch.sequence[end]
            upto = end + int(np.searchsorted(batch.sequence[end:] != s, True))
            upto = min(upto, first + self._most)
            entries += int(batch.positions[upto - 1]) // KV_PAGE + 1
            if entries > self._entries and end > first:
                break
            end = upto
        return end

    def _set(self, batch: Batch, states: I32, first: int, last: int, rows: I32) -> Pass:
        gpu, sequence = self._g.gpu, batch.sequence[first:last]
        positions = batch.positions[first:last]
        starts = np.flatnonzero(np.diff(sequence, prepend=-1))
        ends = np.append(starts[1:], len(sequence))
        used = positions[ends - 1] // KV_PAGE + 1
        tables = batch.pages[sequence[starts]][np.arange(batch.pages.shape[1]) < used[:, None]]
        begins = np.cumsum(used) - used
        chunks = np.zeros((len(starts), 4), np.int32)
        chunks[:, 0], chunks[:, 1], chunks[:, 2] = starts, ends - starts, states[sequence[starts]]
        for slot, values in (
            (self._each["tokens"], batch.tokens[first:last]),
            (self._each["positions"], positions),
            (self._each["table"], np.repeat(begins, ends - starts)),
            (self._each["rows"], rows),
            (self._pages, tables),
            (self._chunks, chunks),
        ):
            if values.size:
                gpu.upload(slot.address, values.astype(np.int32, copy=False))
        for slot in self._g.received:
            assert batch.received is not None
            gpu.upload(slot.address, batch.received[first:last])
        spans = {n: self._set_spans(n, starts, ends) for n in self._g.spans}
        return Pass(last - first, len(starts), self._inputs(), spans=spans)

    def _inputs(self) -> Inputs:
        each = {name: slot.address for name, slot in self._each.items()}
        return Inputs(
            tokens=each["tokens"],
            positions=each["positions"],
            sequence=each["table"],
            pages=self._pages.address,
            each=1,  # so that a table begins at any entry
            rows=each["rows"],
            chunks=self._chunks.address,
        )

    def _set_spans(
        self, length: int, starts: NDArray[np.integer], ends: NDArray[np.integer]
    ) -> int:
        """Cut the tokens into spans for attention of many; how many, 0 if that does not pay."""
        if int((ends - starts).max()) < MMA_ROWS:
            return 0
        first = np.concatenate([np.arange(s, e, length) for s, e in zip(starts, ends, strict=True)])
        limit = np.repeat(ends, -(-(ends - starts) // length))
        counts = np.minimum(limit - first, length)
        for slot, values in zip(self._g.spans[length], (first, counts), strict=True):
            self._g.gpu.upload(slot.address, values.astype(np.int32))
        return len(first)


def run(queue: Callable[[Pass], Iterator[TracePoint]], p: Pass) -> None:
    """Queue all of it."""
    for _ in queue(p):
        pass


def _close_sizes(most: int) -> Iterator[int]:
    """Numbers of tokens, each less than half as many again as the one before."""
    n = 1
    while n < most:
        yield n
        n += max(1, (1 << n.bit_length()) // 4)
