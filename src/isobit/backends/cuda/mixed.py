"""Passes over small batches of any composition, as graphs for some numbers of tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from isobit.backends.base import I32, Batch
from isobit.backends.cuda.graph import Program
from isobit.backends.cuda.ops.matmul import COLUMNS
from isobit.backends.cuda.passes import LOGIT_ROWS_AT_ONCE, Passes, Take
from isobit.backends.cuda.slots import Mark, Pass
from isobit.backends.cuda.steps import padded

_WORDS_OF_GROUP = 4


class MixedPasses(Passes):
    """Steps beside tokens of prompts, whose logits may be wanted or not.

    Of each size there is a graph up to the logits, and one of so many rows of logits. The last
    token of a batch, and the last row that is wanted, are repeated up to the size: it chooses the
    same experts, and writes the same keys and values again.
    """

    def __init__(self, program: Program, sizes: Sequence[int], entries: int) -> None:
        super().__init__(program, sizes[-1], entries)
        self.sizes = sizes
        most = min(sizes[-1], LOGIT_ROWS_AT_ONCE)
        self.heads = sorted({size for size in sizes if size < most} | {most})
        """Rows of logits that there are graphs for."""
        words = _WORDS_OF_GROUP * (1 + -(-sizes[-1] // COLUMNS))
        self._groups = {n: self._g.fixed("groups", words) for n in {*sizes, most}}
        self._bodies: dict[int, object] = {}
        self._rows: dict[int, object] = {}

    def start(self) -> None:
        """Capture the graphs, once memory is there."""
        gpu = self._g.gpu
        for size, slot in self._groups.items():  # their number, then the groups
            first = np.arange(0, size, COLUMNS, dtype=np.int32)
            groups = np.zeros((1 + len(first), 4), np.int32)
            groups[0, 0] = len(first)
            groups[1:, 1], groups[1:, 2] = first, np.minimum(COLUMNS, size - first)
            gpu.upload(slot.address, groups)
        for size in self.sizes:
            queue = partial(_run, self._program.body, self._pass(size))
            self._bodies[size] = gpu.capture(queue)
        for rows in self.heads:
            queue = partial(_run, self._program.head, replace(self._pass(rows), count=rows))
            self._rows[rows] = gpu.capture(queue)

    def takes(self, batch: Batch) -> bool:
        """Whether a batch is not too large."""
        return self._last(batch, 0) == len(batch.tokens)

    def replay(self, batch: Batch, states: I32, take: Take) -> None:
        """Run a batch, some rows of logits at a time."""
        gpu, n = self._g.gpu, len(batch.tokens)
        size = padded(n, self.sizes)
        which = np.minimum(np.arange(size), n - 1)
        tokens, positions, sequence = (
            a[which] for a in (batch.tokens, batch.positions, batch.sequence)
        )
        whole = replace(batch, tokens=tokens, positions=positions, sequence=sequence)
        self._set(whole, states, 0, size, batch.logit_rows[:0])
        gpu.replay(self._bodies[size])
        every = np.arange(len(batch.logit_rows))
        for first in range(0, len(every), self.heads[-1]):
            now = every[first : first + self.heads[-1]]
            wanted = batch.logit_rows[now]
            rows = padded(len(wanted), self.heads)
            at = wanted[np.minimum(np.arange(rows), len(wanted) - 1)]
            gpu.upload(self._each["rows"].address, at.astype(np.int32))
            gpu.replay(self._rows[rows])
            take(now, self._program.logits.address)

    def _pass(self, size: int) -> Pass:
        groups = self._groups[size].address
        inputs = replace(self._inputs(), groups=(groups, groups + 4 * _WORDS_OF_GROUP))
        return Pass(size, 1, inputs)


def _run(queue: Callable[[Pass], Iterator[Mark]], p: Pass) -> None:
    for _ in queue(p):
        pass
