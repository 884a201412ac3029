"""A graph split over several parts: processes, devices, machines. A pass from graph to graph.

Each part has the rows of some weight matrices, which make some columns of their product, some
key-value heads with their query heads and their cache, and some key heads of a delta net with their
value heads and their state; of experts, some columns of each, or some of them whole. Where an
operation needs a whole value, a gather puts it together from all parts. What is not split, every
part does for itself. A column of a product is added up as before, whichever part does it, and so
are a head and an expert's output: no cut changes a bit.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from isobit.errors import UsageError
from isobit.model.graph import Builder, Graph, Op, Value
from isobit.model.parallel.cuts import (
    Cut,
    Part,
    before,
    bounds,
    columns_of,
    has,
    merged,
    shared_out,
    united,
)
from isobit.model.parallel.head_cuts import HeadCuts, head_counts
from isobit.numerics import Weight
from isobit.numerics.ops import (
    Append,
    Attention,
    AttentionScores,
    AttentionSoftmax,
    Bias,
    CausalConv,
    Columns,
    Combine,
    Decay,
    ExpertBias,
    ExpertMatMul,
    ExpertScale,
    GatedDelta,
    Gather,
    GatherExperts,
    GeluGate,
    Heads,
    Join,
    MatMul,
    Operation,
    Sigmoid,
    SigmoidGate,
    Silu,
    SiluGate,
    TopK,
)


def split(
    graph: Graph,
    rank: int,
    parts: int,
    source: str = "model",
    expert_shares: Sequence[int] = (),
    shares: Sequence[int] = (),
) -> Part:
    """One of ``parts`` parts.

    expert_shares: whole experts on each part, in these proportions; none: some columns of every
    expert. shares: heads and columns of each part, about in these proportions; none: evenly.

    Its tensors are views of the model's, but for biases, whose parts are copied.
    ``source`` names the model in refusals. Raises UsageError for more parts than query heads.
    """
    if parts < 1 or not 0 <= rank < parts:
        raise UsageError(f"part: expected one of {max(parts, 1)} parts, got number {rank}")
    for name, given in (("expert_shares", expert_shares), ("shares", shares)):
        if given and (len(given) != parts or min(given) < 1):
            raise UsageError(f"{name}: expected {parts} numbers >= 1, got {list(given)}")
    if parts == 1:
        return Part(graph, {})
    check(graph, parts, expert_shares)
    one = _Split(graph, rank, source, expert_shares, shares or (1,) * parts)
    made = one.graph()
    return Part(made, {v.key: cut for v, cut in one.cuts.items() if v.key and cut})


def check(graph: Graph, parts: int, expert_shares: Sequence[int] = ()) -> None:
    """What :func:`split` refuses, before any work: UsageError."""
    for op in graph.ops:
        if op.kind == "attention":
            queries, keys = head_counts(op)
            if -(-parts // keys) > queries // keys:
                raise UsageError(
                    f"parts: expected at most {queries}, one a query head, got {parts}"
                )
        elif isinstance(op.operation, ExpertMatMul) and len(expert_shares) > op.weights[0].shape[0]:
            raise UsageError(
                f"expert_shares: expected at most {op.weights[0].shape[0]}, one an expert, got "
                f"{len(expert_shares)}"
            )


class _Split:
    def __init__(
        self,
        graph: Graph,
        rank: int,
        source: str,
        expert_shares: Sequence[int],
        shares: Sequence[int],
    ) -> None:
        self.whole, self.rank, self.parts = graph, rank, len(shares)
        self.expert_shares, self.shares = expert_shares, shares
        self.g = Builder(source)
        self.cuts: dict[Value, Cut | None] = dict.fromkeys(graph.given)
        given = (self.g.tokens, self.g.positions, self.g.logit_rows)
        self.here: dict[Value, Value] = dict(zip(graph.given, given, strict=True))
        self.gathered: dict[Value, Value] = {}
        self.heads = HeadCuts(graph, shares)

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
        if same and (same.heads or same.ids) and op.operation.per_vector:
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
            if cut.ids is not None:
                ids, of = self.here[cut.ids], GatherExperts(cut.bounds, self.rank)
                self.gathered[value] = self.g.one(None, of, self.here[value], ids)
            else:
                gather = Gather(cut.parts, self.rank)
                self.gathered[value] = self.g.one(None, gather, self.here[value])
        return self.gathered[value]

    # Rules: each says whether it did the operation on parts.

    def _matmul(self, op: Op, _: Cut | None) -> bool:
        (y,) = op.outputs
        views = self.heads.views(y)
        if views:
            cut = self.heads.cut_of(views)
        elif y in self.heads.wanted:
            cut = united(self.heads.wanted[y])
        elif self._chooses(y):
            return False  # every part chooses the experts; the router is small
        elif y.shape.width < self.parts:
            return False
        else:
            cut = Cut(shared_out(y.shape.width, self.shares))
        weights, at = [], 0
        for w in op.weights:
            for first, end in cut.parts[self.rank]:
                a, b = max(first - at, 0), min(end - at, w.shape[0])
                if a < b:
                    weights.append(w.rows(a, b))
            at += w.shape[0]
        return self._give(op, cut, inputs=[self._needed(op.inputs[0])], weights=weights)

    def _chooses(self, value: Value) -> bool:
        """Whether it says which experts are chosen."""
        return any(
            isinstance(r.operation, TopK)
            or (isinstance(r.operation, Bias | Sigmoid) and self._chooses(r.outputs[0]))
            for r in self.heads.readers.get(value, ())
        )

    def _expert_matmul(self, op: Op, _: Cut | None) -> bool:
        (w,) = op.weights
        if self.expert_shares:
            return self._whole_experts(op, w)
        if w.shape[1] < self.parts:
            return False
        cut = Cut(shared_out(w.shape[1], self.shares))
        ((first, end),) = cut.parts[self.rank]
        stack = w.data.reshape(w.shape[0], w.shape[1], w.row_bytes)[:, first:end]
        shape = (w.shape[0], end - first, w.shape[2])
        here = Weight(f"{w.name}[:, {first}:{end}]", w.format, shape, stack.reshape(shape[0], -1))
        return self._give(op, cut, inputs=[self._needed(v) for v in op.inputs], weights=[here])

    def _whole_experts(self, op: Op, w: Weight) -> bool:
        x, ids = op.inputs
        parts = list(itertools.pairwise(bounds(w.shape[0], self.expert_shares)))
        cut = Cut(tuple((part,) for part in parts), ids=ids)
        first, end = part = parts[self.rank]
        size = w.shape[1] * w.row_bytes
        data = w.data.reshape(-1)[first * size : end * size]
        here = Weight(f"{w.name}[{first}:{end}]", w.format, (end - first, *w.shape[1:]), data)
        rows = self.here[x] if self.cuts[x] == cut else self._needed(x)
        inputs = [rows, self._needed(ids)]
        return self._give(op, cut, operation=ExpertMatMul(part), inputs=inputs, weights=[here])

    def _by_expert(self, op: Op, _: Cut | None) -> bool:
        cut = self.cuts[op.inputs[0]]
        return bool(cut and cut.ids) and self._give(op, cut)

    def _heads(self, op: Op, cut: Cut | None) -> bool:
        view = op.operation
        assert isinstance(view, Heads)
        if cut is None or not (op in self.heads.views(op.inputs[0]) or self.heads.within_delta(op)):
            return False
        starts = [view.first + i * view.step for i in range(view.count)]
        each = [[at for at in starts if has(part, at, at + view.size)] for part in cut.parts]
        mine = Cut(
            tuple(merged([(starts.index(a), starts.index(a) + 1) for a in has]) for has in each),
            heads=True,
        )
        at = [before(cut.parts[self.rank], a) for a in each[self.rank]]
        here = replace(view, first=at[0], count=len(at))
        if len(at) > 1 and view.step != at[1] - at[0]:
            here = replace(here, stride=at[1] - at[0])
        return self._give(op, mine, operation=here)

    def _columns_of(self, op: Op, cut: Cut | None) -> bool:
        view = op.operation
        assert isinstance(view, Columns)
        whole = (view.first, view.width) == (0, op.inputs[0].shape.width)
        if cut is None or not ((whole and cut.heads) or self.heads.within_delta(op)):
            return False
        if cut.heads:
            cut = cut.columns(op.inputs[0].shape.row[-1])
        end = view.first + view.width
        mine = Cut(
            tuple(
                tuple(
                    (max(a, view.first) - view.first, min(b, end) - view.first)
                    for a, b in part
                    if max(a, view.first) < min(b, end)
                )
                for part in cut.parts
            )
        )
        first, after = (before(cut.parts[self.rank], at) for at in (view.first, end))
        return self._give(op, mine, operation=Columns(first, after - first))

    def _join(self, op: Op, _: Cut | None) -> bool:
        x, y = op.inputs
        cut = self.cuts[y]
        if cut is None or not cut.heads:
            return False
        shared = self.cuts[x] is None and x.shape.row[0] == 1
        if not shared and self.cuts[x] != cut:
            return False
        return self._give(op, cut)

    def _gated_delta(self, op: Op, _: Cut | None) -> bool:
        cut = self.cuts[op.inputs[2]]
        return cut is not None and self._give(op, cut)

    def _columnwise(self, op: Op, cut: Cut | None) -> bool:
        if cut is None or cut.ids:
            return False
        weights = [columns_of(w, cut.parts[self.rank]) for w in op.weights]
        return self._give(op, cut, weights=weights)

    def _attention(self, op: Op, _: Cut | None) -> bool:
        q = self.cuts[op.inputs[0]]
        if q is None:
            return False
        gives_columns = isinstance(op.operation, Attention)
        sinks = [columns_of(w, q.parts[self.rank]) for w in op.weights]
        cut = q.columns(op.inputs[0].shape.row[1]) if gives_columns else q
        return self._give(op, cut, weights=sinks)

    def _sigmoid_gate(self, op: Op, _: Cut | None) -> bool:
        x, gate = (self.cuts[v] for v in op.inputs)
        if x is None or gate is None or gate.columns(op.inputs[1].shape.row[-1]) != x:
            return False
        return self._give(op, x)

    def _combine(self, op: Op, _: Cut | None) -> bool:
        weights, y = op.inputs
        cut = self.cuts[y]
        return (
            cut is not None
            and cut.ids is None
            and self._give(op, cut, inputs=[self._needed(weights), self.here[y]])
        )


_RULES: Mapping[type[Operation], Callable[[_Split, Op, Cut | None], bool]] = {
    MatMul: _Split._matmul,
    ExpertMatMul: _Split._expert_matmul,
    ExpertBias: _Split._by_expert,
    ExpertScale: _Split._by_expert,
    Heads: _Split._heads,
    Columns: _Split._columns_of,
    GatedDelta: _Split._gated_delta,
    Join: _Split._join,
    CausalConv: _Split._columnwise,
    Decay: _Split._columnwise,
    Sigmoid: _Split._columnwise,
    Silu: _Split._columnwise,
    SiluGate: _Split._columnwise,
    GeluGate: _Split._columnwise,
    Bias: _Split._columnwise,
    Combine: _Split._combine,
    Append: lambda s, op, cut: cut is not None and s._give(op, cut),
    Attention: _Split._attention,
    AttentionScores: _Split._attention,
    AttentionSoftmax: _Split._attention,
    SigmoidGate: _Split._sigmoid_gate,
}
