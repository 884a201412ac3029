"""A graph split over several parts: processes, devices, machines. A pass from graph to graph.

Each part has the rows of some weight matrices, which make some columns of their product, and some
key-value heads with their query heads and their cache. Where an operation needs a whole value, a
``gather`` puts it together from all parts. What is not split, every part does for itself. A column
of a product is added up as before, whichever part does it, and so is a head: no cut changes a bit.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd

import numpy as np

from isobit.errors import UsageError
from isobit.model.graph import Builder, Graph, Key, Op, Value
from isobit.numerics import Weight
from isobit.numerics.ops import (
    Append,
    Array,
    Attention,
    AttentionScores,
    AttentionSoftmax,
    Bias,
    Combine,
    ExpertMatMul,
    Gather,
    Heads,
    MatMul,
    Operation,
    SigmoidGate,
    SiluGate,
    TopK,
)
from isobit.numerics.ops.gather import Ranges, together

_STEP = 64
"""Columns of a product are shared out in so many, where their number allows it."""


@dataclass(frozen=True)
class Cut:
    """What each part has of a value: which columns of its last axis, or which head vectors."""

    parts: tuple[Ranges, ...]
    heads: bool = False

    def columns(self, size: int) -> "Cut":
        """The cut of head vectors as that of the columns in which they lie, side by side."""
        return Cut(tuple(tuple((a * size, b * size) for a, b in part) for part in self.parts))


@dataclass(frozen=True)
class Part:
    """One part of a model: its graph, and of which stages it has only some columns or heads."""

    graph: Graph
    cuts: Mapping[Key, Cut]

    def merged(self, key: Key, pieces: Sequence[Array]) -> Array:
        """A stage [T, …] from every part's."""
        cut = self.cuts.get(key)
        if cut is None:
            return pieces[0]
        return together(cut.parts, pieces, axis=1 if cut.heads else -1)


def split(graph: Graph, rank: int, parts: int, source: str = "model") -> Part:
    """One of ``parts`` parts.

    Its tensors are views of the model's, but for experts and biases, whose parts are copied.
    ``source`` names the model in refusals. Raises UsageError for more parts than query heads.
    """
    if parts < 1 or not 0 <= rank < parts:
        raise UsageError(f"part: expected one of {max(parts, 1)} parts, got number {rank}")
    if parts == 1:
        return Part(graph, {})
    one = _Split(graph, rank, parts, source)
    made = one.graph()
    return Part(made, {v.key: cut for v, cut in one.cuts.items() if v.key and cut})


