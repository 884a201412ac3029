"""What lowering an operation works with: where values lie, scratch, weights, the steps made.

Lowering comes before memory. A :class:`Slot` says how many words it needs for a token; it becomes a
buffer when the plan (memory.py) has found how many tokens fit. Steps are made later, for each shape
of a pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from isobit.backends.base import workspace as slots
from isobit.backends.wgpu.device.gpu import Device, Step
from isobit.backends.wgpu.device.layout import superblocks
from isobit.backends.wgpu.device.load import Matrix
from isobit.model.graph import Op, Value
from isobit.numerics import KV_PAGE, RopeTable, Weight
from isobit.numerics.ops import LOGIT_ROWS, TOKENS, Shape

ACT_WORDS = 148
"""One superblock of quantised activations (quantise.wgsl)."""
STATES = "states"
"""Rows of a slot: sequences that have a recurrent state."""


@dataclass(frozen=True)
class Pass:
    """What decides the steps of a pass."""

    tokens: int
    logit_rows: int
    tiles: int
    """Of the longest sequence."""
    runs: int = 0
    """Sequences that the tokens belong to, for a model with recurrent states."""
    first: int = 0
    """Of the logit rows that are computed now …"""
    count: int = 0
    """… and how many."""
    routes: bool = False
    """Whether each token's experts are kept."""
    hidden: bool = False
    """Whether the rows that logits are made of are handed out …"""
    head: bool = True
    """… and whether logits are made of them."""

    def rows(self, shape: Shape) -> int:
        """Rows of a value."""
        return self.count if shape.rows == LOGIT_ROWS else self.tokens


@dataclass(eq=False)
class Slot(slots.Slot):
    """A slot in a buffer of its own."""

    capacity: int = 0
    """Rows that the buffer has room for."""
    buffer: Any = None


@dataclass(frozen=True)
class BufferView:
    """Where a value's float32 or int32 lie."""

    slot: Slot
    width: int
    """Words that follow one another."""
    stride: int
    """Words from there to the next as many."""
    at: int = 0
    """Words before the first of them."""
    behind: int = 0
    """Words of other values before them, for each row of the slot."""

    @property
    def first(self) -> int:
        """The first word."""
        return self.at + self.behind * self.slot.capacity


@dataclass(frozen=True)
class CachePart:
    """The buffer of key-value heads ``first`` … ``first + heads - 1`` of one KV cache."""

    buffer: Any
    first: int
    heads: int


@dataclass(eq=False)
class KvCache:
    """The keys and values that an operation appends to, in as many buffers as the plan says."""

    kv_heads: int
    head_dim: int
    parts: tuple[CachePart, ...] = ()

    @property
    def page_bytes(self) -> int:
        """One head of one page, K and V (cache.wgsl)."""
        return 4 * (256 * words_of(self.head_dim) + 2 * KV_PAGE)


