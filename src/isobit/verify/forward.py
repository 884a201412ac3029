"""The forward pass stage by stage, in any arithmetic.

This is what tells a faulty operation from an error it was handed: a stage can be recomputed on its
own from recorded inputs. The same graph in float64 is the oracle, and with single stages exchanged
it is an ablation.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from isobit.backends.base import I32, Tap
from isobit.errors import FileRefused
from isobit.model.graph import Graph, Op, Value, stateful, zero_state
from isobit.numerics.ops import HISTORY, Append, Arrays, Context, MatMul
from isobit.verify.arithmetic import Arithmetic, Array

_NO_CONTEXT = Context()  # views read nothing of it
Compute = Callable[["Run", str, int | None, Sequence[Array]], Array]


def shaped(graph: Graph, stage: str, layer: int | None, value: Array) -> Array:
    """A recorded value [T, …] in its stage's shape: some files say none.

    Raises FileRefused for one that does not fit the model.
    """
    where = stage if layer is None else f"{stage} of layer {layer}"
    if (stage, layer) not in graph.stages:
        raise FileRefused(f"{where}: expected a stage of the model's {graph.n_layers} layers")
    shape = graph.stages[stage, layer].value.shape
    try:
        value = value.reshape(len(value), *shape.row)
    except ValueError:
        raise FileRefused(
            f"{where}: expected shape {shape.row} for each token, got {value.shape[1:]}; is the "
            "trace of this model?"
        ) from None
    if shape.below is not None and value.size:  # a recorded trace may say anything
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= shape.below:
            raise FileRefused(f"{where}: expected 0 to {shape.below - 1}, got {low} to {high}")
    return value


def flow(graph: Graph) -> dict[int, list[tuple[str, str]]]:
    """By layer, pairs of stages of which the second reads the first; "input" stands for what comes
    from outside the layer. What is appended is read from where it came from."""
    maker = {v: op for op in graph.ops for v in op.outputs}
    found: dict[int, list[tuple[str, str]]] = {}
    for (name, layer), stage in graph.stages.items():
        if layer is None:
            continue
        left, sources = list(stage.inputs), []
        while left:
            v = left.pop(0)
            if v.key is not None:
                sources.append(v.name if v.layer == layer else "input")
            elif v in maker:
                left += maker[v].inputs
        pairs = found.setdefault(layer, [])
        pairs += dict.fromkeys((s, name) for s in sources if s is not None)
    return found


class Run:
    """One run's values as they come, stage by stage: the inputs of the next stages.

    Holds what a later stage reads, and what was appended of every layer (a later chunk reads it).
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._place = {key: i for i, key in enumerate(graph.stages)}
        self._last_reader: dict[Value, int] = {}
        for i, stage in enumerate(graph.stages.values()):
            self._last_reader[stage.value] = i + 1  # what nothing reads stays for one stage
            self._last_reader |= dict.fromkeys(stage.inputs, i)
        self._stored = _stored(graph)
        self._values: dict[Value, Array] = {}
        self._history: dict[Value, list[Array]] = {}
        self._states: dict[Op, Arrays] = {}
        self._before: dict[Op, Arrays] = {}

    def start(self, tokens: I32, positions: I32) -> None:
        """A chunk begins."""
        rows = np.arange(len(tokens), dtype=np.int32)
        given = dict(zip(self.graph.given, (tokens, positions, rows), strict=True))
        self._given: dict[Value, Array] = given
        self.positions = positions
        # What was not computed in the last chunk has no known state in this one.
        self._before, self._states = self._states if positions[0] else _Zero(), {}

    def put(self, stage: str, layer: int | None, value: Array) -> None:
        """A stage's value is known; stages come in graph order."""
        made, place = self.graph.stages[stage, layer].value, self._place[stage, layer]
        for history, kept, ops in self._stored.get(made, ()):
            values = self._given | {made: value}
            for op in ops:
                own = [values[v] for v in op.inputs]
                values |= zip(
                    op.outputs,
                    op.operation.specification(_NO_CONTEXT, op.weights, *own),
                    strict=True,
                )
            self._history.setdefault(history, []).append(values[kept])
        self._values[made] = value
        self._values = {v: x for v, x in self._values.items() if self._last_reader[v] > place}

    def value(self, stage: str, layer: int | None) -> Array:
        """A stage's value, while a later one reads it."""
        return self._values[self.graph.stages[stage, layer].value]

    def inputs(self, stage: str, layer: int | None) -> list[Array] | None:
        """What a stage is computed from, in order; None if something was not put."""
        found = []
        how = self.graph.stages[stage, layer]
        if any(stateful(op) and op not in self._before for op in how.ops):
            return None
        for v in how.inputs:
            if v.shape.rows == HISTORY:
                held = self._history.get(v, [])
                if sum(map(len, held)) != self.positions[-1] + 1:  # not of every token so far
                    return None
                found.append(np.concatenate(held))
            elif v in self._given or v in self._values:
                found.append(self._given[v] if v in self._given else self._values[v])
            else:
                return None
        return found

    def compute(
        self, stage: str, layer: int | None, inputs: Sequence[Array], a: Arithmetic
    ) -> Array:
        """A stage's value from its inputs, in an arithmetic."""
        how = self.graph.stages[stage, layer]
        values = dict(zip(how.inputs, inputs, strict=True))
        for op in how.ops:
            own = [values[v] for v in op.inputs]
            if stateful(op):
                made = a(op, [*own, *self._before[op]])
                self._states[op] = made[len(op.outputs) :]
            else:
                made = a(op, own)
            values |= zip(op.outputs, made, strict=False)
        return values[how.value]

    def advance(self, stage: str, layer: int | None, a: Arithmetic) -> None:
        """Bring the state of a stage's operations past this chunk, unless it has been computed."""
        ops = [op for op in self.graph.stages[stage, layer].ops if stateful(op)]
        if any(op not in self._states for op in ops):
            inputs = self.inputs(stage, layer)
            if inputs is not None:
                self.compute(stage, layer, inputs, a)


