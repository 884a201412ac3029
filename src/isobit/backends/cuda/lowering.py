"""What lowering an operation works with: where values lie, scratch, weights, the launches made.

Lowering comes before memory. A :class:`Slot` says how many words it needs for a row; it becomes an
address when the plan (programs.py) has found what all of them take. Launches are made for each
pass; those of a step of decoding once, while they are captured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base.workspace import BATCH
from isobit.backends.cuda.device.layout import ACT_BYTES
from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.resident import DeviceRopeTable, KvCache, RecurrentState, Resident
from isobit.backends.cuda.workspace import (
    EXPERTS,
    NOT_EXCHANGED,
    PASS,
    ROWS,
    STEP,
    STEPS,
    BufferView,
    Exchange,
    Inboxes,
    Pass,
    Slot,
    Source,
    TracePoint,
)
from isobit.model.graph import Graph, Op, Value, match
from isobit.numerics import KV_PAGE, RopeTable, Weight
from isobit.numerics.ops import TOKENS, ExpertMatMul, Gather, GatherExperts, MatMul, Shape

THREADS = 256
WARPS = THREADS // 32
Launch = Callable[[Pass], None]
"""What an operation, or several, become: launches for any pass."""


_READ_AT_ONCE = frozenset({"add", "matmul", "expert_matmul", "rms_norm", "top_k"})
"""Operations that leave nothing where they read it, for others to read later."""

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

    def count(self, p: Pass) -> int:
        """How many; 1 where it lies as a whole, in its own place."""
        return self.parts if p.tokens <= self.tokens else 1


class Lowering:
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
        self.gpu, self.resident, self.planes, self.kind = gpu, resident, planes, kind
        self.rows = rows
        self.captured = kind != PASS
        self.every = kind in (STEP, STEPS, ROWS)
        """Whether all tokens' logits are wanted."""
        self.tiles = -(-resident.context // KV_PAGE)
        self.made: list[Launch | TracePoint] = []
        self.lasting = (0, 0)
        """Where the slots begin that last, and how many bytes they take."""
        self.advances = False
        """Whether a step of one sequence sets up the next one by itself."""
        self.places: dict[Value, BufferView] = {}
        self.slots: list[Slot] = []
        self.whole_layers = 0
        """How many layers decode_layer has taken."""
        self.received: list[Slot] = []
        """Where rows go that come with a batch."""
        self.spans: dict[int, tuple[Slot, Slot]] = {}
        """Where spans of some length begin, and how many tokens they have."""
        self.in_runs: Slot
        """Of a mixed batch with spans: which tokens are in some."""
        self.readers: dict[Value, list[Op]] = {}
        for op in graph.required.ops:
            for v in op.inputs:
                self.readers.setdefault(v, []).append(op)
        self.ahead = Ahead()
        """Of the last product of a matrix with all tokens."""
        self.sorted: set[Value] = set()
        """Chosen experts whose order a launch reads."""
        self.added: set[Value] = set()
        """Products that may lie in parts, as whoever reads them adds these up."""
        self.parts: dict[Value, Parts] = {}
        """Those that do, in small passes."""
        self.exchanges: dict[str, Inboxes] = {}
        """By the rows that gathered values have, or EXPERTS."""
        self._ops = graph.required.ops
        self._maker = {v: i for i, op in enumerate(self._ops) for v in op.outputs}
        gathers = (op.operation for op in self._ops if isinstance(op.operation, Gather))
        self._gather = next(gathers, None)
        """Of a part of a split model: which it is, and of how many."""
        self._meetings = [i for i, op in enumerate(self._ops) if self._meets(op)]
        self.mirrored: dict[Value, Exchange] = {}
        """Values of which all parts get what this one makes, as it is made."""
        self._arriving: dict[Value, Exchange] = {}
        self._landing: dict[Value, Exchange] = {}
        self._forms: dict[tuple[Value, str], Slot] = {}
        self._live: dict[Value, list[Slot]] = {}
        self._held: list[Slot] = []

    # Where values lie

    def slot(self, name: str, words: int, rows: str = TOKENS, more: int = 0) -> Slot:
        """Memory that no value uses now; its own until a value is put there, or :meth:`end`."""
        needs = words, rows, more
        free = (s for s in self.slots if not s.users and (s.words, s.rows, s.more) == needs)
        found = next(free, None) or self._slot(name, words, rows, more)
        found.users += 1
        self._held.append(found)
        return found

    def fixed(
        self,
        name: str,
        words: int,
        rows: str = BATCH,
        *,
        zero: bool = False,
        lasting: bool = False,
    ) -> Slot:
        """Memory that nothing else ever uses; see :class:`Slot`."""
        slot = self._slot(name, words, rows)
        slot.zero, slot.lasting = zero, lasting
        slot.own, slot.users = True, 1
        return slot

    def _slot(self, name: str, words: int, rows: str, more: int = 0) -> Slot:
        self.slots.append(Slot(name, words, rows, more))
        return self.slots[-1]

    def put(self, value: Value, place: BufferView) -> None:
        """A value lies there."""
        self.places[value] = place
        self._keep(value, place.slot)

    def new_lasting(self, value: Value) -> Slot:
        """A slot for a value alone, which nothing else ever uses."""
        shape = value.shape
        slot = self.fixed(value.name or "value", shape.width, shape.rows, lasting=True)
        self.put(value, BufferView(slot, shape.width, shape.row[-1]))
        return slot

    def exchange_of(self, op: Op, blocks: int = 0) -> Exchange:
        """The next exchange of the pass, of a gather; ``blocks``: that have flags of their own, if
        values are not sent as words with a number."""
        gather, shape = op.operation, op.outputs[0].shape
        assert isinstance(gather, Gather)
        words = (
            shape.width if blocks else 2 * 256 * supers(gather.width) * shape.width // gather.width
        )
        bounds = *(ranges[0][0] for ranges in gather.parts), gather.width
        return self._exchange(shape, bounds, gather.rank, words, len(gather.parts) * blocks)

    def exchange_of_experts(self, op: Op) -> Exchange:
        """The next of rows that each part has of its experts. They have inboxes of their own, as
        values are plain in each program, and would be taken for words with a number."""
        gather, shape = op.operation, op.outputs[0].shape
        assert isinstance(gather, GatherExperts)
        flags = (len(gather.bounds) - 1) * self.blocks_at_once
        return self._exchange(shape, gather.bounds, gather.rank, shape.width, flags, EXPERTS)

    def _exchange(
        self,
        shape: Shape,
        bounds: tuple[int, ...],
        rank: int,
        words: int,
        flags: int,
        kind: str = "",
    ) -> Exchange:
        """The next of the pass, of values that take so many words of an inbox a row."""
        parts, kind = len(bounds) - 1, kind or shape.rows
        if kind not in self.exchanges:
            first, second = (self.fixed("inbox", 0, shape.rows, zero=True) for _ in range(2))
            table = self.fixed("exchanges", 2 * parts + 8, zero=True)
            self.exchanges[kind] = Inboxes(table, (first, second), parts)
        found = self.exchanges[kind]
        for slot in found.own:
            slot.words, slot.more = max(slot.words, words), max(slot.more, flags + 3)
        found.sites += 1
        return Exchange(found, found.sites - 1, bounds, rank)

    def exchanges_within(self, op: Op) -> bool:
        """Whether a gather can be a part of the kernels beside it: they move eight columns at a
        time, and wait on all multiprocessors, which no other part may need."""
        gather = op.operation
        assert isinstance(gather, Gather)
        return (
            self.captured
            and self.gpu.alone
            and all(len(r) == 1 and r[0][0] < r[0][1] for r in gather.parts)
            and all(column % 8 == 0 for ((first, end),) in gather.parts for column in (first, end))
        )

    @property
    def blocks_at_once(self) -> int:
        """Blocks of a kernel that waits for other parts: all run, and leave room for other parts'
        where these are on this device."""
        most = self.gpu.multiprocessors
        return most if self.gpu.alone else max(1, most // 2)

    def in_place(self, op: Op) -> bool:
        """Whether what a gather puts together may lie where other parts put it (Mirrors of
        exchange.cuh): in large passes, whose exchanges are so many that each finds the same half of
        the inbox in every pass, if all who read it do so before the next exchange."""
        gather, (whole,) = op.operation, op.outputs
        assert isinstance(gather, Gather)
        cut = all(
            len(r) == 1 and r[0][0] < r[0][1] and not (r[0][0] | r[0][1]) % 4 for r in gather.parts
        )
        return cut and self._read_at_once(whole)

    def _meets(self, op: Op) -> bool:
        """Whether parts of a split model exchange rows of tokens at an operation: a gather, or in a
        large pass a router's product, of which each makes some rows."""
        y = op.outputs[0]
        if self._gather is None or y.shape.rows != TOKENS:
            return False
        if op.kind != "matmul" or self.captured or y.shape.width % 4:
            return op.kind == "gather"
        readers, behind = self.readers.get(y, ()), self._ops[self._maker[y] + 1]
        floats = not any(w.format.quantized for w in op.weights)
        return len(op.weights) == 1 and floats and behind.kind == "top_k" and [*readers] == [behind]

    def _read_at_once(self, whole: Value) -> bool:
        """Whether a value can lie in an inbox."""
        at = self._maker[whole]
        if self.captured or at not in self._meetings or len(self._meetings) % 2:
            return False
        until = min((i for i in self._meetings if i > at), default=len(self._ops))
        return whole.shape.row[-1] % 4 == 0 and all(
            self._maker[reader.outputs[0]] < until
            and reader.kind in _READ_AT_ONCE
            and (reader.kind != "add" or reader.inputs[0] is not whole)
            for reader in self.readers.get(whole, ())
        )

    def mirror_of(self, op: Op) -> Exchange:
        """The next exchange of the pass, of a gather that puts a value together in place."""
        blocks, gather = self.blocks_at_once, op.operation
        assert isinstance(gather, Gather)
        return replace(self.exchange_of(op, blocks), flags=-(-len(gather.parts) * blocks // 4) * 4)

    def shared(self, value: Value) -> Exchange:
        """By which exchange each part gives the others its share of the rows of a product that
        every part would make."""
        if self._gather is None or not self._read_at_once(value):
            return NOT_EXCHANGED
        parts, width, blocks = len(self._gather.parts), value.shape.width, self.blocks_at_once
        bounds, rank = (0,) * parts + (width,), self._gather.rank
        found = self._exchange(value.shape, bounds, rank, width, parts * blocks)
        return replace(found, flags=-(-parts * blocks // 4) * 4)

    def meet(self, exchange: Exchange, value: Value) -> None:
        """Emit what waits until all parts have stored what they have of a value."""
        defines = {**exchange.waited, "BLOCKS": self.blocks_at_once}
        self.emit(lambda _: self.launch("ops/meet", (1,), exchange.arguments, defines), value)

    def target(self, value: Value) -> tuple[BufferView, Exchange]:
        """Where a launch is to leave a value, and by which exchange it is to give it to the other
        parts at once: if all that reads it is a gather, which comes next."""
        readers, behind = self.readers.get(value, []), self._maker[value] + 1
        gathered = [op.kind for op in readers] == ["gather"] and readers[0] is self._ops[behind]
        if not gathered or not self.in_place(readers[0]):
            self.new(value)
            return self.places[value], NOT_EXCHANGED
        self.mirrored[value] = exchange = self.mirror_of(readers[0])
        self.put(value, exchange.place(readers[0].outputs[0], exchange.first))
        return self.places[value], exchange

    def arrives(self, value: Value, own: Value, exchange: Exchange) -> None:
        """A gathered value is nowhere as a whole: this part's columns lie where ``own`` does, in
        one piece, and the others' are where the exchange's kernels find them. Products read it."""
        self.put(value, self.dense(own))
        self._arriving[value] = exchange

    def lands(self, value: Value, exchange: Exchange) -> None:
        """This part's columns of a value are in their places; the others' come there when somebody
        takes them, or else by a launch before the value is read."""
        self._landing[value] = exchange

    def take_landing(self, value: Value) -> Exchange:
        """How the others' columns of a value come; they are the caller's to take."""
        return self._landing.pop(value, NOT_EXCHANGED)

    def _land(self, value: Value) -> None:
        if value not in self._landing:
            return
        exchange, place, shape = self.take_landing(value), self.places[value], value.shape

        def make(p: Pass) -> None:
            grid = -(-shape.width // THREADS), p.rows(shape)
            arguments = place.address, *exchange.arguments
            self.launch("ops/collect", grid, arguments, exchange.defines)

        self.emit(make, value)

    def arriving(self, value: Value) -> Exchange:
        """How the others' columns of a value arrive."""
        return self._arriving.get(value, NOT_EXCHANGED)

    def new(self, value: Value) -> Slot:
        """A slot for a value alone."""
        shape = value.shape
        slot = self.slot(value.name or "value", shape.width, shape.rows)
        self.put(value, BufferView(slot, shape.width, shape.row[-1]))
        return slot

    def form(self, of: Value, name: str, words: int = 0, more: int = 0) -> Slot:
        """Another form of a value, which lasts as long: what a launch leaves there."""
        slot = self.slot(name, words, of.shape.rows, more)
        self._forms[of, name] = slot
        self._keep(of, slot)
        return slot

    def formed(self, of: Value, name: str) -> Slot | None:
        """A form of a value, if it was made."""
        return self._forms.get((of, name))

    def same(self, value: Value, of: Value) -> None:
        """A value is another one, in all its forms."""
        self.put(value, self.places[of])
        for (other, name), slot in list(self._forms.items()):
            if other is of:
                self._forms[value, name] = slot
                self._keep(value, slot)

    def _keep(self, value: Value, slot: Slot) -> None:
        slot.users += 1
        self._live.setdefault(value, []).append(slot)

    def end(self, needed: Callable[[Value], bool]) -> None:
        """Free what nothing needs any more."""
        for slot in self._held:
            slot.users -= 1
        self._held = []
        for value in [v for v in self._live if not needed(v)]:
            for slot in self._live.pop(value):
                slot.users -= 1

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

    # Memory

    def nbytes(self, rows: Mapping[str, int], *, own: bool) -> int:
        """Of the slots that keep something between passes, or of all others, with so many rows of
        each kind."""
        return sum(slot.nbytes(rows) for slot in self.slots if slot.own == own)

    def allocate(self, rows: Mapping[str, int], shared: int) -> None:
        """Give every slot its address; ``shared``: where those begin that keep nothing between
        passes, so that other programs may use the same memory."""
        own = self.gpu.allocate(self.nbytes(rows, own=True))
        lasting = sum(slot.nbytes(rows) for slot in self.slots if slot.lasting)
        self.lasting = own, lasting
        for slot in sorted(self.slots, key=lambda slot: not slot.lasting):
            if slot.own:
                slot.address, own = own, own + slot.nbytes(rows)
            else:
                slot.address, shared = shared, shared + slot.nbytes(rows)
            if slot.zero:
                self.gpu.upload(slot.address, np.zeros(slot.nbytes(rows) // 4, np.int32))

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
