"""Passes over small batches of any composition, as graphs for some numbers of tokens."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32, Batch
from isobit.backends.cuda.fusions.step_attention import most_spans
from isobit.backends.cuda.graph import Program
from isobit.backends.cuda.ops.attention import MMA_ROWS
from isobit.backends.cuda.steps.captured import padded
from isobit.backends.cuda.steps.graph_cache import Captures
from isobit.backends.cuda.steps.passes import LOGIT_ROWS_AT_ONCE, Passes, Take, run
from isobit.backends.cuda.workspace import Pass, TracePoint
from isobit.model.graph import Key

_FEW = 256  # tokens
_MOST_ATTENDED = 1 << 18
"""Positions, by the tokens of prompts: at the width of Qwen3-30B-A3B 9 ms of an H200's, instead of
3."""


_MOST_TOGETHER = 1 << 20
"""The same where a run's tokens are attended to together."""


class MixedPasses(Passes):
    """Steps beside tokens of prompts, whose logits may be wanted or not.

    Of each size there is a graph up to the logits, and one of so many rows of logits, each made
    when it is first asked for. The last token of a batch, and the last row that is wanted, are
    repeated up to the size: it chooses the same experts, and writes the same keys and values again.
    """

    def __init__(self, program: Program, sizes: Sequence[int]) -> None:
        super().__init__(program, sizes[-1])
        self.sizes = sizes
        most = min(sizes[-1], LOGIT_ROWS_AT_ONCE)
        self.heads = sorted({size for size in sizes if size < most} | {most})
        """Rows of logits that there are graphs for."""
        gpu, of = self._g.gpu, self._program
        self.bodies = Captures(gpu, lambda n: partial(run, of.body, self._pass(n)), sizes)
        self.rows = Captures(gpu, lambda n: partial(run, of.head, self._of_rows(n)), self.heads)
        self.stages = frozenset(program.marks)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch is not too large, and not one of prompts to which launches one by one do
        better: of many tokens, without steps; or that attend to much, which here is done token by
        token."""
        if not super().takes(batch):
            return False
        runs = np.diff(np.flatnonzero(np.diff(batch.sequence, prepend=-1, append=-1)))
        attended = batch.positions[np.repeat(runs >= MMA_ROWS, runs)].sum()
        most = _MOST_TOGETHER if self._g.spans else _MOST_ATTENDED
        few = len(batch.tokens) <= _FEW or runs.min() == 1
        return few and bool(attended <= most)

    def put(self, batch: Batch, states: I32) -> None:
        """Bring a batch to the device, its last token repeated up to the size."""
        n = len(batch.tokens)
        size = padded(n, self.sizes)
        which = np.minimum(np.arange(size), n - 1)
        tokens, positions, sequence = (
            a[which] for a in (batch.tokens, batch.positions, batch.sequence)
        )
        whole = replace(batch, tokens=tokens, positions=positions, sequence=sequence)
        self._count = n
        self._ready = self._set(whole, states, 0, size, batch.logit_rows[:0])

    def fill(self, source: int, places: I32) -> None:
        """Take tokens that were not known at :meth:`put`: see :class:`Filled`."""
        size = padded(len(places), self.sizes)
        self._filled(source, places, size, self._each["tokens"].address)

    def queue(self) -> None:
        """Run the batch that is on the device, up to its rows of logits."""
        self._g.gpu.replay(self.bodies[self._ready.tokens])

    def traced(
        self, batch: Batch, states: I32, take: Take, keys: Set[Key]
    ) -> Iterator[tuple[TracePoint, Pass]]:
        """The same launches, queued one by one, for these stages."""
        self.put(batch, states)
        n = len(batch.tokens)
        p = self._pass(padded(n, self.sizes))
        for mark in self._program.body(p):
            if mark.value.key in keys:
                yield mark, replace(p, tokens=n)
        self.give(batch, take)

    def give(self, batch: Batch, take: Take) -> None:
        """Have the rows taken of a batch that is queued, some at a time."""
        wanted = batch.logit_rows
        gpu, most, every = self._g.gpu, self.heads[-1], np.arange(len(wanted))
        for first in range(0, len(wanted), most):
            now = every[first : first + most]
            rows = padded(len(now), self.heads)
            at = wanted[now][np.minimum(np.arange(rows), len(now) - 1)]
            gpu.upload(self._each["rows"].address, at.astype(np.int32))
            gpu.replay(self.rows[rows])
            take(now, self._program.logits.address)

    def _set_spans(
        self, length: int, starts: NDArray[np.integer], ends: NDArray[np.integer]
    ) -> int:
        """Tell of the runs that attention takes together: as many as there is room for."""
        ends = np.minimum(ends, self._count)  # what is repeated is in none
        size = padded(self._count, self.sizes)
        spans, inside = np.zeros((2, size), np.int32), np.zeros(size, np.int32)
        used, room = 0, most_spans(size)
        for start, end in zip(starts, ends, strict=True):
            first = np.arange(start, end, length)
            if end - start < MMA_ROWS or used + len(first) > room:
                continue
            spans[0, used : used + len(first)] = first
            spans[1, used : used + len(first)] = np.minimum(end - first, length)
            inside[start:end] = 1
            used += len(first)
        for slot, values in zip(
            (*self._g.spans[length], self._g.in_runs), (*spans, inside), strict=True
        ):
            self._g.gpu.upload(slot.address, values)
        return used

    def _pass(self, size: int) -> Pass:
        return Pass(size, 1, self._inputs())

    def _of_rows(self, rows: int) -> Pass:
        return replace(self._pass(rows), count=rows)
