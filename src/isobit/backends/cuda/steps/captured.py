"""Steps of decoding: one token of each sequence, queued as CUDA graphs that set up the next step.

What a step works on stays put in memory, so that one graph serves all steps of its kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32, Batch
from isobit.backends.cuda.fusions import step_attention
from isobit.backends.cuda.graph import Program
from isobit.backends.cuda.lowering import Lowering
from isobit.backends.cuda.steps.graph_cache import Captures
from isobit.backends.cuda.workspace import Inputs, Pass, TracePoint
from isobit.model.graph import Key
from isobit.numerics import KV_PAGE

_SEARCH, _SEARCH_LEAST, _SEARCH_MOST = 2, 3, 16
"""Blocks of a multiprocessor that look for the most likely tokens; of a sequence, if not one."""


@dataclass(frozen=True)
class Step:
    """One token of each row; all arrays are int32."""

    tokens: I32
    """[n]"""
    positions: I32
    """[n]"""
    pages: I32
    """[n, P]"""
    states: I32
    """[n]"""
    of: I32
    """[n]: the number of each row's sequence."""

    @classmethod
    def of_batch(cls, batch: Batch, states: I32) -> "Step":
        """states: [S], where each sequence's state lies."""
        of, pages = batch.sequence, batch.pages
        if not np.array_equal(of, np.arange(len(pages))):
            pages = pages[of]
        return cls(batch.tokens, batch.positions, pages, states[of], of)


