"""The reference backend: the graph of a model, operation by operation, as specified."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from isobit.backends.base import F32, Backend, Batch, Results, Tap, Wanted
from isobit.backends.reference.cache import Pages, sequences
from isobit.config import EngineConfig
from isobit.model.graph import Op, Value, zero_state
from isobit.model.weights import Weights
from isobit.numerics.ops import HISTORY, Append, Array, Arrays, Context, Exchange

Compute = Callable[[Op, Sequence[Array]], Arrays]
"""What an operation gives for its inputs."""
Hook = Callable[[Op, Sequence[Array], Compute], Arrays]
"""In the place of an operation: it gets the operation, its inputs, and how it is computed."""


class ReferenceBackend(Backend):
    """Runs docs/numerics.md with ``isobit.numerics``: slow, readable, the definition.

    ``hook`` stands in for operations, which makes a backend with a fault of it.
    ``exchange``: of one part of a split model (see :class:`isobit.numerics.ops.Gather`).
    """

    name = "reference"
    on_host = yardstick = reads_file = survives_fork = True
    copies_states = True

    def __init__(
        self,
        weights: Weights,
        engine: EngineConfig,
        hook: Hook | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__(weights, engine)
        self._context = Context(engine.planes, exchange)
        self._hook = hook
        self._states: dict[tuple[Op, int], Arrays] = {}
        self._pages = {
            op: Pages([v.shape for v in op.outputs])
            for op in self.graph.ops
            if isinstance(op.operation, Append)
        }

    @property
    def device(self) -> str:
        """The device in words."""
        return f"NumPy {np.__version__}"

    def copy_state(self, source: int, target: int) -> None:
        """See :class:`isobit.backends.base.Backend`."""
        for op in {op for op, place in self._states if place == source}:
            self._states[op, target] = self._states[op, source]

    def close(self) -> None:
        """Forget what was stored, unpacked weights too."""
        self._pages, self._states = {}, {}
        self._context = Context(self._context.planes)

    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """See :class:`isobit.backends.base.Backend`."""
        return self._walk(batch, tap, stages)[self.graph.logits]

    def compute(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        """See :class:`isobit.backends.base.Backend`."""
        if not wanted.hidden:
            return super().compute(batch, wanted, tap, stages)
        values = self._walk(batch, tap, stages)
        logits = None if wanted.only_hidden else values[self.graph.logits]
        return self._measured(logits, wanted, values[self.graph.hidden])

    @np.errstate(all="ignore")  # damaged weights overflow; who asked gets the logits to judge
    def _walk(
        self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None
    ) -> dict[Value | None, Array]:
        """The graph's logits, and its hidden rows if it has some."""
        graph = self.graph
        wanted = frozenset(graph.names) - graph.on_request if stages is None else stages
        extra = tap is not None and not graph.on_request.isdisjoint(wanted)

        def compute(op: Op, inputs: Sequence[Array]) -> Arrays:
            return self._compute(op, inputs, batch)

        self._context.received = batch.received
        given = (batch.tokens, batch.positions, batch.logit_rows)
        values: dict[Value | None, Array] = dict(zip(graph.given, given, strict=True))
        for i, op in enumerate(graph.ops):
            if op.on_request and not extra:
                continue
            inputs = [values[v] for v in op.inputs]
            made = self._hook(op, inputs, compute) if self._hook else compute(op, inputs)
            for value, array in zip(op.outputs, made, strict=True):
                values[value] = array
                if tap is not None and value.name in wanted:
                    tap(value.name, value.layer, array)
            for v in op.inputs:
                if graph.last_use[v] == i and v is not graph.hidden:
                    values.pop(v, None)
        return values

    def _compute(self, op: Op, inputs: Sequence[Array], batch: Batch) -> Arrays:
        if not op.operation.per_sequence:
            return op.operation.specification(self._context, op.weights, *inputs)
        if op in self._pages:
            pages = self._pages[op]
            pages.append(batch, inputs)
            read = [
                pages.read(batch, s, int(batch.positions[rows].max()) + 1)
                for s, rows in sequences(batch)
            ]
            return tuple(_listed(parts) for parts in zip(*read, strict=True))
        parts = []
        for i, (s, rows) in enumerate(sequences(batch)):
            own = [
                x[i] if v.shape.rows == HISTORY else x[rows]
                for v, x in zip(op.inputs, inputs, strict=True)
            ]
            place = op, s if batch.states is None else int(batch.states[s])
            if batch.positions[rows[0]] == 0:
                self._states[place] = zero_state(op)
            state = self._states.get(place, ())
            made = op.operation.specification(self._context, op.weights, *own, *state)
            self._states[place] = made[len(op.outputs) :]
            parts.append((rows, made))
        return tuple(
            _rows_together([(rows, made[o]) for rows, made in parts])
            for o in range(len(op.outputs))
        )


def _listed(parts: Sequence[Array]) -> Array:
    """Arrays of different lengths as one of objects."""
    out = np.empty(len(parts), object)
    out[:] = parts
    return out


def _rows_together(parts: Sequence[tuple[Array, Array]]) -> Array:
    """Rows of several sequences in their places; the last axis, where it differs, filled with 0."""
    shapes = [value.shape[1:] for _, value in parts]
    shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    out = np.zeros((sum(len(rows) for rows, _ in parts), *shape), parts[0][1].dtype)
    for rows, value in parts:
        place: tuple[Any, ...] = (rows, *map(slice, value.shape[1:]))
        out[place] = value
    return out