class _Zero(dict[Op, Arrays]):
    """The states at the start of a sequence."""

    def __contains__(self, op: object) -> bool:
        return True

    def __missing__(self, op: Op) -> Arrays:
        return zero_state(op)


def _stored(graph: Graph) -> Mapping[Value, Sequence[tuple[Value, Value, Sequence[Op]]]]:
    """For each stage that is appended or that follows from one: the history, what is appended to
    it, and the operations between."""
    maker = {v: op for op in graph.ops for v in op.outputs}
    found: dict[Value, list[tuple[Value, Value, list[Op]]]] = {}
    for op in graph.ops:
        if isinstance(op.operation, Append):
            for value, history in zip(op.inputs, op.outputs, strict=True):
                at, between = value, list[Op]()
                while at.name is None:
                    between.insert(0, maker[at])
                    at, *more = between[0].inputs
                    assert set(graph.given).issuperset(more), "appended: expected one stage's"
                    assert not isinstance(between[0].operation, MatMul), "appended: by a product"
                found.setdefault(at, []).append((history, value, between))
    return found


@np.errstate(all="ignore")  # damaged weights overflow
def forward(
    run: Run,
    tokens: I32,
    positions: I32,
    compute: Compute,
    tap: Tap | None = None,
    stages: frozenset[str] | None = None,
) -> Array:
    """Run a sequence's next tokens, each stage by ``compute``; logits of every token."""
    run.start(tokens, positions)
    graph = run.graph
    value: Array = np.empty(0)
    extra = stages is not None and not graph.on_request.isdisjoint(stages)
    for stage, layer in graph.stages:
        if stage in graph.on_request and not extra:
            continue
        inputs = run.inputs(stage, layer)
        assert inputs is not None
        value = compute(run, stage, layer, inputs)
        run.put(stage, layer, value)
        if tap is not None and (stages is None or stage in stages):
            tap(stage, layer, value)
    return value
