"""The graph of a model as the flat program that the extension runs (program.py).

Operations on vectors that follow one another become chains of one phase, so that threads meet once
for all of them; products that do not wait for one another become one phase, and so do the two
products of a gated feed-forward with what combines them. Values lie in slots, used again once
nothing reads them.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from itertools import count
from typing import Any

import numpy as np

from isobit import numerics
from isobit.backends.cpu.program import BufferView, Chain, Instruction, Phase, instruction
from isobit.errors import BackendUnavailable
from isobit.model.graph import Graph, Op, Value
from isobit.numerics import RopeTable
from isobit.numerics.ops import (
    LOGIT_ROWS,
    TOKENS,
    Append,
    Attention,
    Columns,
    ExpertMatMul,
    MatMul,
    SelectRows,
)

_HEADS_AT_ONCE = 4
LOGITS = 0
"""The slot of the logits, which are the caller's memory."""


class Lowering:
    """Makes a program of a graph. Raises BackendUnavailable for an operation that has no form."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._ops, self._only_traced = _rows_selected_early(graph)
        self._readers: dict[Value, list[int]] = {}
        for i, op in enumerate(self._ops):
            for v in op.inputs:
                self._readers.setdefault(v, []).append(i)
        self._read_elsewhere: set[Value] = set()
        """What another chain reads than makes it, which shows when its reader is lowered."""
        if graph.hidden is not None:
            self._read_elsewhere.add(graph.hidden)
        known = -1
        while known < len(self._read_elsewhere):
            known = len(self._read_elsewhere)
            self._lower_all()

    def _lower_all(self) -> None:
        self.phases: list[Phase] = []
        width = self.graph.logits.shape.width
        self.slots: list[dict[str, Any]] = [{"width": width, "vector": width}]
        self.caches: list[tuple[int, int]] = []
        self.tables: list[RopeTable] = []
        self.states: list[int] = []
        self.scratch = self.scratch_values = 0
        self.routers: list[int] = []
        self.places: dict[Value, BufferView] = {self.graph.logits: BufferView(LOGITS, width)}
        self._sources: dict[Value, Value] = {}
        self._free: dict[tuple[object, ...], list[int]] = {}
        self._held: dict[Value, int] = {}
        self._quantised: set[Value] = set()
        self._scratched: dict[Value, int] = {}
        self.cache_of: dict[Value, int] = {}
        self._grouped: object = None
        at = 0
        while at < len(self._ops):
            at += self._lower(at)
            self._release(at)

    def program(self) -> dict[str, Any]:
        """As the extension takes it, but for ``planes``, ``pages`` and ``sequences``."""
        return {
            "slots": [
                tuple(s.get(k, 0) for k in ("width", "vector", "integers", "fixed", "query"))
                for s in self.slots
            ],
            "caches": self.caches,
            "states": self.states,
            "phases": [p.flat(self.places) for p in self.phases],
            "scratch": self.scratch,
            "scratch_values": self.scratch_values,
            "vocab": self.graph.logits.shape.width,
            "hidden": self._hidden(),
            "routers": len(self.routers),
            "routed": max(self.routers, default=0),
        }

    # For the operations' own files, ops/KIND.py

    def phase(self, op: Op, phase: Phase, outputs: Sequence[Value] | None = None) -> None:
        """A phase of its own for an operation, or for several that make ``outputs``."""
        made = op.outputs if outputs is None else outputs
        phase.stages = [v for v in made if v.name is not None]
        phase.used = {self._source(v) for v in (*op.inputs, *made)}
        self.phases.append(phase)

    def vectors(
        self, op: Op, made: Instruction, vectors: int | None = None, *, apart: bool = False
    ) -> Phase:
        """An instruction for each vector of what an operation makes, in a chain with those before
        it where it waits for nothing else. Returns the phase.

        ``apart``: it reads other vectors of what it is given, too.
        """
        if vectors is None:
            row = op.outputs[0].shape.row
            vectors = row[0] if len(row) > 1 else 1
        phase, chain = self._chain(op, vectors, apart)
        for v in map(self._source, op.inputs):
            if v in self.places and self.places[v].slot < LOGITS and v not in chain.made:
                self._read_elsewhere.add(v)
        phase.used.update(self._source(v) for v in (*op.inputs, *op.outputs))
        chain.ops.append(made)
        chain.made.update(op.outputs)
        for v in op.inputs:
            self._scratched.pop(v, None)
        phase.stages += [v for v in op.outputs if v.name is not None]
        for v in op.outputs:
            self._forms(v, chain)
        return phase

    def simple(self, op: Op, **fields: Any) -> Instruction:
        """The operation's own instruction, with all its inputs and outputs in order."""
        ins = [self.read(v, op) for v in op.inputs if v not in self.graph.given]
        return instruction(op.kind, in_=ins, out=[self.write(v) for v in op.outputs], **fields)

    def read(self, value: Value, op: Op) -> BufferView:
        """Where an operation on vectors finds an input."""
        place = self.places[value]
        gathers = op.outputs and op.outputs[0].shape.rows == LOGIT_ROWS
        return replace(place, gather=bool(gathers) and value.shape.rows == TOKENS)

    def write(self, value: Value) -> BufferView:
        """Where an operation on vectors puts what it makes: scratch memory, if what follows in its
        chain alone reads it."""
        readers = [self._ops[i] for i in self._readers.get(value, ())]
        alone = value.name is None and value not in self._read_elsewhere
        if alone and len(readers) == 1 and readers[0].operation.per_vector:
            if value not in self.places:
                taken = self._scratched.values()  # by what is still to be read
                index = next(i for i in count(1) if i not in taken)
                self._scratched[value] = index
                self.places[value] = self.scratch_vector(index, value.shape.row[-1])
            return self.places[value]
        return self.place(value)

    def place(self, value: Value) -> BufferView:
        """Where a value lies: in a slot of its own while something reads it."""
        if value not in self.places:
            shape = value.shape
            key = self._kind_of_slot(value)
            free = self._free.setdefault(key, [])
            slot = free.pop() if free else len(self.slots)
            if slot == len(self.slots):
                integers = int(shape.dtype is not np.float32)
                vector = shape.width if key[-1] else shape.row[-1]
                self.slots.append({"width": shape.width, "vector": vector, "integers": integers})
            self._held[value] = slot
            step = shape.row[-1] if len(shape.row) > 1 else 0
            self.places[value] = BufferView(slot, shape.width, 0, step)
        return self.places[value]

    def _kind_of_slot(self, value: Value) -> tuple[object, ...]:
        """What values that take turns in a slot have in common; last, whether its rows are
        quantised whole, though they are of several vectors."""
        shape = value.shape
        readers = [self._ops[i].operation for i in self._readers.get(value, ())]
        whole = any(isinstance(o, Columns) and o.width == shape.width for o in readers)
        whole = whole and not any(isinstance(o, MatMul | ExpertMatMul | Attention) for o in readers)
        return shape.row, shape.rows, shape.dtype, whole

    def view(self, op: Op, first: int, step: int) -> None:
        """What an operation gives is a part of its input, from a column on."""
        (of,), (value,) = op.inputs, op.outputs
        self.dense(of, op)
        place = self.places[of]
        self.places[value] = replace(place, offset=place.offset + first, step=step)
        self._sources[value] = self._source(of)
        if value.name is not None:
            self.copy(value, op)  # a stage is shown as it lies

    def dense(self, value: Value, op: Op) -> None:
        """Have a value's vectors one behind the other, for what reads them as one."""
        row = value.shape.row
        if len(row) > 1 and self.places[value].step != row[-1]:
            self.copy(value, op)

    def fixed(self, value: Value, op: Op) -> BufferView:
        """A product's input, a slot's whole rows; quantised in a phase of its own, if it was not
        where it was made."""
        row, slot = value.shape.row, self.slots[self.places[value].slot]
        if (slot["width"], slot["vector"]) != (value.shape.width, row[-1]):
            self.copy(value, op)
        if any(w.format.quantized for w in op.weights) and value not in self._quantised:
            chain = Chain(1 if len(row) == 1 else row[0], {value}, [self._quantise(value)])
            rows = value.shape.rows
            self.phases.append(Phase("map", op.layer, rows, chains=[chain], used={value}))
        return self.places[value]

    def copy(self, value: Value, op: Op) -> None:
        """Have a value in a slot of its own, in the forms in which it is read from now on."""
        row, part, of = value.shape.row, self.places.pop(value), self._sources.pop(value, value)
        made = instruction("copy", in_=[part], out=[self.place(value)], integers=[row[-1]])
        chain = Chain(1 if len(row) == 1 else row[0], {value}, [made])
        rows = value.shape.rows
        phase = Phase("map", op.layer, rows, chains=[chain], used={of, value})
        phase.stages = [v for v in op.outputs if v is value and v.name is not None]
        self.phases.append(phase)
        self._forms(value, chain)

    def scratch_vector(self, index: int, length: int) -> BufferView:
        """A thread's scratch memory."""
        self.scratch = max(self.scratch, index + 1)
        self.scratch_values = max(self.scratch_values, length)
        return BufferView(-1 - index, 0)

    def cache(self, op: Op) -> int:
        """A cache for what an operation appends; its number."""
        heads, head_dim = op.inputs[0].shape.row
        self.cache_of |= dict.fromkeys(op.outputs, len(self.caches))
        self.caches.append((heads, head_dim))
        return len(self.caches) - 1

    def state(self, op: Op) -> int:
        """Room for what an operation keeps of each sequence; its number."""
        (shape,) = op.operation.state([v.shape for v in op.inputs], op.weights)
        self.states.append(shape.width)
        return len(self.states) - 1

    def router(self, k: int) -> int:
        """The number of what chooses k experts."""
        self.routers.append(k)
        assert set(self.routers) == {k}, "routers that choose different numbers"
        return len(self.routers) - 1

    def group(self, ids: Value, experts: tuple[int, int], op: Op) -> None:
        """Have the pairs of tokens and these of their experts by expert, for products from now on:
        the extension knows one such order at a time."""
        if (wanted := (ids, experts)) == self._grouped:
            return
        self._grouped = wanted
        made = instruction("group", in_=[self.place(ids)], integers=[*experts, ids.shape.width])
        at = next(i for i, p in enumerate(self.phases) if any(ids in c.made for c in p.chains))
        phase = self.phases[at]
        if any(p.by_expert for p in self.phases[at:]):  # by the order until then
            phase = Phase("map", op.layer, ids.shape.rows, used={ids})
            self.phases.append(phase)
        phase.after.append(made)

    def table(self, table: RopeTable) -> int:
        """The number of a RoPE table."""
        if table not in self.tables:
            self.tables.append(table)
        return self.tables.index(table)

    # Phases and chains

    def _lower(self, at: int) -> int:
        """Lower what begins at an operation; how many it was."""
        op = self._ops[at]
        for claim in import_module("isobit.backends.cpu.fusions").CLAIMS:
            if count := claim(self, self._ops[at:]):
                return int(count)
        if not op.on_request:
            self._module(op, op.kind).lower(self, op)
        return 1

    def _module(self, op: Op, kind: str) -> Any:
        try:
            return import_module(f"isobit.backends.cpu.ops.{kind}")
        except ModuleNotFoundError:
            where = "" if op.layer is None else f" of layer {op.layer}"
            raise BackendUnavailable(f"cpu: {kind}{where} is not implemented") from None

    def _chain(self, op: Op, vectors: int, apart: bool) -> tuple[Phase, Chain]:
        """The phase and the chain that an operation on vectors belongs to: the last ones, if it
        waits for nothing else that they make."""
        rows = (op.outputs or op.inputs)[0].shape.rows
        if isinstance(op.operation, Append):
            rows = op.inputs[0].shape.rows
        traced = op in self._only_traced
        last = self.phases[-1] if self.phases else None
        if last and (last.kind, last.rows, last.traced) == ("map", rows, traced):
            needed = {self._source(v) for v in op.inputs}
            of = [c for c in last.chains if c.made & needed]
            if not of:
                last.chains.append(Chain(vectors, at_once=_together(vectors)))
                return last, last.chains[-1]
            if len(of) == 1 and of[0].vectors == vectors and not apart:
                return last, of[0]
        chain = Chain(vectors, at_once=_together(vectors))
        phase = Phase("map", op.layer, rows, traced, [chain])
        self.phases.append(phase)
        return phase, phase.chains[0]

    def _forms(self, value: Value, chain: Chain | None) -> None:
        """The forms in which products and attention read a value, made where it is made."""
        readers = [self._ops[i] for i in self._readers.get(value, ())]
        place = self.places.get(value)
        if place is None or value.shape.dtype is not np.float32:
            return
        products = (op for op in readers if isinstance(op.operation, MatMul | ExpertMatMul))
        if chain and any(w.format.quantized for op in products for w in op.weights):
            chain.ops.append(self._quantise(value))
        attends = [op.operation for op in readers if isinstance(op.operation, Attention)]
        if chain and attends:
            self.slots[place.slot]["query"] = 1
            scale = float(numerics.attention_scale(value.shape.row[1], attends[0].scale))
            chain.ops.append(instruction("query", in_=[place], numbers=[scale]))

    def _quantise(self, value: Value) -> Instruction:
        place = self.places[value]
        self.slots[place.slot]["fixed"] = 1
        self._quantised.add(value)
        return instruction("quantise", in_=[place])

    # Places

    def _source(self, value: Value) -> Value:
        """The value that a view is of."""
        return self._sources.get(value, value)

    def _release(self, at: int) -> None:
        """Free the slots of what no operation from ``at`` on reads, once the phase is over."""
        for value, slot in list(self._held.items()):
            if value not in self.phases[-1].used and self._last_read(value) < at:
                del self._held[value]
                self._free[self._kind_of_slot(value)].append(slot)

    def _last_read(self, value: Value) -> int:
        views = [v for v, of in self._sources.items() if of is value]
        return max((i for v in (value, *views) for i in self._readers.get(v, ())), default=-1)

    # To the extension

    def _hidden(self) -> tuple[int, tuple[int, int, int, int, bool], int] | None:
        """The phase that makes the hidden rows, where they are then, and their width."""
        value = self.graph.hidden
        if value is None:
            return None
        made = next(i for i, p in enumerate(self.phases) if any(value in c.made for c in p.chains))
        return made, self.places[value].as_tuple(), value.shape.width


def _together(vectors: int) -> int:
    return _HEADS_AT_ONCE if vectors > 1 else 1


def _rows_selected_early(graph: Graph) -> tuple[list[Op], set[Op]]:
    """The operations with the last norm done for the wanted rows alone, and once more for all rows,
    if it is traced: these operations besides."""
    ops, only_traced = list(graph.ops), set[Op]()
    maker = {v: op for op in ops for v in op.outputs}
    for i, op in enumerate(graph.ops):
        if isinstance(op.operation, SelectRows):
            before = maker[op.inputs[0]]
            if not before.operation.per_vector or graph.last_use[op.inputs[0]] != i:
                raise BackendUnavailable(f"cpu: {before.kind} before select_rows: cannot be moved")
            only_traced.add(before)
            ops[i] = replace(before, outputs=op.outputs)
    return ops, only_traced
