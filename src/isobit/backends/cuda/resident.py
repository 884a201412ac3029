"""What stays on the device as long as the model: weights, KV caches, states, RoPE tables.

All programs of a model (graph.py) share it. It is made from the graph before memory is planned; the
places become addresses when the backend has allocated the regions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from isobit.backends.base.rope_rows import ROPE_STEP
from isobit.backends.cuda.device.load import DeviceWeight, Part, matrix_parts, vector_parts
from isobit.backends.cuda.device.memory import Region, aligned
from isobit.backends.cuda.device.protocol import Gpu
from isobit.model.graph import Graph, Op, Value, stateful
from isobit.numerics import KV_PAGE, RopeTable, Weight
from isobit.numerics.ops import Append, Embedding, ExpertMatMul, MatMul, Rope


@dataclass(eq=False)
class KvCache:
    """The keys and values of one layer: pages of 64 positions with every head's planes and scales
    (cache.cuh)."""

    heads: int
    head_dim: int
    address: int = 0
    pages: int = 0

    @property
    def padded(self) -> int:
        """head_dim rounded up to 16."""
        return -(-self.head_dim // 16) * 16

    def sizes(self, pages: int) -> tuple[int, int, int, int]:
        """Bytes of K, V and the scales of each."""
        vectors = pages * self.heads * KV_PAGE
        planes, scales = aligned(2 * vectors * self.padded), aligned(4 * vectors)
        return planes, planes, scales, scales

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Addresses of K, V and the scales of each."""
        k, v, dk, _ = self.sizes(self.pages)
        at = self.address
        return at, at + k, at + k + v, at + k + v + dk

    @property
    def arguments(self) -> tuple[int, ...]:
        """As kernels take it: the parts, heads, padded width."""
        return *self.parts, self.heads, self.padded


@dataclass(eq=False)
class RecurrentState:
    """What an operation keeps of each sequence: so many floats."""

    words: int
    address: int = 0


@dataclass(eq=False)
class DeviceRopeTable:
    """A RoPE table on the device: cosines, then sines, [context, size / 2] each; rows as needed."""

    table: RopeTable
    context: int
    address: int = 0
    known: int = 0

    @property
    def part(self) -> int:
        """Bytes of the cosines, or of the sines."""
        return aligned(4 * self.context * (self.table.size // 2))

    @property
    def parts(self) -> tuple[int, int]:
        """Addresses of the cosines and the sines."""
        return self.address, self.address + self.part

    def extend(self, gpu: Gpu, end: int) -> None:
        """Have rows for positions below ``end``."""
        while self.known < end:
            stop = min(self.known + ROPE_STEP, self.context)
            offset = 4 * self.known * (self.table.size // 2)
            for address, rows in zip(self.parts, self.table.rows(self.known, stop), strict=True):
                gpu.upload(address + offset, rows)
            self.known = stop


@dataclass(eq=False)
class StoredWeights:
    """A graph's weights: where they lie, and their way there."""

    region: Region = field(default_factory=Region)
    matrices: dict[str, DeviceWeight] = field(default_factory=dict)
    vectors: dict[str, int] = field(default_factory=dict)
    """Float32, at these places in the region."""
    _tensors: dict[str, Weight] = field(default_factory=dict)
    _arrived: Callable[[], None] | None = None

    @classmethod
    def of(cls, graph: Graph) -> "StoredWeights":
        """What a graph needs. Raises BackendUnavailable for a format without kernels."""
        made = cls()
        for op in graph.required.ops:
            for w in op.weights:
                made._place(op, w)
        return made

    def _place(self, op: Op, weight: Weight) -> None:
        self._tensors.setdefault(weight.name, weight)
        if isinstance(op.operation, Embedding | MatMul | ExpertMatMul):
            if weight.name not in self.matrices:
                self.matrices[weight.name] = DeviceWeight.of(weight, self.region)
        elif weight.name not in self.vectors:
            values = int(np.prod(weight.shape, dtype=np.int64))
            self.vectors[weight.name] = self.region.take(4 * values)

    def begin(self, gpu: Gpu) -> None:
        """Take the memory, and begin to bring them there."""
        self.region.address = gpu.allocate(self.region.nbytes)
        parts: list[Part] = []
        for name, weight in self._tensors.items():
            if name in self.matrices:
                parts += matrix_parts(weight, self.matrices[name])
            if name in self.vectors:
                parts += vector_parts(weight, self.region.address + self.vectors[name])
        self._arrived = gpu.bring(parts)

    def arrive(self, gpu: Gpu) -> None:
        """Have them there."""
        if self._arrived is None:
            self.begin(gpu)
        assert self._arrived is not None
        self._arrived()


@dataclass(eq=False)
class Resident:
    """Everything of one graph that stays, by what names it there."""

    context: int
    """Positions of a sequence."""
    weights: StoredWeights
    caches: dict[Value, KvCache] = field(default_factory=dict)
    states: dict[Op, RecurrentState] = field(default_factory=dict)
    rope_tables: dict[RopeTable, DeviceRopeTable] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, context: int, weights: StoredWeights) -> "Resident":
        """What a graph needs."""
        made = cls(context, weights)
        for op in graph.required.ops:
            if isinstance(op.operation, Append):
                made.caches |= dict.fromkeys(op.outputs, KvCache(*op.inputs[0].shape.row))
            if isinstance(op.operation, Rope):
                table = op.operation.table
                made.rope_tables.setdefault(table, DeviceRopeTable(table, context))
            if stateful(op):
                (shape,) = op.operation.state([v.shape for v in op.inputs], op.weights)
                made.states[op] = RecurrentState(shape.width)
        return made

    def vector(self, weight: Weight) -> int:
        """The address of a vector of the model."""
        return self.weights.region.address + self.weights.vectors[weight.name]

    def cache_bytes(self, pages: int) -> int:
        """Of all KV caches, with so many pages."""
        return sum(sum(c.sizes(pages)) for c in set(self.caches.values()))

    def state_bytes(self, sequences: int) -> int:
        """Of the states of so many sequences."""
        return sum(aligned(4 * s.words * sequences) for s in self.states.values())

    def copy_state(self, gpu: Gpu, source: int, target: int) -> None:
        """Queue a copy of a sequence's state to another's place, on the device."""
        for state in self.states.values():
            nbytes = 4 * state.words
            gpu.copy(state.address + nbytes * source, state.address + nbytes * target, nbytes)

    def rope_bytes(self) -> int:
        """Of all RoPE tables."""
        return sum(2 * t.part for t in self.rope_tables.values())

    def allocate(self, gpu: Gpu, pages: int, sequences: int) -> None:
        """Take the other memory."""
        at = gpu.allocate(self.cache_bytes(pages))
        for cache in dict.fromkeys(self.caches.values()):
            cache.address, cache.pages = at, pages
            at += sum(cache.sizes(pages))
        at = gpu.allocate(self.state_bytes(sequences))
        for state in self.states.values():
            state.address = at
            at += aligned(4 * state.words * sequences)
        at = gpu.allocate(self.rope_bytes())
        for table in self.rope_tables.values():
            table.address = at
            at += 2 * table.part
