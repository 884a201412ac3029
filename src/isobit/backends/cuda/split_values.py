"""Values that the parts of a split model exchange: which they are, and where they come to lie."""

from dataclasses import replace

from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.values import Values
from isobit.backends.cuda.workspace import (
    EXPERTS,
    NOT_EXCHANGED,
    BufferView,
    Exchange,
    Inboxes,
)
from isobit.model.graph import Graph, Op, Value
from isobit.numerics.ops import TOKENS, Gather, GatherExperts, Shape

_READ_AT_ONCE = frozenset({"add", "matmul", "expert_matmul", "rms_norm", "top_k"})
"""Operations that leave nothing where they read it, for others to read later."""


class SplitValues(Values):
    """The values of a program of a whole model, or of a part of a split one."""

    def __init__(self, graph: Graph, gpu: Gpu, *, captured: bool) -> None:
        super().__init__(gpu)
        self.captured = captured
        self.readers: dict[Value, list[Op]] = {}
        for op in graph.required.ops:
            for v in op.inputs:
                self.readers.setdefault(v, []).append(op)
        self.exchanges: dict[str, Inboxes] = {}
        """By the rows that gathered values have, or EXPERTS."""
        self.mirrored: dict[Value, Exchange] = {}
        """Values of which all parts get what this one makes, as it is made."""
        self._ops = graph.required.ops
        self._maker = {v: i for i, op in enumerate(self._ops) for v in op.outputs}
        gathers = (op.operation for op in self._ops if isinstance(op.operation, Gather))
        self._gather = next(gathers, None)
        """Of a part of a split model: which it is, and of how many."""
        self._meetings = [i for i, op in enumerate(self._ops) if self._meets(op)]
        self._arriving: dict[Value, Exchange] = {}
        self._landing: dict[Value, Exchange] = {}

    def exchange_of(self, op: Op, blocks: int = 0) -> Exchange:
        """The next exchange of the pass, of a gather; ``blocks``: that have flags of their own, if
        values are not sent as words with a number."""
        gather, shape = op.operation, op.outputs[0].shape
        assert isinstance(gather, Gather)
        words = (
            shape.width if blocks else 2 * 256 * supers(gather.width) * shape.width // gather.width
        )
        bounds = *(ranges[0][0] for ranges in gather.parts), gather.width
        return self._exchange(shape, bounds, gather.rank, words, len(gather.parts) * blocks)

    def exchange_of_experts(self, op: Op) -> Exchange:
        """The next of rows that each part has of its experts. They have inboxes of their own, as
        values are plain in each program, and would be taken for words with a number."""
        gather, shape = op.operation, op.outputs[0].shape
        assert isinstance(gather, GatherExperts)
        flags = (len(gather.bounds) - 1) * self.blocks_at_once
        return self._exchange(shape, gather.bounds, gather.rank, shape.width, flags, EXPERTS)

    def _exchange(
        self,
        shape: Shape,
        bounds: tuple[int, ...],
        rank: int,
        words: int,
        flags: int,
        kind: str = "",
    ) -> Exchange:
        """The next of the pass, of values that take so many words of an inbox a row."""
        parts, kind = len(bounds) - 1, kind or shape.rows
        if kind not in self.exchanges:
            first, second = (self.fixed("inbox", 0, shape.rows, zero=True) for _ in range(2))
            table = self.fixed("exchanges", 2 * parts + 8, zero=True)
            self.exchanges[kind] = Inboxes(table, (first, second), parts)
        found = self.exchanges[kind]
        for slot in found.own:
            slot.words, slot.more = max(slot.words, words), max(slot.more, flags + 3)
        found.sites += 1
        return Exchange(found, found.sites - 1, bounds, rank)

    def exchanges_within(self, op: Op) -> bool:
        """Whether a gather can be a part of the kernels beside it: they move eight columns at a
        time, and wait on all multiprocessors, which no other part may need."""
        gather = op.operation
        assert isinstance(gather, Gather)
        return (
            self.captured
            and self.gpu.alone
            and all(len(r) == 1 and r[0][0] < r[0][1] for r in gather.parts)
            and all(column % 8 == 0 for ((first, end),) in gather.parts for column in (first, end))
        )

    @property
    def blocks_at_once(self) -> int:
        """Blocks of a kernel that waits for other parts: all run, and leave room for other parts'
        where these are on this device."""
        most = self.gpu.multiprocessors
        return most if self.gpu.alone else max(1, most // 2)

    def in_place(self, op: Op) -> bool:
        """Whether what a gather puts together may lie where other parts put it (Mirrors of
        exchange.cuh): in large passes, whose exchanges are so many that each finds the same half of
        the inbox in every pass, if all who read it do so before the next exchange."""
        gather, (whole,) = op.operation, op.outputs
        assert isinstance(gather, Gather)
        cut = all(
            len(r) == 1 and r[0][0] < r[0][1] and not (r[0][0] | r[0][1]) % 4 for r in gather.parts
        )
        return cut and self._read_at_once(whole)

    def _meets(self, op: Op) -> bool:
        """Whether parts of a split model exchange rows of tokens at an operation: a gather, or in a
        large pass a router's product, of which each makes some rows."""
        y = op.outputs[0]
        if self._gather is None or y.shape.rows != TOKENS:
            return False
        if op.kind != "matmul" or self.captured or y.shape.width % 4:
            return op.kind == "gather"
        readers, behind = self.readers.get(y, ()), self._ops[self._maker[y] + 1]
        floats = not any(w.format.quantized for w in op.weights)
        return len(op.weights) == 1 and floats and behind.kind == "top_k" and [*readers] == [behind]

    def _read_at_once(self, whole: Value) -> bool:
        """Whether a value can lie in an inbox."""
        at = self._maker[whole]
        if self.captured or at not in self._meetings or len(self._meetings) % 2:
            return False
        until = min((i for i in self._meetings if i > at), default=len(self._ops))
        return whole.shape.row[-1] % 4 == 0 and all(
            self._maker[reader.outputs[0]] < until
            and reader.kind in _READ_AT_ONCE
            and (reader.kind != "add" or reader.inputs[0] is not whole)
            for reader in self.readers.get(whole, ())
        )

    def mirror_of(self, op: Op) -> Exchange:
        """The next exchange of the pass, of a gather that puts a value together in place."""
        blocks, gather = self.blocks_at_once, op.operation
        assert isinstance(gather, Gather)
        return replace(self.exchange_of(op, blocks), flags=-(-len(gather.parts) * blocks // 4) * 4)

    def shared(self, value: Value) -> Exchange:
        """By which exchange each part gives the others its share of the rows of a product that
        every part would make."""
        if self._gather is None or not self._read_at_once(value):
            return NOT_EXCHANGED
        parts, width, blocks = len(self._gather.parts), value.shape.width, self.blocks_at_once
        bounds, rank = (0,) * parts + (width,), self._gather.rank
        found = self._exchange(value.shape, bounds, rank, width, parts * blocks)
        return replace(found, flags=-(-parts * blocks // 4) * 4)

    def target(self, value: Value) -> tuple[BufferView, Exchange]:
        """Where a launch is to leave a value, and by which exchange it is to give it to the other
        parts at once: if all that reads it is a gather, which comes next."""
        readers, behind = self.readers.get(value, []), self._maker[value] + 1
        gathered = [op.kind for op in readers] == ["gather"] and readers[0] is self._ops[behind]
        if not gathered or not self.in_place(readers[0]):
            self.new(value)
            return self.places[value], NOT_EXCHANGED
        self.mirrored[value] = exchange = self.mirror_of(readers[0])
        self.put(value, exchange.place(readers[0].outputs[0], exchange.first))
        return self.places[value], exchange

    def lands(self, value: Value, exchange: Exchange) -> None:
        """This part's columns of a value are in their places; the others' come there when somebody
        takes them, or else by a launch before the value is read."""
        self._landing[value] = exchange

    def take_landing(self, value: Value) -> Exchange:
        """How the others' columns of a value come; they are the caller's to take."""
        return self._landing.pop(value, NOT_EXCHANGED)

    def arriving(self, value: Value) -> Exchange:
        """How the others' columns of a value arrive."""
        return self._arriving.get(value, NOT_EXCHANGED)
