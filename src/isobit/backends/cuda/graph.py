"""The graph of a model as launches, and where its stages can be read."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any

from isobit.backends.cuda import fusions
from isobit.backends.cuda import ops as ops_of_kinds
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.lowering import Launch, Lowering
from isobit.backends.cuda.ops.gather import numbering
from isobit.backends.cuda.resident import Resident
from isobit.backends.cuda.workspace import Pass, TracePoint
from isobit.errors import BackendUnavailable
from isobit.model.graph import Graph, Key, Op
from isobit.model.weights import Weights
from isobit.numerics.ops import LOGIT_ROWS


class Program:
    """A graph lowered once, for passes of one kind."""

    def __init__(
        self,
        graph: Graph,
        resident: Resident,
        gpu: Gpu,
        planes: int,
        kind: str,
        *,
        fused: bool = True,
        rows: int = 1,
    ) -> None:
        """Raises BackendUnavailable for an operation that there is no kernel for."""
        self.g = g = Lowering(graph, resident, gpu, planes, kind, rows)
        self._body: list[Launch | TracePoint] = []
        self._head: list[Launch | TracePoint] = []  # some rows of logits at a time
        self._hidden_made = 0
        ops, last_use, at = graph.required.ops, graph.required.last_use, 0
        claimed = fusions.claims(g, ops, fusions.CLAIMS[kind] if fused else ())
        while at < len(ops):
            if at in claimed:
                count, lower = claimed[at]
                lower()
            else:
                count = 1
                self._lower(ops[at])
            taken, at = ops[at : at + count], at + count
            if taken[-1].outputs[0].shape.rows != LOGIT_ROWS:
                self._body += self._made()
                g.end(last_use, at)
            else:  # runs again and again, and so overwrites nothing
                self._head += self._made()
                if graph.hidden in taken[-1].outputs:
                    self._hidden_made = len(self._head)
        self.logits, self.vocabulary = g.dense(graph.logits), graph.logits.shape.width
        self.hidden = g.places.get(graph.hidden) if graph.hidden else None
        """Where the rows are that logits were made of, unless they lie inside of a launch."""
        self._head += self._made()
        for of, inboxes in g.exchanges.items():
            (self._head if of == LOGIT_ROWS else self._body).insert(0, numbering(g, inboxes))
            self._hidden_made += of == LOGIT_ROWS
        self._lasting: dict[frozenset[Key], Sequence[TracePoint]] = {}  # asked for with each step

    def _lower(self, op: Op) -> None:
        """Lower one operation by itself."""
        if reason := _lacks(op):
            raise BackendUnavailable(reason)
        _file_of(op.kind).lower(self.g, op)

    def _made(self) -> Sequence[Launch | TracePoint]:
        made, self.g.made = self.g.made, []
        return made

    @property
    def makes(self) -> int:
        """How many operations, or fusions of them, launch something."""
        return sum(not isinstance(made, TracePoint) for made in (*self._body, *self._head))

    @cached_property
    def marks(self) -> Mapping[Key, TracePoint]:
        """The stages that can be read."""
        marks = (made for made in (*self._body, *self._head) if isinstance(made, TracePoint))
        return {mark.value.key: mark for mark in marks if mark.value.key is not None}

    def lasting(self, keys: frozenset[Key]) -> Sequence[TracePoint]:
        """These stages in graph order, if all of them can be read at the end of a pass."""
        if (found := self._lasting.get(keys)) is None:
            marks = [mark for key, mark in self.marks.items() if key in keys]
            found = self._lasting[keys] = marks if all(mark.lasting for mark in marks) else ()
        return found

    def body(self, p: Pass) -> Iterator[TracePoint]:
        """Queue everything up to the logits; stops at each stage that can be read."""
        return _queue(self._body, p)

    def head(self, p: Pass) -> Iterator[TracePoint]:
        """Queue the logits of ``p.count`` of the wanted rows, once :meth:`body` is through."""
        return _queue(self._head, p)

    def state(self, p: Pass) -> Iterator[TracePoint]:
        """The same as far as the rows that logits are made of."""
        return _queue(self._head[: self._hidden_made], p)

    def queue(self, p: Pass) -> None:
        """Queue all of it."""
        for _ in chain(self.body(p), self.head(p)):
            pass


def lacks(weights: Weights) -> str | None:
    """What there is no kernel for in a model; None if there are all."""
    return next(filter(None, map(_lacks, weights.graph.required.ops)), None)


@cache
def _file_of(kind: str) -> Any:
    """The file of a kind of operation; None where there is none."""
    name = f"{ops_of_kinds.__name__}.{kind}"
    return import_module(name) if find_spec(name) else None


def _lacks(op: Op) -> str | None:
    kind = _file_of(op.kind)
    reason = kind.supports(op) if kind else "no kernel"
    place = "" if op.layer is None else f" of layer {op.layer}"
    return reason and f"cuda: {op.kind}{place}: {reason}; another backend may run it"


def _queue(parts: Sequence[Launch | TracePoint], p: Pass) -> Iterator[TracePoint]:
    for made in parts:
        if isinstance(made, TracePoint):
            yield made
        else:
            made(p)
