"""Which heads of attention and of delta nets each part of a split model has, and so which columns
of the products that they are read from."""

from collections.abc import Sequence
from itertools import pairwise

from isobit.model.graph import Graph, Op, Value
from isobit.model.parallel.cuts import Cut, bounds, merged
from isobit.numerics.ops import Columns, GatedDelta, Heads, MatMul
from isobit.numerics.ops.gather import Ranges


class HeadCuts:
    """The heads of a graph, over parts that have them about in these proportions; where there are
    more parts than key heads, about evenly: several parts have the same key head."""

    def __init__(self, graph: Graph, shares: Sequence[int]) -> None:
        self.parts, self.shares = len(shares), shares
        self.readers: dict[Value, list[Op]] = {}
        for op in graph.ops:
            for v in op.inputs:
                self.readers.setdefault(v, []).append(op)
        self.counts = {op.layer: head_counts(op) for op in graph.ops if op.kind == "attention"}
        self.makers = {v: op for op in graph.ops for v in op.outputs}
        self.wanted: dict[Value, list[Cut]] = {}
        """Which columns of products the heads of a delta net need, for each that reads them."""
        for op in graph.ops:
            if isinstance(op.operation, GatedDelta):
                self._plan_delta(op)

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

    def within_delta(self, op: Op) -> bool:
        """Whether it reads, by way of what works by columns or heads, a product that is cut so."""
        value = op.inputs[0]
        while value not in self.wanted:
            maker = self.makers.get(value)
            if maker is None or isinstance(maker.operation, MatMul) or not maker.inputs:
                return False
            value = maker.inputs[0]
        return True

    # The heads of a layer's attention

    def views(self, product: Value) -> list[Op]:
        """The head vectors that a product is read as, if attention's are all that it is read as."""
        readers = self.readers.get(product, [])
        if [op.kind for op in readers] == ["bias"]:
            return self.views(readers[0].outputs[0])
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
        if self.parts <= keys:
            return [(pair, (0, group)) for pair in pairwise(bounds(keys, self.shares))]
        found = []
        for r in range(self.parts):
            first = r * keys // self.parts
            sharing = [s for s in range(self.parts) if s * keys // self.parts == first]
            j, n = sharing.index(r), len(sharing)
            found.append(((first, first + 1), (j * group // n, (j + 1) * group // n)))
        return found

    def cut_of(self, views: Sequence[Op]) -> Cut:
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


def head_counts(attention: Op) -> tuple[int, int]:
    """Query heads and key-value heads."""
    q, keys = attention.inputs[:2]
    return q.shape.row[0], keys.shape.row[0]