def words_of(head_dim: int) -> int:
    """32-bit words of one plane of a head vector."""
    return -(-head_dim // 4)


@dataclass(frozen=True)
class BatchAt:
    """Word offsets into the batch's buffer, which begins with the tokens' positions."""

    slots: int
    """page * 64 + position in it, of each token"""
    tables: int
    """of each token's page table, less ``pages``"""
    rows: int
    """tokens whose logits are wanted"""
    runs: int
    """first token, last token + 1 and state of each sequence that has tokens"""
    rope: Mapping[RopeTable, int]
    """size / 2 cosines, then sines, of each token"""
    pages: int

    @classmethod
    def of(cls, p: Pass, rope: Sequence[RopeTable]) -> "BatchAt":
        """For a pass."""
        runs = 3 * p.tokens + p.logit_rows
        at, found = runs + 3 * p.runs, {}
        for table in rope:
            found[table] = at
            at += p.tokens * table.size
        return cls(p.tokens, 2 * p.tokens, 3 * p.tokens, runs, found, at)


Launch = Callable[[Pass], Iterable[Step]]
"""What an operation, or several, become: steps for any pass."""


class Lowering(slots.Slots[Slot]):
    """What has been lowered so far, for a number of activation planes."""

    def __init__(self, planes: int) -> None:
        super().__init__(Slot)
        self.planes = planes
        self.device: Device = None  # type: ignore[assignment]  # not before memory is planned
        self.steps: list[Launch] = []
        self.most_rows = 1
        """Of a token, in one dimension of a grid."""
        self.places: dict[Value, BufferView] = {}
        self.nothing = self.fixed("nothing", 4)
        self.batch = self.fixed("batch", 1 << 14)
        self.vectors = self.fixed("vectors", 0)
        self.matrices: list[Matrix] = []
        self.norms: dict[Weight, int] = {}
        """Vectors of the model, and where in ``vectors`` they begin."""
        self.own: dict[Weight, Slot] = {}
        """Weights whose values have a buffer of their own."""
        self.caches: dict[Value, KvCache] = {}
        self.recurrent = False
        """Whether something has a state of each sequence."""
        self.rope_tables: list[RopeTable] = []
        self.embeddings: list[tuple[Weight, Slot]] = []
        self.received: list[Slot] = []
        """Tables whose rows the host writes, and where."""
        self._scratch: dict[str, Slot] = {}
        self._formed: dict[str, object] = {}

    # Where values lie

    def put(self, value: Value, place: BufferView) -> None:
        """A value lies there."""
        self.places[value] = place
        self.keep(value, place.slot)

    def new(self, value: Value) -> Slot:
        """A slot for a value alone."""
        shape = value.shape
        slot = self.slot(value.name or "value", shape.width, shape.rows)
        self.put(value, BufferView(slot, shape.row[-1], shape.row[-1]))
        return slot

    def written(self, value: Value) -> Slot:
        """A slot for what the host writes before a pass begins: nothing else ever uses it."""
        shape = value.shape
        slot = self.fixed(value.name or "value", shape.width, shape.rows)
        self.put(value, BufferView(slot, shape.row[-1], shape.row[-1]))
        return slot

    def scratch(self, name: str, words: int, rows: str = TOKENS) -> Slot:
        """Memory whose content lasts until the same is asked for again."""
        if name not in self._scratch:
            self._scratch[name] = self.fixed(name, 0, rows)
        found = self._scratch[name]
        found.words = max(found.words, words)
        return found

    def packed(self, value: Value) -> BufferView:
        """Where a value lies in one piece; it is copied if it is torn."""
        place = self.places[value]
        return place if place.stride == place.width else self._copied(value, place.width)

    def dense(self, value: Value) -> Slot:
        """A slot that begins with a value; it is copied if its own does not."""
        place = self.packed(value)
        return self._copied(value, place.width).slot if place.at or place.behind else place.slot

    def rows(self, value: Value, width: int) -> BufferView:
        """Where rows of so many words lie, also those of a value that is torn there."""
        if self.places[value].width == width:
            return self.places[value]
        return replace(self.packed(value), width=width, stride=width)

    def _copied(self, value: Value, width: int) -> BufferView:
        slot = self.slot("copy", value.shape.width, value.shape.rows)
        self.copy(self.places[value], value.shape, slot)
        return BufferView(slot, width, width)

    def copy(self, x: BufferView, shape: Shape, y: Slot, *, select: bool = False) -> None:
        """A value of that shape copied; ``select``: its wanted rows alone."""

        def named(p: Pass) -> int:
            return self.at(p).rows + p.first + 1 if select else 0

        self.rowwise(
            "copy",
            shape,
            x.width,
            (x.slot, self.batch, y),
            lambda p: (x.width, x.first, x.stride, named(p), 0),
        )

    # Other forms of a value, each made once for all that read it one after another

    def form(self, name: str, of: object, words: int) -> Slot:
        """Where a launch leaves a form of something, which :meth:`formed` then finds."""
        self._formed[name] = of
        return self.scratch(name, words)

    def formed(self, name: str, of: object) -> Slot | None:
        """The form of something, if it was the last that was made."""
        return self._scratch[name] if self._formed.get(name) == of else None

    def acts_of(self, value: Value, width: int) -> Slot:
        """Where a launch leaves a value quantised in superblocks of rows of so many words."""
        words = ACT_WORDS * superblocks(width) * (value.shape.width // width)
        return self.form("acts", (value, width), words)

    def acts(self, value: Value, width: int) -> Slot:
        """A value quantised in superblocks of rows of so many words."""
        if found := self.formed("acts", (value, width)):
            return found
        x, acts = self.dense(value), self.acts_of(value, width)
        self.rowwise(
            "quantise_rows", value.shape, width, (x, acts), lambda _: (width,), quantise=True
        )
        return acts

    # Weights

    def matrix(self, weights: Sequence[Weight]) -> Matrix:
        """Matrices that share their input, joined along their rows; loaded once memory is there."""
        self.matrices.append(Matrix(tuple(weights)))
        return self.matrices[-1]

    def values(self, weight: Weight) -> Slot:
        """A buffer of a weight's values, for what is larger than a vector."""
        self.own[weight] = self.fixed(weight.name, prod(weight.shape))
        return self.own[weight]

    def vector(self, weight: Weight) -> int:
        """Where in ``vectors`` a vector begins."""
        if weight not in self.norms:
            self.norms[weight] = self.vectors.words
            self.vectors.words += prod(weight.shape)
        return self.norms[weight]

    def state(self, op: Op) -> Slot:
        """What an operation keeps of each sequence."""
        (shape,) = op.operation.state([v.shape for v in op.inputs], op.weights)
        self.recurrent = True
        return self.fixed(f"state of {op.kind}", shape.width, STATES)

    def rope(self, table: RopeTable) -> RopeTable:
        """A table whose rows come with each batch."""
        if table not in self.rope_tables:
            self.rope_tables.append(table)
        return table

    # Steps

    def at(self, p: Pass) -> BatchAt:
        """Where a pass's inputs are."""
        return BatchAt.of(p, self.rope_tables)

    def emit(self, steps: Launch, rows: int = 1) -> None:
        """Steps come next; ``rows``: of a token, in one dimension of their grids."""
        self.steps.append(steps)
        self.most_rows = max(self.most_rows, rows)

    def rowwise(
        self,
        kernel: str,
        shape: Shape,
        width: int,
        buffers: Sequence[Slot],
        parameters: Callable[[Pass], tuple[int, ...]],
        *,
        quantise: bool = False,
        files: Sequence[str] = (),
    ) -> None:
        """A launch over a value, a workgroup for each superblock of its rows of so many values."""
        each = shape.width // width
        files = ("reduce", "quantise", *files) if quantise else files
        planes = {"PLANES": self.planes} if quantise else {}

        def steps(p: Pass) -> Iterable[Step]:
            grid = superblocks(width), p.rows(shape) * each
            yield self.step(kernel, buffers, parameters(p), grid, files, **planes)

        self.emit(steps, each)

    def valuewise(self, op: Op, *numbers: int) -> None:
        """An operation's kernel with an invocation for each value that it gives, of as many values
        of each input; ``numbers``: its own."""
        n = min(v.shape.row[-1] for v in (*op.outputs, *op.inputs))
        self._of_rows(op, n, f"ops/{op.kind}", numbers, ())

    def gate(self, op: Op, *numbers: int) -> None:
        """The same of a gate and what it lets through, and what comes of it quantised."""
        (y,), n = op.outputs, op.outputs[0].shape.row[-1]
        self._of_rows(op, n, f"ops/{op.kind}.gate", numbers, (y,))

    def _of_rows(
        self, op: Op, n: int, kernel: str, numbers: Sequence[int], quantised: Sequence[Value]
    ) -> None:
        (y,), of = op.outputs, [self.rows(v, n) for v in op.inputs]
        buffers = [*(x.slot for x in of), self.new(y), *(self.acts_of(v, n) for v in quantised)]
        self.rowwise(
            kernel,
            y.shape,
            n,
            buffers,
            lambda _: (n, *(word for x in of for word in (x.first, x.stride)), *numbers),
            quantise=bool(quantised),
            files=("gate",) if quantised else (),
        )

    def step(
        self,
        kernel: str,
        buffers: Sequence[Any],
        parameters: Sequence[int],
        groups: Sequence[int],
        files: Sequence[str] = (),
        **constants: int,
    ) -> Step:
        """A dispatch of a kernel: a file, which stands on ``files``, and .entry if its name is not
        the file's."""
        file, _, entry = kernel.partition(".")
        entry = entry or file.rpartition("/")[2]
        made = self.device.kernel(("scalar", *files, file), entry, **constants)
        found = tuple(b.buffer if isinstance(b, Slot) else b for b in buffers)
        return Step(made, found, tuple(parameters), tuple(groups))


def anything(_: Op) -> None:
    """What an operation ``supports`` that has a kernel for all of its kind."""


def bits(value: float | np.float32) -> int:
    """A float as its bit pattern."""
    return int(np.float32(value).view(np.uint32))
