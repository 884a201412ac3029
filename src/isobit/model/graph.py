"""The graph of a pass: what is computed from what, as data.

An architecture (``isobit.model.architectures``) writes it with a :class:`Builder`; everything that
runs, checks, sizes or names a pass reads it: the backends, ``isobit.verify``, the stages of traces.

An :class:`Op` takes and gives :class:`Value` s. A value with a name is a *stage*: what a trace
records, and what a fault is told by. Values without a name lie inside a stage.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from graphlib import TopologicalSorter
from itertools import pairwise

import numpy as np

from isobit.errors import ModelRefused
from isobit.numerics import Weight
from isobit.numerics.ops import HISTORY, LOGIT_ROWS, Arrays, Operation, SelectRows, Shape

Key = tuple[str, int | None]
"""A stage's place: its name and its layer (None outside the layers)."""


@dataclass(frozen=True, eq=False)
class Value:
    """What an operation gives: written once. ``name``: the stage it is, if it is one."""

    name: str | None
    layer: int | None
    shape: Shape

    @property
    def key(self) -> Key | None:
        """Its place, if it is a stage."""
        return None if self.name is None else (self.name, self.layer)


@dataclass(frozen=True, eq=False)
class Op:
    """One operation of the graph.

    ``on_request``: nothing needs what it gives; it runs only for a trace that names it, and a
    backend need not have it.
    """

    operation: Operation
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: tuple[Weight, ...]
    layer: int | None
    on_request: bool = False

    @property
    def kind(self) -> str:
        """The operation's kind."""
        return self.operation.kind


def zero_state(op: Op) -> Arrays:
    """What an operation keeps of a sequence, at the sequence's start."""
    shapes = op.operation.state([v.shape for v in op.inputs], op.weights)
    return tuple(np.zeros(s.row, np.float32) for s in shapes)


def stateful(op: Op) -> bool:
    """Whether an operation keeps something of a sequence besides what is appended."""
    return bool(op.operation.state([v.shape for v in op.inputs], op.weights))


@dataclass(frozen=True, eq=False)
class Stage:
    """How a stage is computed from the nearest stages before it.

    ``inputs``: stages, what ``append`` operations gave (their histories), and what the batch gives;
    ``ops``: what lies between.
    """

    value: Value
    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """All operations of a pass, in an order in which they can run."""

    tokens: Value
    """int32 [T]: the batch's token ids."""
    positions: Value
    """int32 [T]"""
    logit_rows: Value
    """int32 [R]: the tokens whose logits are wanted."""
    ops: tuple[Op, ...]
    logits: Value

    @property
    def given(self) -> tuple[Value, Value, Value]:
        """What a batch gives."""
        return self.tokens, self.positions, self.logit_rows

    @cached_property
    def stages(self) -> Mapping[Key, Stage]:
        """Every stage in graph order."""
        maker = {v: op for op in self.ops for v in op.outputs}
        found: dict[Key, Stage] = {}
        for op in self.ops:
            for value in op.outputs:
                if value.key is not None:
                    found[value.key] = _stage(value, maker, self.given)
        return found

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every stage's name once, in an order that holds in each layer."""
        chains: dict[int, list[str]] = {}
        before: list[str] = []
        behind: list[str] = []
        for name, layer in self.stages:
            if layer is not None:
                chains.setdefault(layer, []).append(name)
            else:
                (behind if chains else before).append(name)
        follows: TopologicalSorter[str] = TopologicalSorter()
        for chain in chains.values() or [[]]:
            for earlier, later in pairwise([*before, *chain, *behind]):
                follows.add(later, earlier)
            for alone in [*before, *chain, *behind][:1]:
                follows.add(alone)
        return tuple(follows.static_order())

    @cached_property
    def on_request(self) -> frozenset[str]:
        """Names of the stages that are given only when they are named."""
        return frozenset(
            v.name for op in self.ops if op.on_request for v in op.outputs if v.name is not None
        )

    @cached_property
    def required(self) -> "Graph":
        """The same graph without what runs only on request."""
        return replace(self, ops=tuple(op for op in self.ops if not op.on_request))

    @cached_property
    def last_use(self) -> Mapping[Value, int]:
        """The place in ``ops`` of the last operation that reads a value."""
        return {v: i for i, op in enumerate(self.ops) for v in op.inputs}

    @cached_property
    def hidden(self) -> Value | None:
        """The wanted rows of the model's state, which the output product reads; None of a graph
        that ends with them, as one of a pipeline's stages, or has none."""
        chosen = [op.outputs[0] for op in self.ops if isinstance(op.operation, SelectRows)]
        return chosen[-1] if chosen and chosen[-1] is not self.logits else None

    @cached_property
    def recurrent(self) -> bool:
        """Whether it keeps states of a sequence that cannot be taken back, besides pages."""
        return any(map(stateful, self.ops))

    def layer(self, index: int | None) -> tuple[Op, ...]:
        """The operations of one layer, or of what stands outside the layers."""
        return tuple(op for op in self.ops if op.layer == index)

    @cached_property
    def n_layers(self) -> int:
        """How many layers it has."""
        return 1 + max((op.layer for op in self.ops if op.layer is not None), default=-1)

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """Every tensor it reads, by name."""
        return {w.name: w for op in self.ops for w in op.weights}

    def showing(self, keys: Collection[Key]) -> "Graph":
        """The same pass with these stages alone: the others lie inside those that follow."""
        if all(key in keys for key in self.stages):
            return self
        hidden = {
            v: replace(v, name=None)
            for op in self.ops
            for v in op.outputs
            if v.key is not None and v.key not in keys
        }

        def shown(values: tuple[Value, ...]) -> tuple[Value, ...]:
            return tuple(hidden.get(v, v) for v in values)

        ops = tuple(
            replace(op, inputs=shown(op.inputs), outputs=shown(op.outputs)) for op in self.ops
        )
        return replace(self, ops=ops, logits=hidden.get(self.logits, self.logits))

    def with_weights(self, changed: Mapping[str, Weight]) -> "Graph":
        """The same graph with other tensors in the place of some, by name."""
        ops = tuple(
            replace(op, weights=tuple(changed.get(w.name, w) for w in op.weights))
            for op in self.ops
        )
        return replace(self, ops=ops)