class Filled:
    """The places of tokens that are not known before the pass ahead of theirs has ended."""

    def __init__(self, g: Lowering, most: int) -> None:
        self._g, self._places = g, g.fixed("places", most)

    def __call__(self, source: int, places: I32, size: int, tokens: int) -> None:
        """Queue that ``size`` tokens at an address, of which the last is repeated, become the words
        of ``source`` at these places; those of places below 0 stay."""
        which = np.minimum(np.arange(size), len(places) - 1)
        self._g.gpu.upload(self._places.address, places[which])
        arguments = source, self._places.address, size, tokens
        self._g.launch("sampling/take_tokens", (-(-size // 256),), arguments)


class Captured(ABC):
    """What steps of one sequence and of several have in common."""

    def __init__(self, program: Program, most: int, sizes: Iterable[int]) -> None:
        """sizes: numbers of tokens of which there is a graph."""
        self._program, self._g, self.most = program, program.g, most
        self._filled = Filled(program.g, most)
        deep = {self._many(position) for position in (0, program.g.resident.context - 1)}
        self.graphs = Captures(program.g.gpu, self._launches, product(sizes, sorted(deep)))
        self._number = 1  # of the next step
        self.stages = frozenset(program.marks)

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Where the next step's tokens are."""

    @abstractmethod
    def begin(self, step: Step) -> None:
        """Set a step up: after it, steps follow by themselves."""

    @abstractmethod
    def page(self, pages: I32) -> None:
        """The page tables are longer now."""

    def fill(self, source: int, places: I32) -> None:
        """Take tokens that were not known at :meth:`begin`: see :class:`Filled`."""
        self._filled(source, places, self.size(len(places)), self.tokens)

    def replay(self, n: int, position: int) -> None:
        """Queue a step of so many tokens, of which the farthest has this position."""
        self._count()
        self._g.gpu.replay(self.graphs[self.size(n), self._many(position)])

    @abstractmethod
    def noted(self, first: I32, position: int) -> int:
        """Where the argmaxes are that a step found, whose farthest token has this position,
        -1 from where logits were not finite; ``first``: the positions that were set up."""

    @abstractmethod
    def _pass(self, n: int, *, many: bool = True) -> Pass:
        """Of n tokens."""

    def _many(self, position: int) -> bool:
        """Whether a step that reaches this position is of many tiles of keys."""
        return position >= step_attention.FEW_TILES * KV_PAGE

    @abstractmethod
    def _queue(self, p: Pass) -> None:
        """Queue a step's launches, and those that set up the next."""

    def _launches(self, of: tuple[int, bool]) -> Callable[[], None]:
        n, many = of
        return partial(self._queue, self._pass(n, many=many))

    @property
    def logits(self) -> int:
        """Where a row of logits is for each token, once a step has run."""
        return self._program.logits.address

    @property
    def lasting(self) -> tuple[int, int]:
        """Where the stages lie that can be read at the end of a step, and how many bytes."""
        return self._g.lasting

    def lasts(self, keys: frozenset[Key]) -> bool:
        """Whether all of these stages, of which there are some, can be read at the end."""
        return bool(self._program.lasting(keys))

    def read(
        self, copy: NDArray[np.uint8], keys: frozenset[Key], n: int
    ) -> Iterator[tuple[Key, NDArray[np.generic]]]:
        """Stages that last, of a step of n tokens, from a copy of what lies at ``lasting``."""
        source, p = _Copy(self._g.lasting[0], copy), self._pass(n)
        for mark in self._program.lasting(keys):
            assert mark.value.key is not None
            yield mark.value.key, mark.read(source, p)

    def traced(self, step: Step, keys: Set[Key]) -> Iterator[tuple[TracePoint, Pass]]:
        """Set a step up and queue its launches one by one; stops where one of these stages can be
        read."""
        n, position = len(step.tokens), int(step.positions.max())
        self.begin(step)
        self._count()
        p = self._pass(n, many=self._many(position))
        for mark in chain(self._program.body(p), self._program.head(p)):
            if mark.value.key in keys:
                yield mark, p

    def greedy(self, step: Step, count: int) -> I32:
        """Append tokens, then the most likely next, ``count`` in all, without waiting in between.

        Returns the most likely tokens after each, int32 [count, n]; -1 from where logits are not
        finite.
        """
        self.begin(step)
        n, first = len(step.tokens), int(step.positions.max())
        for i in range(count):
            self.replay(n, first + i)
        out = np.empty((count, self.size(n)), np.int32)
        self._g.gpu.download(self.noted(step.positions, first), out)
        return out[:, :n]

    def size(self, n: int) -> int:
        """Of the step that takes n tokens."""
        return n

    def _count(self) -> None:
        self._number = self._number % (1 << 30) + 1


class OneSequence(Captured):
    """Steps of one sequence."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, 1, (1,))
        g = self._g
        self._step = g.fixed("step", 5)  # Step of step.cuh
        self._pages = g.fixed("pages", g.tiles)
        self._generated = g.fixed("generated", g.resident.context + 1)
        self._zero = g.fixed("zero", 1, zero=True)
        self._run = g.fixed("run", 4, zero=True)

    @property
    def tokens(self) -> int:
        """See :class:`Captured`."""
        return self._step.address

    def begin(self, step: Step) -> None:
        """See :class:`Captured`."""
        self._set(step.tokens, step.positions, step.pages, step.states)

    def page(self, pages: I32) -> None:
        """See :class:`Captured`."""
        self._g.gpu.upload(self._pages.address, pages[0, : self._g.tiles])

    def noted(self, first: I32, position: int) -> int:  # noqa: ARG002
        """See :class:`Captured`."""
        return self._generated.address + 4 * position

    def _pass(self, n: int = 1, *, many: bool = True) -> Pass:
        step = self._step.address
        inputs = Inputs(
            tokens=step,
            positions=step + 4,
            sequence=self._zero.address,
            pages=self._pages.address,
            each=self._g.tiles,
            rows=self._zero.address,
            chunks=self._run.address,
            generated=self._generated.address,
            number=step + 16,
        )
        return Pass(n, n, inputs, count=n, many=many)

    def _queue(self, p: Pass) -> None:
        self._program.queue(p)
        if not self._g.advances:
            step = self._step.address
            self._g.launch(
                "sampling/next_token",
                (1,),
                (self._program.logits.address, self._program.vocabulary, self._zero.address)
                + (step, step + 4, self._generated.address, step + 8, step + 16, 0, 0),
            )

    def _set(self, tokens: I32, positions: I32, pages: I32, states: I32) -> None:
        gpu = self._g.gpu
        step = np.array([tokens[0], positions[0], 0, 0, self._number], np.int32)
        gpu.upload(self._step.address, step)
        self.page(pages)
        if self._g.resident.states:
            gpu.upload(self._run.address, np.array([0, 1, states[0], 0], np.int32))


class _Copy:
    """A copy of device memory."""

    def __init__(self, address: int, copy: NDArray[np.uint8]) -> None:
        self._address, self._bytes = address, copy

    def download(self, address: int, out: NDArray[np.generic]) -> None:
        """See :class:`isobit.backends.cuda.workspace.Source`."""
        at = address - self._address
        out.reshape(-1).view(np.uint8)[:] = self._bytes[at : at + out.nbytes]


def padded(n: int, sizes: Sequence[int]) -> int:
    """The size of the graph that takes so many; n itself, if there are none."""
    return next((size for size in sizes if size >= n), n)


class ManySequences(Captured):
    """Steps of several sequences together: a graph for each number of them, or for each of
    ``sizes``, made when it is first asked for.

    The last token of a step is repeated up to the next size: it chooses the same experts, and
    writes the same again.
    """

    def __init__(self, program: Program, most: int, sizes: Sequence[int] = ()) -> None:
        super().__init__(program, most, sizes or self._exact(most))
        g, self.sizes = self._g, sizes
        names = "tokens", "positions", "first", "sequence"
        self._each = {name: g.fixed(name, most) for name in names}
        self._pages = g.fixed("pages", most * g.tiles)
        self._generated = g.fixed("generated", most * (g.resident.context + 1))
        self._not_finite = g.fixed("not_finite", most)
        self._chunks = g.fixed("chunks", 4 * most)
        self._found = g.fixed("found", 2 * max(most, _SEARCH * g.gpu.multiprocessors))
        self._arrived = g.fixed("arrived", most, zero=True)

    @property
    def tokens(self) -> int:
        """See :class:`Captured`."""
        return self._each["tokens"].address

    def size(self, n: int) -> int:
        """Of the step that takes n tokens, of which the last is repeated."""
        return padded(n, self.sizes)

    def start(self) -> None:
        """Fill what never changes, once memory is there."""
        self._g.gpu.upload(self._each["sequence"].address, np.arange(self.most, dtype=np.int32))

    def begin(self, step: Step) -> None:
        """See :class:`Captured`."""
        self._set(step.tokens, step.positions, step.pages, step.states, step.of)

    def page(self, pages: I32) -> None:
        """See :class:`Captured`."""
        table = np.zeros((self.size(len(pages)), self._g.tiles), np.int32)
        table[: len(pages), : pages.shape[1]] = pages[:, : self._g.tiles]
        table[len(pages) :] = table[len(pages) - 1]
        self._g.gpu.upload(self._pages.address, table)

    def noted(self, first: I32, position: int) -> int:
        """See :class:`Captured`."""
        row = self.size(len(first))
        return self._generated.address + 4 * row * (position - int(first.max()))

    def _set(self, tokens: I32, positions: I32, pages: I32, states: I32, of: I32) -> None:  # noqa: ARG002
        gpu, n = self._g.gpu, self.size(len(tokens))
        which = np.minimum(np.arange(n), len(tokens) - 1)
        self.page(pages)
        tokens, positions, states = (a[which] for a in (tokens, positions, states))
        for name, values in (("tokens", tokens), ("positions", positions), ("first", positions)):
            gpu.upload(self._each[name].address, values)
        gpu.upload(self._not_finite.address, np.zeros(n, np.int32))
        if self._g.resident.states:
            rows = np.arange(n, dtype=np.int32)
            chunks = np.stack([rows, np.ones_like(rows), states, 0 * rows], axis=1)
            gpu.upload(self._chunks.address, np.ascontiguousarray(chunks, np.int32))

    def _pass(self, n: int, *, many: bool = True) -> Pass:
        each = {name: slot.address for name, slot in self._each.items()}
        inputs = Inputs(
            tokens=each["tokens"],
            positions=each["positions"],
            sequence=each["sequence"],
            pages=self._pages.address,
            each=self._g.tiles,
            rows=each["sequence"],
            chunks=self._chunks.address,
        )
        return Pass(n, n, inputs, count=n, many=many)

    def _many(self, position: int) -> bool:  # noqa: ARG002
        return True

    def _exact(self, most: int) -> Iterable[int]:
        """Sizes of steps, where none is padded."""
        return range(2, most + 1)

    def _queue(self, p: Pass) -> None:
        self._program.queue(p)
        each = {name: slot.address for name, slot in self._each.items()}
        self._g.launch(
            "sampling/next_token",
            (
                p.tokens,
                min(_SEARCH_MOST, max(1, _SEARCH * self._g.gpu.multiprocessors // p.tokens)),
            ),
            (self._program.logits.address, self._program.vocabulary, each["first"])
            + (each["tokens"], each["positions"], self._generated.address)
            + (self._not_finite.address, p.inputs.number)
            + (self._found.address, self._arrived.address),
        )


class SeveralRows(ManySequences):
    """Steps of exactly so many tokens, of as many sequences or of fewer."""

    def __init__(self, program: Program, rows: int) -> None:
        super().__init__(program, rows)
        self._place, self._of = self._g.fixed("number", 1), self._g.fixed("of", rows)

    def _set(self, tokens: I32, positions: I32, pages: I32, states: I32, of: I32) -> None:
        super()._set(tokens, positions, pages, states, of)
        self._g.gpu.upload(self._of.address, of)
        self._g.gpu.upload(self._place.address, np.array([self._number], np.int32))

    def _pass(self, n: int, *, many: bool = True) -> Pass:
        p = super()._pass(n, many=many)
        number, of = self._place.address, self._of.address
        return replace(p, inputs=replace(p.inputs, number=number, of=of))

    def _exact(self, most: int) -> Iterable[int]:
        return (most,)

    _many = Captured._many
