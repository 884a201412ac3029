"""The graph of a model as steps, and where its stages can be read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import CHOSEN
from isobit.backends.wgpu import fusions
from isobit.backends.wgpu import ops as ops_of_kinds
from isobit.backends.wgpu.device.gpu import Device, Step
from isobit.backends.wgpu.lowering import BufferView, Launch, Lowering, Pass
from isobit.errors import BackendUnavailable
from isobit.model.graph import Graph, Op, Value
from isobit.model.weights import Weights
from isobit.numerics.ops import LOGIT_ROWS


@dataclass(frozen=True)
class TracePoint:
    """A stage that can be read once the steps before it have run."""

    stage: str
    value: Value
    place: BufferView

    def read(self, device: Device, p: Pass) -> NDArray[np.generic]:
        """Its values in a pass."""
        shape, x = self.value.shape, self.place
        rows = p.rows(shape) * shape.width // x.width
        words = device.read(x.slot.buffer, shape.dtype, rows * x.stride, 4 * (x.first - x.at))
        value = words.reshape(rows, x.stride)[:, x.at : x.at + x.width]
        return value.reshape(p.rows(shape), *shape.row)


Lowered = list[Launch | TracePoint]


class LoweredGraph:
    """A graph lowered once: its steps for any pass."""

    def __init__(self, graph: Graph, planes: int) -> None:
        """Raises BackendUnavailable for an operation that there is no kernel for."""
        self.g = Lowering(planes)
        self._body: Lowered = []
        self._left_out: Lowered = []  # stages that only a trace needs
        self._head: Lowered = []  # some rows of logits at a time
        self._hidden_made = 0
        ops, last_use, at = graph.required.ops, graph.required.last_use, 0
        left_out: list[Op] = []
        while at < len(ops):
            taken = ops[at : at + self._lower(ops[at:])]
            at += len(taken)
            if taken[-1].outputs[0].shape.rows != LOGIT_ROWS:
                self._body += self._made(taken)
                self.g.end(last_use, at)
            else:  # runs again and again, and so overwrites nothing
                self._head += self._made(taken)
                if graph.hidden in taken[-1].outputs:
                    self._hidden_made = len(self._head)
                left_out += [op for op in taken if self.g.places.keys().isdisjoint(op.outputs)]
        while left_out:
            count = self._lower(left_out)
            self._left_out += self._made(left_out[:count])
            left_out = left_out[count:]
        self.logits = self.g.dense(graph.logits)
        self.hidden = self.g.places.get(graph.hidden) if graph.hidden else None
        """Where the rows are that logits are made of."""
        self._head += self._made(())
        chosen = [m for m in self._body if isinstance(m, TracePoint) and m.stage == CHOSEN]
        self._routes = {m: i for i, m in enumerate(chosen)}
        self.routes = self.g.scratch("routes", sum(m.value.shape.width for m in chosen))
        """Each layer's experts of all tokens, one after the other."""

    def _lower(self, ops: Sequence[Op]) -> int:
        """Lower some of the next operations; how many."""
        for claim in fusions.CLAIMS:
            if count := claim(self.g, ops):
                return count
        op = ops[0]
        if reason := _lacks(op):
            raise BackendUnavailable(reason)
        _kind(op).lower(self.g, op)
        return 1

    def _made(self, ops: Sequence[Op]) -> Lowered:
        """What the last operations became, with the stages that can be read then."""
        steps, self.g.steps = self.g.steps, []
        values = [v for op in ops for v in op.outputs if v in self.g.places]
        return [*steps, *(TracePoint(v.name, v, self.g.places[v]) for v in values if v.name)]

    def steps(self, p: Pass, *, traced: bool) -> Iterator[Step | TracePoint]:
        """Everything up to the logits; ``traced``: with stages that nothing needs."""
        for made in self._body + self._left_out if traced else self._body:
            if not isinstance(made, TracePoint):
                yield from made(p)
                continue
            yield made
            if p.routes and made in self._routes:
                x, buffers = made.place, (made.place.slot, self.g.batch, self.routes)
                at = self._routes[made] * p.tokens * x.width
                words = x.width, x.first, x.stride, 0, at
                yield self.g.step("copy", buffers, words, (1, p.tokens))

    def head(self, p: Pass) -> Iterator[Step]:
        """What is made of ``p.count`` of the wanted rows, once :meth:`steps` have run."""
        for made in self._head if p.head else self._head[: self._hidden_made]:
            if not isinstance(made, TracePoint):
                yield from made(p)


def lacks(weights: Weights) -> str | None:
    """What there is no kernel for in a model; None if there are all."""
    return next(filter(None, map(_lacks, weights.graph.required.ops)), None)


def _kind(op: Op) -> Any:
    """The file of an operation's kind; None where there is none."""
    name = f"{ops_of_kinds.__name__}.{op.kind}"
    return import_module(name) if find_spec(name) else None


def _lacks(op: Op) -> str | None:
    kind = _kind(op)
    reason = kind.supports(op) if kind else "no kernel"
    place = "" if op.layer is None else f" of layer {op.layer}"
    return reason and f"wgpu: {op.kind}{place}: {reason}; another backend may run it"