def match(
    ops: Sequence[Op], pattern: Sequence[str], inner: Collection[str] = ()
) -> Mapping[str, Value] | None:
    """Whether ops begin with a pattern, and what its names stand for.

    Each line of the pattern is one operation, such as ``gate = matmul x``: what it gives, its kind,
    what it takes. The same name stands for the same value; other names may do so, too. ``inner``:
    names of what no later operation reads.
    """
    if len(ops) < len(pattern) or _line(pattern[0])[0] != ops[0].kind:  # nearly always
        return None
    found: dict[str, Value] = {}
    for op, line in zip(ops, pattern, strict=False):
        kind, names = _line(line)
        if kind != op.kind:
            return None
        values = *op.outputs, *op.inputs
        if len(names) != len(values):
            return None
        if any(found.setdefault(n, v) is not v for n, v in zip(names, values, strict=True)):
            return None
    read = {v for op in ops[len(pattern) :] for v in op.inputs} if inner else set()
    return None if any(found.get(name) in read for name in inner) else found


@cache
def _line(line: str) -> tuple[str, tuple[str, ...]]:
    """A line of a pattern: the kind, and the names of what the operation gives and takes."""
    given, _, taken = line.partition(" = ")
    kind, *inputs = taken.split()
    return kind, (*given.split(), *inputs)


def _stage(value: Value, maker: Mapping[Value, Op], given: Sequence[Value]) -> Stage:
    inputs: list[Value] = []
    ops: list[Op] = []

    def visit(op: Op) -> None:
        for v in op.inputs:
            if v in given or v.name is not None or v.shape.rows == HISTORY:
                if v not in inputs:
                    inputs.append(v)
            elif maker[v] not in ops:
                visit(maker[v])
        ops.append(op)

    visit(maker[value])
    return Stage(value, tuple(inputs), tuple(ops))


@dataclass
class Builder:
    """Writes a graph operation by operation, and checks that they fit together.

    ``source`` names the model in refusals.
    """

    source: str
    tokens: Value = field(default_factory=lambda: _given(Shape((), dtype=np.int32)))
    positions: Value = field(default_factory=lambda: _given(Shape((), dtype=np.int32)))
    logit_rows: Value = field(default_factory=lambda: _given(Shape((), LOGIT_ROWS, dtype=np.int32)))
    _ops: list[Op] = field(default_factory=list)
    _layer: int | None = None

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """What is added inside belongs to this layer."""
        self._layer = index
        yield
        self._layer = None

    def add(
        self,
        names: str | tuple[str | None, ...] | None,
        operation: Operation,
        *inputs: Value,
        weights: Sequence[Weight] = (),
        on_request: bool = False,
    ) -> tuple[Value, ...]:
        """An operation; ``names`` of what it gives make stages of them. Returns what it gives.

        Raises ModelRefused where shapes do not fit together.
        """
        try:
            shapes = operation.shapes([v.shape for v in inputs], weights)
        except ValueError as error:
            place = "" if self._layer is None else f" of layer {self._layer}"
            raise ModelRefused(f"{self.source}: {operation.kind}{place}: {error}") from None
        each = names if isinstance(names, tuple) else (names,) * len(shapes)
        outputs = tuple(
            Value(name, self._layer, shape) for name, shape in zip(each, shapes, strict=True)
        )
        op = Op(operation, inputs, outputs, tuple(weights), self._layer, on_request)
        self._ops.append(op)
        return outputs

    def one(
        self,
        name: str | None,
        operation: Operation,
        *inputs: Value,
        weights: Sequence[Weight] = (),
        on_request: bool = False,
    ) -> Value:
        """:meth:`add` of an operation that gives one value."""
        (value,) = self.add(name, operation, *inputs, weights=weights, on_request=on_request)
        return value

    def graph(self, logits: Value) -> Graph:
        """All that was added. Raises ModelRefused if something is read that nothing gives, or a
        name is given twice."""
        known = {self.tokens, self.positions, self.logit_rows}
        keys: set[Key] = set()
        for op in self._ops:
            assert known.issuperset(op.inputs), f"{op.kind}: reads what is not there yet"
            known.update(op.outputs)
            for v in op.outputs:
                assert v.key is None or v.key not in keys, f"two stages named {v.key}"
                keys |= {v.key} if v.key is not None else set()
        return Graph(self.tokens, self.positions, self.logit_rows, tuple(self._ops), logits)


def _given(shape: Shape) -> Value:
    return Value(None, None, shape)
