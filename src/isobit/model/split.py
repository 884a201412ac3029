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
from isobit.model.cuts import Cut, Part, before, columns_of, even, has, merged, united
from isobit.model.graph import Builder, Graph, Op, Value
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
from isobit.numerics.ops.gather import Ranges


def split(
    graph: Graph, rank: int, parts: int, source: str = "model", shares: Sequence[int] = ()
) -> Part:
    """One of ``parts`` parts.

    shares: whole experts on each part, in these proportions; none: some columns of every expert.

    Its tensors are views of the model's, but for biases, whose parts are copied.
    ``source`` names the model in refusals. Raises UsageError for more parts than query heads.
    """
    if parts < 1 or not 0 <= rank < parts:
        raise UsageError(f"part: expected one of {max(parts, 1)} parts, got number {rank}")
    if shares and (len(shares) != parts or min(shares) < 1):
        raise UsageError(f"expert_shares: expected {parts} numbers >= 1, got {list(shares)}")
    if parts == 1:
        return Part(graph, {})
    check(graph, parts, shares)
    one = _Split(graph, rank, parts, source, shares)
    made = one.graph()
    return Part(made, {v.key: cut for v, cut in one.cuts.items() if v.key and cut})


def check(graph: Graph, parts: int, shares: Sequence[int] = ()) -> None:
    """What :func:`split` refuses, before any work: UsageError."""
    for op in graph.ops:
        if op.kind == "attention":
            queries, keys = _head_counts(op)
            if -(-parts // keys) > queries // keys:
                raise UsageError(
                    f"parts: expected at most {queries}, one a query head, got {parts}"
                )
        elif shares and isinstance(op.operation, ExpertMatMul):
            bounds = _bounds(experts := op.weights[0].shape[0], shares)
            if any(a == b for a, b in itertools.pairwise(bounds)):
                raise UsageError(
                    f"expert_shares: expected an expert or more for each, got {list(shares)} of "
                    f"{experts}"
                )


def _bounds(experts: int, shares: Sequence[int]) -> list[int]:
    """Where each part's experts begin, and where the last one's end."""
    return [experts * sum(shares[:r]) // sum(shares) for r in range(len(shares) + 1)]


class _Split:
    def __init__(
        self, graph: Graph, rank: int, parts: int, source: str, shares: Sequence[int]
    ) -> None:
        self.whole, self.rank, self.parts, self.shares = graph, rank, parts, shares
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
        self.makers = {v: op for op in graph.ops for v in op.outputs}
        self.wanted: dict[Value, list[Cut]] = {}
        """Which columns of products the heads of a delta net need, for each that reads them."""
        for op in graph.ops:
            if isinstance(op.operation, GatedDelta):
                self._plan_delta(op)

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
        views = self._views(y)
        if views:
            cut = self._cut_of_views(views)
        elif y in self.wanted:
            cut = united(self.wanted[y])
        elif self._chooses(y):
            return False  # every part chooses the experts; the router is small
        elif y.shape.width < self.parts:
            return False
        else:
            cut = Cut(even(y.shape.width, self.parts))
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
            for r in self.readers.get(value, ())
        )

    def _expert_matmul(self, op: Op, _: Cut | None) -> bool:
        (w,) = op.weights
        if self.shares:
            return self._whole_experts(op, w)
        if w.shape[1] < self.parts:
            return False
        cut = Cut(even(w.shape[1], self.parts))
        ((first, end),) = cut.parts[self.rank]
        stack = w.data.reshape(w.shape[0], w.shape[1], w.row_bytes)[:, first:end]
        shape = (w.shape[0], end - first, w.shape[2])
        here = Weight(f"{w.name}[:, {first}:{end}]", w.format, shape, stack.reshape(shape[0], -1))
        return self._give(op, cut, inputs=[self._needed(v) for v in op.inputs], weights=[here])

    def _whole_experts(self, op: Op, w: Weight) -> bool:
        x, ids = op.inputs
        bounds = _bounds(w.shape[0], self.shares)
        cut = Cut(tuple(((a, b),) for a, b in itertools.pairwise(bounds)), ids=ids)
        first, end = part = bounds[self.rank], bounds[self.rank + 1]
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
        if cut is None or not (op in self._views(op.inputs[0]) or self._within_delta(op)):
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
        if cut is None or not ((whole and cut.heads) or self._within_delta(op)):
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

    # The heads of a layer's delta net

    def _plan_delta(self, op: Op) -> None:
        """A key head is read by as many value heads as there are rounds: the h mod key heads'th by
        value head h, or where they are grouped by neighbours. A part has some key heads and the
        value heads that read them; where there are more parts than key heads, several have the
        same one, and each some of the rounds. Scans that correct nothing every part does whole."""
        assert isinstance(op.operation, GatedDelta)
        if not op.operation.corrects:
            return
        grouped = op.operation.grouped
        keys, values = op.inputs[1].shape.row[0], op.inputs[2].shape.row[0]
        rounds = values // keys
        if -(-self.parts // keys) > rounds:
            return  # every part does all of it
        shares = self._shares(keys, rounds)
        of_keys = Cut(tuple((key,) for key, _ in shares), heads=True)

        def readers(share: tuple[int, int], each: tuple[int, int]) -> Ranges:
            """The value heads of some key heads in some rounds."""
            if grouped:
                return merged([(k * rounds + each[0], k * rounds + each[1]) for k in range(*share)])
            return merged([(j * keys + share[0], j * keys + share[1]) for j in range(*each)])

        of_values = Cut(tuple(readers(*s) for s in shares), heads=True)
        for value, cut in zip(op.inputs[:2], (of_keys, of_keys), strict=True):
            self._want(value, cut)
        self._want(op.inputs[2], of_values)
        for value in op.inputs[3:]:
            self._want(value, of_values.columns(1))
        gates = [r for n in self.readers[op.outputs[0]] for r in self.readers[n.outputs[0]]]
        for gate in gates:  # its output, normed, meets heads of the same product
            self._want(gate.inputs[0], of_values)

    def _want(self, value: Value, cut: Cut) -> None:
        """Note what a cut of a value needs of the product that it comes from."""
        maker = self.makers[value]
        view = maker.operation
        if isinstance(view, MatMul):
            self.wanted.setdefault(value, []).append(cut)
            return
        if isinstance(view, Heads):
            cut = Cut(
                tuple(
                    merged(
                        [
                            (view.first + i * view.step, view.first + i * view.step + view.size)
                            for a, b in part
                            for i in range(a, b)
                        ]
                    )
                    for part in cut.parts
                )
            )
        elif isinstance(view, Columns):
            cut = Cut(
                tuple(tuple((a + view.first, b + view.first) for a, b in p) for p in cut.parts)
            )
        self._want(maker.inputs[0], cut)

    def _within_delta(self, op: Op) -> bool:
        """Whether it reads, by way of what works by columns or heads, a product that is cut so."""
        value = op.inputs[0]
        while value not in self.wanted:
            maker = self.makers.get(value)
            if maker is None or isinstance(maker.operation, MatMul) or not maker.inputs:
                return False
            value = maker.inputs[0]
        return True

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
        group = queries // keys
        shares = self._shares(keys, group)
        if view.outputs[0].shape.row[0] == keys:
            return Cut(tuple((key,) for key, _ in shares), heads=True)
        return Cut(
            tuple(((a * group + i, (b - 1) * group + j),) for (a, b), (i, j) in shares), heads=True
        )

    def _shares(self, keys: int, group: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Each part's key heads, and which of the ``group`` heads that read each of them."""
        found = []
        for r in range(self.parts):
            first = r * keys // self.parts
            end = max((r + 1) * keys // self.parts, first + 1)
            of = (0, group)
            if self.parts > keys:
                sharing = [s for s in range(self.parts) if s * keys // self.parts == first]
                j, n = sharing.index(r), len(sharing)
                of = j * group // n, (j + 1) * group // n
            found.append(((first, end), of))
        return found

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
            parts.append(merged(ranges))
        return Cut(tuple(parts))


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


def _head_counts(attention: Op) -> tuple[int, int]:
    q, keys = attention.inputs[:2]
    return q.shape.row[0], keys.shape.row[0]
