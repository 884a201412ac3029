"""Steps of decoding: one token of each sequence, queued as CUDA graphs that set up the next step.

What a step works on stays put in memory, so that one graph serves all steps of its kind.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32, I32
from isobit.backends.cuda.device.gpu import Gpu
from isobit.backends.cuda.fusions import step_attention
from isobit.backends.cuda.graph import Program
from isobit.backends.cuda.lowering import Lowering
from isobit.backends.cuda.ops.groups import WORDS_OF_GROUP, groups_of, most_words
from isobit.backends.cuda.slots import Inputs, Mark, Pass
from isobit.model.graph import Key
from isobit.numerics import TILE


class OneSequence:
    """Steps of one sequence."""

    most = 1

    def __init__(self, program: Program) -> None:
        self._program, self._g = program, (g := program.g)
        self._step = g.fixed("step", 5)  # Step of step.cuh
        self._pages = g.fixed("pages", g.tiles)
        self._generated = g.fixed("generated", g.resident.context + 1)
        self._zero = g.fixed("zero", 1, zero=True)
        self._run = g.fixed("run", 4, zero=True)
        self._groups = g.fixed("groups", 2 * WORDS_OF_GROUP)
        self._number = 1  # of the next step
        self._graphs: dict[bool, object] = {}
        self.stages = frozenset(program.marks)

    def start(self) -> None:
        """Fill what never changes, once memory is there."""
        group = np.array([1, 0, 0, 0, 0, 0, 1, 0], np.int32)
        self._g.gpu.upload(self._groups.address, group)

    def logits(self, tokens: I32, positions: I32, pages: I32, states: I32, _: I32) -> F32:
        """Append one token; its logits [1, vocabulary]."""
        self._set(tokens, positions, pages, states)
        self._replay(int(positions[0]))
        return self._download()

    def traced(
        self,
        tokens: I32,
        positions: I32,
        pages: I32,
        states: I32,
        of: I32,
        logits: F32,
        keys: Set[Key],
    ) -> Iterator[tuple[Mark, Pass]]:
        """A step for these stages, which writes logits: stops where one of them can be read.

        What lasts is read at the end; else the same launches are queued one by one.
        """
        if lasting := self._program.lasting(keys):
            logits[:] = self.logits(tokens, positions, pages, states, of)
            p = self._pass(many=True)
            yield from _read_at_the_end(self._g, lasting, p)
            return
        self._set(tokens, positions, pages, states)
        self._count()
        p = self._pass(many=int(positions[0]) >= step_attention.FEW_TILES * TILE)
        for mark in chain(self._program.body(p), self._program.head(p)):
            if mark.value.key in keys:
                yield mark, p
        self._g.gpu.download(self._program.logits.address, logits)

    def greedy(self, tokens: I32, positions: I32, pages: I32, states: I32, count: int) -> I32:
        """Append a token, then the likeliest next, ``count`` in all, without waiting in between.

        Returns the likeliest token after each, int32 [count, 1]; -1 from where logits are not
        finite.
        """
        self._set(tokens, positions, pages, states)
        first = int(positions[0])
        for i in range(count):
            self._replay(first + i)
        out = np.empty((count, 1), np.int32)
        self._g.gpu.download(self._generated.address + 4 * first, out)
        return out

    def _pass(self, *, many: bool) -> Pass:
        step, groups = self._step.address, self._groups.address
        inputs = Inputs(
            tokens=step,
            positions=step + 4,
            sequence=self._zero.address,
            pages=self._pages.address,
            each=self._g.tiles,
            rows=self._zero.address,
            runs=self._run.address,
            groups=(groups, groups + 4 * WORDS_OF_GROUP),
            generated=self._generated.address,
            number=step + 16,
        )
        return Pass(1, 1, inputs, count=1, many=many)

    def _queue(self, p: Pass) -> None:
        self._program.queue(p)
        if not self._g.advances:
            step = self._step.address
            self._g.launch(
                "next_token",
                (1,),
                (self._program.logits.address, self._program.vocabulary, self._zero.address)
                + (step, step + 4, self._generated.address, step + 8, step + 16),
            )

    def _set(self, tokens: I32, positions: I32, pages: I32, states: I32) -> None:
        gpu = self._g.gpu
        step = np.array([tokens[0], positions[0], 0, 0, self._number], np.int32)
        gpu.upload(self._step.address, step)
        gpu.upload(self._pages.address, pages[0, : self._g.tiles])
        if self._g.resident.states:
            gpu.upload(self._run.address, np.array([0, 1, states[0], 0], np.int32))

    def _replay(self, position: int) -> None:
        self._count()
        self._g.gpu.replay(self._graph(many=position >= step_attention.FEW_TILES * TILE))

    def _graph(self, *, many: bool) -> object:
        """A step with few tiles of keys, or with many; captured when it is first asked for."""
        if many not in self._graphs:
            self._graphs[many] = self._g.gpu.capture(partial(self._queue, self._pass(many=many)))
        return self._graphs[many]

    def _count(self) -> None:
        self._number = self._number % (1 << 30) + 1

    def _download(self) -> F32:
        out = self._g.gpu.results(self._program.vocabulary)
        self._g.gpu.download(self._program.logits.address, out)
        return out[None]


class _Copy:
    """A copy of device memory, made at once."""

    def __init__(self, gpu: Gpu, address: int, nbytes: int) -> None:
        self._address, self._bytes = address, np.empty(nbytes, np.uint8)
        gpu.download(address, self._bytes)

    def download(self, address: int, out: NDArray[np.generic]) -> None:
        """See :class:`isobit.backends.cuda.lowering.Source`."""
        at = address - self._address
        out.view(np.uint8)[:] = self._bytes[at : at + out.nbytes]


def _read_at_the_end(g: Lowering, marks: Sequence[Mark], p: Pass) -> Iterator[tuple[Mark, Pass]]:
    """Stages that last, brought to the host together."""
    copy = _Copy(g.gpu, *g.lasting)
    for mark in marks:
        value = mark.read(copy, p)
        yield replace(mark, read=lambda *_, value=value: value), p


def padded(n: int, sizes: Sequence[int]) -> int:
    """The size of the graph that takes so many; n itself, if there are none."""
    return next((size for size in sizes if size >= n), n)


class ManySequences:
    """Steps of several sequences together: a graph for each number of them, or for each of
    ``sizes``, made when it is first asked for.

    The last token of a step is repeated up to the next size: it chooses the same experts, and
    writes the same again.
    """

    def __init__(self, program: Program, most: int, sizes: Sequence[int] = ()) -> None:
        self._program, self._g, self.most = program, (g := program.g), most
        self.sizes = sizes
        names = "tokens", "positions", "first", "sequence"
        self._each = {name: g.fixed(name, most) for name in names}
        self._pages = g.fixed("pages", most * g.tiles)
        self._generated = g.fixed("generated", most * (g.resident.context + 1))
        self._not_finite = g.fixed("not_finite", most)
        self._runs = g.fixed("runs", 4 * most)
        self._group_words = most_words(most)
        self._groups = g.fixed("groups", most * self._group_words)
        self._graphs: dict[tuple[int, bool], object] = {}
        self.stages = frozenset(program.marks)

    def start(self) -> None:
        """Fill what never changes, once memory is there."""
        self._g.gpu.upload(self._each["sequence"].address, np.arange(self.most, dtype=np.int32))
        words = np.zeros((self.most, self._group_words // 4, 4), np.int32)
        for n in range(1, self.most + 1):
            groups = groups_of(n)
            words[n - 1, : len(groups)] = groups
        self._g.gpu.upload(self._groups.address, words)

    def logits(self, tokens: I32, positions: I32, pages: I32, states: I32, of: I32) -> F32:
        """Append tokens, each with the pages of its sequence, which ``of`` numbers; float32 [n,
        vocabulary]."""
        n = len(tokens)
        self._set(tokens, positions, pages, states, of)
        self._replay(n, int(positions.max()))
        out = self._g.gpu.results(n * self._program.vocabulary)
        self._g.gpu.download(self._program.logits.address, out)
        return out.reshape(n, -1)

    def traced(
        self,
        tokens: I32,
        positions: I32,
        pages: I32,
        states: I32,
        of: I32,
        logits: F32,
        keys: Set[Key],
    ) -> Iterator[tuple[Mark, Pass]]:
        """See :meth:`OneSequence.traced`."""
        p = self._pass(len(tokens), many=self._many(int(positions.max())))
        if lasting := self._program.lasting(keys):
            logits[:] = self.logits(tokens, positions, pages, states, of)
            yield from _read_at_the_end(self._g, lasting, p)
            return
        self._set(tokens, positions, pages, states, of)
        self._count()
        for mark in chain(self._program.body(p), self._program.head(p)):
            if mark.value.key in keys:
                yield mark, p
        self._g.gpu.download(self._program.logits.address, logits)

    def greedy(self, tokens: I32, positions: I32, pages: I32, states: I32, count: int) -> I32:
        """The same of each sequence; int32 [count, n]."""
        self._set(tokens, positions, pages, states, np.arange(len(tokens), dtype=np.int32))
        for i in range(count):
            self._replay(len(tokens), int(positions.max()) + i)
        out = np.empty((count, padded(len(tokens), self.sizes)), np.int32)
        self._g.gpu.download(self._generated.address, out)
        return out[:, : len(tokens)]

    def _set(self, tokens: I32, positions: I32, pages: I32, states: I32, of: I32) -> None:  # noqa: ARG002
        gpu, n = self._g.gpu, padded(len(tokens), self.sizes)
        which = np.minimum(np.arange(n), len(tokens) - 1)
        tokens, positions, pages, states = (a[which] for a in (tokens, positions, pages, states))
        table = np.zeros((n, self._g.tiles), np.int32)
        table[:, : pages.shape[1]] = pages[:, : self._g.tiles]
        for name, values in (("tokens", tokens), ("positions", positions), ("first", positions)):
            gpu.upload(self._each[name].address, values)
        gpu.upload(self._pages.address, table)
        gpu.upload(self._not_finite.address, np.zeros(n, np.int32))
        if self._g.resident.states:
            rows = np.arange(n, dtype=np.int32)
            runs = np.stack([rows, np.ones_like(rows), states, 0 * rows], axis=1)
            gpu.upload(self._runs.address, np.ascontiguousarray(runs, np.int32))

    def _pass(self, n: int, *, many: bool = True) -> Pass:
        each = {name: slot.address for name, slot in self._each.items()}
        groups = self._groups.address + 4 * (n - 1) * self._group_words
        inputs = Inputs(
            tokens=each["tokens"],
            positions=each["positions"],
            sequence=each["sequence"],
            pages=self._pages.address,
            each=self._g.tiles,
            rows=each["sequence"],
            runs=self._runs.address,
            groups=(groups, groups + 4 * WORDS_OF_GROUP),
        )
        return Pass(n, n, inputs, count=n, many=many)

    def _many(self, _: int) -> bool:
        return True

    def _count(self) -> None:
        """Another step is queued."""

    def _replay(self, n: int, position: int) -> None:
        """Queue a step whose farthest token has this position."""
        self._count()
        size = padded(n, self.sizes)
        self._g.gpu.replay(self._graph(size, many=self._many(position)))

    def _graph(self, n: int, *, many: bool) -> object:
        if (n, many) not in self._graphs:
            queue = partial(self._queue, self._pass(n, many=many))
            self._graphs[n, many] = self._g.gpu.capture(queue)
        return self._graphs[n, many]

    def _queue(self, p: Pass) -> None:
        self._program.queue(p)
        each = {name: slot.address for name, slot in self._each.items()}
        self._g.launch(
            "next_token",
            (p.tokens,),
            (self._program.logits.address, self._program.vocabulary, each["first"])
            + (each["tokens"], each["positions"], self._generated.address)
            + (self._not_finite.address, p.inputs.number),
        )


class SeveralRows(ManySequences):
    """Steps of exactly so many tokens, of as many sequences or of fewer."""

    def __init__(self, program: Program, rows: int) -> None:
        super().__init__(program, rows)
        self._number, self._of = self._g.fixed("number", 1), self._g.fixed("of", rows)
        self._next = 1  # number of the next step

    def _set(self, tokens: I32, positions: I32, pages: I32, states: I32, of: I32) -> None:
        super()._set(tokens, positions, pages, states, of)
        self._g.gpu.upload(self._of.address, of)
        self._g.gpu.upload(self._number.address, np.array([self._next], np.int32))

    def _pass(self, n: int, *, many: bool = True) -> Pass:
        p = super()._pass(n, many=many)
        number, of = self._number.address, self._of.address
        return replace(p, inputs=replace(p.inputs, number=number, of=of))

    def _many(self, position: int) -> bool:
        few = step_attention.FEW_TILES if self.most <= step_attention.MERGED_ROWS else 0
        return position >= few * TILE

    def _count(self) -> None:
        self._next = self._next % (1 << 30) + 1
