"""What lowering an operation works with: where values lie, scratch, weights, the launches made.

Lowering comes before memory (values.py). Launches are made for each pass; those of a step of
decoding once, while they are captured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.backends.cuda.device.layout import ACT_BYTES
from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.resident import DeviceRopeTable, KvCache, RecurrentState, Resident
from isobit.backends.cuda.split_values import SplitValues
from isobit.backends.cuda.workspace import (
    NOT_EXCHANGED,
    PASS,
    ROWS,
    STEP,
    STEPS,
    BufferView,
    Exchange,
    Pass,
    Slot,
    Source,
    TracePoint,
)
from isobit.model.graph import Graph, Op, Value, match
from isobit.numerics import KV_PAGE, RopeTable, Weight
from isobit.numerics.ops import ExpertMatMul, MatMul, Shape

THREADS = 256
WARPS = THREADS // 32
Launch = Callable[[Pass], None]
"""What an operation, or several, become: launches for any pass."""
Defines = Mapping[str, str | int]
"""Definitions that a kernel is compiled with."""
Claimed = tuple[int, Callable[[], None]]
"""How many operations a fusion takes, and what lowers them."""


@dataclass
class Ahead:
    """What a launch may fetch for a later one, once that is lowered: gate and up of experts."""

    weights: tuple[DeviceWeight, ...] = ()


@dataclass(frozen=True)
class Parts:
    """A product as part_matmul.cu leaves it: [part][token][row], to be added up in order."""

    slot: Slot
    parts: int
    tokens: int
    """Of a pass at most."""
    whole: range
    """Tokens of smaller passes that do not leave it so."""

    def count(self, p: Pass) -> int:
        """How many; 1 where it lies as a whole, in its own place."""
        return 1 if p.tokens > self.tokens or p.tokens in self.whole else self.parts


class Lowering(SplitValues):
    """What has been lowered so far of one program of a model."""

    def __init__(
        self,
        graph: Graph,
        resident: Resident,
        gpu: Gpu,
        planes: int,
        kind: str = PASS,
        rows: int = 1,
    ) -> None:
        super().__init__(graph, gpu, captured=kind != PASS)
        self.resident, self.planes, self.kind, self.rows = resident, planes, kind, rows
        self.every = kind in (STEP, STEPS, ROWS)
        """Whether all tokens' logits are wanted."""
        self.tiles = -(-resident.context // KV_PAGE)
        self.made: list[Launch | TracePoint] = []
        self.advances = False
        """Whether a step of one sequence sets up the next one by itself."""
        self.whole_layers = 0
        """How many layers decode_layer has taken."""
        self.received: list[Slot] = []
        """Where rows go that come with a batch."""
        self.spans: dict[int, tuple[Slot, Slot]] = {}
        """Where spans of some length begin, and how many tokens they have."""
        self.in_runs: Slot
        """Of a mixed batch with spans: which tokens are in some."""
        self.ahead = Ahead()
        """Of the last product of a matrix with all tokens."""
        self.sorted: set[Value] = set()
        """Chosen experts whose order a launch reads."""
        self.added: set[Value] = set()
        """Products that may lie in parts, as whoever reads them adds these up."""
        self.parts: dict[Value, Parts] = {}
        """Those that do, in small passes."""

    # What reads values

    def match(
        self, ops: Sequence[Op], pattern: Sequence[str], inner: Collection[str] = ()
    ) -> Mapping[str, Value] | None:
        """:func:`isobit.model.graph.match`; ``inner``: what nothing else reads."""
        found = match(ops, pattern)
        taken = ops[: len(pattern)]
        return found if found and all(self.ends(found[name], taken) for name in inner) else None

    def ends(self, value: Value, ops: Sequence[Op]) -> bool:
        """Whether nothing but these operations reads a value."""
        return all(op in ops for op in self.readers.get(value, ()))

    def dies(self, value: Value, ops: Sequence[Op]) -> bool:
        """Whether nothing behind these operations reads a value."""
        return self.readers[value][-1] in ops

    def multiplied(self, value: Value) -> bool:
        """Whether a product reads a value's quantised form."""
        return any(any(formats) for formats in self._products(value))

    def only_multiplied(self, value: Value) -> bool:
        """Whether nothing reads a value but in its quantised form."""
        found = self._products(value)
        return bool(found) and all(formats and all(formats) for formats in found)

    def _products(self, value: Value) -> list[list[bool]]:
        """For each operation that reads a value: if it is a product, whether each weight is
        quantised; else nothing."""
        return [
            [w.format.quantized for w in op.weights]
            if isinstance(op.operation, MatMul | ExpertMatMul)
            else []
            for op in self.readers.get(value, ())
        ]

    # Where values lie

    def dense(self, value: Value) -> BufferView:
        """Where a value lies in one piece; it is copied if it is torn. Of one that arrives, where
        this part's columns do."""
        if value in self._arriving:
            return self.places[value]
        self._land(value)
        place, shape = self.places[value], value.shape
        if place.stride == shape.width and place.step in (shape.row[-1], shape.width):
            return place
        slot = self.slot("copy", shape.width, shape.rows)
        n = shape.row[-1]
        self.vectors("ops/copy", shape, n, [self.view(value, n)], lambda _: (0, slot.address))
        return BufferView(slot, shape.width, n)

    def view(self, value: Value, n: int) -> Callable[[], tuple[int, int, int]]:
        """A value as vectors of n, as View of views.cuh takes it: address, stride, step."""
        self._land(value)
        place, own = self.places[value], value.shape.row[-1]
        if n == own or value in self._arriving:
            step = place.step
        elif own in (place.step, value.shape.width):
            step = n
        else:
            place, step = self.dense(value), n
        return lambda: (place.address, place.stride, step)

    def acts_of(self, value: Value, n: int) -> Slot:
        """Where a launch leaves a value quantised in superblocks of vectors of n."""
        words = ACT_BYTES // 4 * supers(n) * (value.shape.width // n)
        return self.form(value, f"acts {n}", words)

    def acts(self, value: Value, n: int) -> Slot:
        """A value quantised in superblocks of vectors of n."""
        if found := self.formed(value, f"acts {n}"):
            return found
        acts, make = self.quantising(value, n)
        self.emit(make)
        return acts

    def quantising(self, value: Value, n: int) -> tuple[Slot, Launch]:
        """Where it will lie, and what launches that."""
        view, acts, each = self.view(value, n), self.acts_of(value, n), value.shape.width // n
        exchange = self.arriving(value)

        def make(p: Pass) -> None:
            count = p.rows(value.shape) * each
            arguments = (*view(), each, n, count, acts.address, *exchange.arguments)
            blocks = (-(-count * supers(n) // WARPS),)
            self.launch("ops/quantise", blocks, arguments, exchange.defines)

        return acts, make

    def arrives(self, value: Value, own: Value, exchange: Exchange) -> None:
        """A gathered value is nowhere as a whole: this part's columns lie where ``own`` does, in
        one piece, and the others' are where the exchange's kernels find them. Products read it."""
        self.put(value, self.dense(own))
        self._arriving[value] = exchange

    def _land(self, value: Value) -> None:
        if (exchange := self.take_landing(value)) is NOT_EXCHANGED:
            return
        place, shape = self.places[value], value.shape

        def make(p: Pass) -> None:
            grid = -(-shape.width // THREADS), p.rows(shape)
            arguments = place.address, *exchange.arguments
            self.launch("ops/collect", grid, arguments, exchange.defines)

        self.emit(make, value)

    # What stays

    def matrix(self, weight: Weight) -> DeviceWeight:
        """A matrix, or a stack of them."""
        return self.resident.weights.matrices[weight.name]

    def vector(self, weight: Weight) -> Callable[[], int]:
        """A vector's address, once it is loaded."""
        return lambda: self.resident.vector(weight)

    def cache(self, keys: Value) -> KvCache:
        """The cache of keys that an operation appended."""
        return self.resident.caches[keys]

    def state(self, op: Op) -> RecurrentState:
        """What the operation keeps."""
        return self.resident.states[op]

    def rope_table(self, table: RopeTable) -> DeviceRopeTable:
        """A RoPE table."""
        return self.resident.rope_tables[table]

    # Launches

    def emit(self, make: Launch, *values: Value) -> None:
        """Launches come next; after them these values can be read."""
        self.made.append(make)
        for value in values:
            self.mark(value)

    def mark(self, value: Value, *, lasting: bool = False) -> None:
        """A value can be read now, if it is a stage; ``lasting``: also at the end of the pass."""
        if value.name is None:
            return
        place, shape = self.places[value], value.shape

        def read(source: Source, p: Pass) -> NDArray[np.generic]:
            rows, n = p.rows(shape), shape.row[-1]
            each = shape.width // n
            words: NDArray[np.generic] = np.empty(
                max((rows - 1) * place.stride + (each - 1) * place.step + n, 0), shape.dtype
            )
            source.download(place.address, words)
            strides = 4 * place.stride, 4 * place.step, 4
            vectors = np.lib.stride_tricks.as_strided(words, (rows, each, n), strides)
            return vectors.reshape(rows, *shape.row)

        self.made.append(TracePoint(value, read, lasting))

    def meet(self, exchange: Exchange, value: Value) -> None:
        """Emit what waits until all parts have stored what they have of a value."""
        defines = {**exchange.waited, "BLOCKS": self.blocks_at_once}
        self.emit(lambda _: self.launch("ops/meet", (1,), exchange.arguments, defines), value)

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        arguments: Sequence[int | float],
        defines: Defines | None = None,
        *,
        shared: int = 0,
    ) -> None:
        """Queue a kernel: a file, and .entry if its name is not the file's."""
        file, _, entry = kernel.partition(".")
        self.gpu.launch(
            file,
            entry or file.rpartition("/")[2],
            grid,
            arguments,
            shared=shared,
            defines={"PLANES": str(self.planes)} | {k: str(v) for k, v in (defines or {}).items()},
            overlap=True,
        )

    def vectors(
        self,
        kernel: str,
        shape: Shape,
        n: int,
        views: Sequence[Callable[[], tuple[int, int, int]]],
        more: Callable[[Pass], tuple[int | float, ...]],
        *values: Value,
        defines: Defines | None = None,
    ) -> None:
        """Emit a kernel with a thread for each value of vectors of n; ``more``: arguments behind
        the views, vectors a row, and n."""
        each = shape.width // n

        def make(p: Pass) -> None:
            views_now = [word for view in views for word in view()]
            arguments = (*views_now, each, n, *more(p))
            grid = (p.rows(shape) * each, -(-n // THREADS))
            self.launch(kernel, grid, arguments, defines)

        self.emit(make, *values)

    def valuewise(self, op: Op, *numbers: float) -> None:
        """Emit an operation's kernel with a thread for each value that it gives, of as many values
        of each input; ``numbers``: its own, rounded to binary32."""
        (y,), to = op.outputs, self.new(op.outputs[0])
        n = min(v.shape.row[-1] for v in (y, *op.inputs))
        views, own = [self.view(v, n) for v in op.inputs], [float(np.float32(x)) for x in numbers]
        self.vectors(f"ops/{op.kind}", y.shape, n, views, lambda _: (*own, to.address), y)


def anything(_: Op) -> None:
    """What an operation ``supports`` that has a kernel for all of its kind."""