class _Split:
    def __init__(self, graph: Graph, rank: int, parts: int, source: str) -> None:
        self.whole, self.rank, self.parts = graph, rank, parts
        self.g = Builder(source)
        self.cuts: dict[Value, Cut | None] = dict.fromkeys(graph.given)
        given = (self.g.tokens, self.g.positions, self.g.logit_rows)
        self.here: dict[Value, Value] = dict(zip(graph.given, given, strict=True))
        self.gathered: dict[Value, Value] = {}
        self.readers: dict[Value, list[Op]] = {}
        for op in graph.ops:
            for v in op.inputs:
                self.readers.setdefault(v, []).append(op)
        self.counts = {op.layer: _head_counts(op) for op in graph.ops if op.kind == "attention"}

    def graph(self) -> Graph:
        for op in self.whole.ops:
            if op.layer is None:
                self._op(op)
            else:
                with self.g.layer(op.layer):
                    self._op(op)
        return self.g.graph(self._needed(self.whole.logits))

    def _op(self, op: Op) -> None:
        rule = _RULES.get(type(op.operation))
        cuts = {self.cuts[v] for v in op.inputs if v.shape.row}
        same = cuts.pop() if len(cuts) == 1 else None
        if rule and rule(self, op, same):
            return
        if same and same.heads and op.operation.per_vector:
            self._give(op, same)
        else:
            self._give(op, None, inputs=[self._needed(v) for v in op.inputs])

    def _give(
        self,
        op: Op,
        cut: Cut | None,
        *,
        operation: Operation | None = None,
        inputs: Sequence[Value] | None = None,
        weights: Sequence[Weight] | None = None,
    ) -> bool:
        """The operation on this part, in the place of that of the whole graph: as it is there, but
        for what is given."""
        made = self.g.add(
            tuple(v.name for v in op.outputs),
            operation or op.operation,
            *([self.here[v] for v in op.inputs] if inputs is None else inputs),
            weights=op.weights if weights is None else weights,
            on_request=op.on_request,
        )
        self.here |= dict(zip(op.outputs, made, strict=True))
        self.cuts |= dict.fromkeys(op.outputs, cut)
        return True

    def _needed(self, value: Value) -> Value:
        """A value, whole."""
        cut = self.cuts[value]
        if cut is None:
            return self.here[value]
        if value not in self.gathered:
            assert not cut.heads, "head vectors are read by what works head by head"
            gather = Gather(cut.parts, self.rank)
            self.gathered[value] = self.g.one(None, gather, self.here[value])
        return self.gathered[value]

    # Rules: each says whether it did the operation on parts.

    def _matmul(self, op: Op, _: Cut | None) -> bool:
        (y,) = op.outputs
        views = self._views(y)
        if views:
            cut = self._cut_of_views(views)
        elif any(isinstance(r.operation, TopK) for r in self.readers.get(y, ())):
            return False  # every part chooses the experts; the router is small
        elif y.shape.width < self.parts:
            return False
        else:
            cut = Cut(_shares(y.shape.width, self.parts))
        weights, at = [], 0
        for w in op.weights:
            for first, end in cut.parts[self.rank]:
                a, b = max(first - at, 0), min(end - at, w.shape[0])
                if a < b:
                    weights.append(w.rows(a, b))
            at += w.shape[0]
        return self._give(op, cut, inputs=[self._needed(op.inputs[0])], weights=weights)

    def _expert_matmul(self, op: Op, _: Cut | None) -> bool:
        (w,) = op.weights
        if w.shape[1] < self.parts:
            return False
        cut = Cut(_shares(w.shape[1], self.parts))
        ((first, end),) = cut.parts[self.rank]
        stack = w.data.reshape(w.shape[0], w.shape[1], w.row_bytes)[:, first:end]
        shape = (w.shape[0], end - first, w.shape[2])
        here = Weight(f"{w.name}[:, {first}:{end}]", w.format, shape, stack.reshape(-1))
        return self._give(op, cut, inputs=[self._needed(v) for v in op.inputs], weights=[here])

    def _heads(self, op: Op, cut: Cut | None) -> bool:
        view = op.operation
        assert isinstance(view, Heads)
        if cut is None or op not in self._views(op.inputs[0]):
            return False
        mine = self._heads_of(op)
        ((begin, end),) = mine.parts[self.rank]
        at = view.first + begin * view.step
        before = sum(max(0, min(b, at) - a) for a, b in cut.parts[self.rank])
        here = replace(view, first=before, count=end - begin)
        return self._give(op, mine, operation=here)

    def _columnwise(self, op: Op, cut: Cut | None) -> bool:
        if cut is None:
            return False
        weights = [_columns(w, cut.parts[self.rank]) for w in op.weights]
        return self._give(op, cut, weights=weights)

    def _attention(self, op: Op, _: Cut | None) -> bool:
        q = self.cuts[op.inputs[0]]
        if q is None:
            return False
        gives_columns = isinstance(op.operation, Attention)
        sinks = [_columns(w, q.parts[self.rank]) for w in op.weights]
        cut = q.columns(op.inputs[0].shape.row[1]) if gives_columns else q
        return self._give(op, cut, weights=sinks)

    def _sigmoid_gate(self, op: Op, _: Cut | None) -> bool:
        x, gate = (self.cuts[v] for v in op.inputs)
        if x is None or gate is None or gate.columns(op.inputs[1].shape.row[-1]) != x:
            return False
        return self._give(op, x)

    def _combine(self, op: Op, _: Cut | None) -> bool:
        weights, y = op.inputs
        return self.cuts[y] is not None and self._give(
            op, self.cuts[y], inputs=[self._needed(weights), self.here[y]]
        )

    # The heads of a layer's attention

    def _views(self, product: Value) -> list[Op]:
        """The head vectors that a product is read as, if attention's are all that it is read as."""
        readers = self.readers.get(product, [])
        if [op.kind for op in readers] == ["bias"]:
            return self._views(readers[0].outputs[0])
        counts = self.counts.get(product.layer, ())
        views = [
            op for op in readers if op.kind == "heads" and op.outputs[0].shape.row[0] in counts
        ]
        return views if len(views) == len(readers) else []

    def _heads_of(self, view: Op) -> Cut:
        """Which of the head vectors each part has.

        It has whole key-value heads with all their query heads; where there are more parts than
        key-value heads, several parts have the same one, and each some of its query heads.
        """
        queries, keys = self.counts[view.layer]
        group, parts = queries // keys, self.parts
        if -(-parts // keys) > group:
            raise UsageError(f"parts: expected at most {queries}, one a query head, got {parts}")
        of_keys, of_queries = [], []
        for r in range(parts):
            first = r * keys // parts
            end = max((r + 1) * keys // parts, first + 1)
            sharing = [s for s in range(parts) if s * keys // parts == first]
            a, b = first * group, end * group
            if parts > keys:
                j, n = sharing.index(r), len(sharing)
                a, b = a + j * group // n, a + (j + 1) * group // n
            of_keys.append(((first, end),))
            of_queries.append(((a, b),))
        count = view.outputs[0].shape.row[0]
        return Cut(tuple(of_queries if count == queries else of_keys), heads=True)

    def _cut_of_views(self, views: Sequence[Op]) -> Cut:
        """Which columns of a product each part has, given how they are read as head vectors."""
        parts = []
        for r in range(self.parts):
            ranges = []
            for op in views:
                view = op.operation
                assert isinstance(view, Heads)
                ((begin, end),) = self._heads_of(op).parts[r]
                starts = (view.first + i * view.step for i in range(begin, end))
                ranges += [(at, at + view.size) for at in starts]
            parts.append(_merged(ranges))
        return Cut(tuple(parts))


_RULES: Mapping[type[Operation], Callable[[_Split, Op, Cut | None], bool]] = {
    MatMul: _Split._matmul,
    ExpertMatMul: _Split._expert_matmul,
    Heads: _Split._heads,
    SiluGate: _Split._columnwise,
    Bias: _Split._columnwise,
    Combine: _Split._combine,
    Append: lambda s, op, cut: cut is not None and s._give(op, cut),
    Attention: _Split._attention,
    AttentionScores: _Split._attention,
    AttentionSoftmax: _Split._attention,
    SigmoidGate: _Split._sigmoid_gate,
}


def _head_counts(attention: Op) -> tuple[int, int]:
    q, keys = attention.inputs[:2]
    return q.shape.row[0], keys.shape.row[0]


def _shares(total: int, parts: int) -> tuple[Ranges, ...]:
    """Columns shared out in steps of a power of two, about evenly."""
    step = gcd(total, _STEP)
    while step > 1 and total // step < 4 * parts:
        step //= 2
    steps = total // step
    bounds = [steps * r // parts * step for r in range(parts + 1)]
    return tuple(((a, b),) for a, b in itertools.pairwise(bounds))


def _merged(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Ranges in ascending order, neighbours joined."""
    out: list[tuple[int, int]] = []
    for first, end in sorted(set(ranges)):
        if out and out[-1][1] == first:
            out[-1] = out[-1][0], end
        else:
            out.append((first, end))
    return tuple(out)


def _columns(w: Weight, ranges: Ranges) -> Weight:
    """Some values of a vector."""
    values = w.data.reshape(w.shape[0], -1)
    data = np.concatenate([values[a:b] for a, b in ranges])
    name = ",".join(f"{a}:{b}" for a, b in ranges)
    return Weight(f"{w.name}[{name}]", w.format, (len(data),), data.reshape(-1))
