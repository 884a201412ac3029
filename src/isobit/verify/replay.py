"""Operation replay: is an operation wrong, or was it handed something wrong?

Every stage is computed again from what its own run recorded before it, in the arithmetic of the
run it is measured against. A stage whose recorded value differs from that is *faulty*. One that
agrees did what it should with inputs that already differed: *propagated*.
"""

from collections.abc import Sequence
from typing import Literal

from isobit.backends.base import I32
from isobit.model.graph import Graph
from isobit.verify.arithmetic import Arithmetic, Array, Float64Arithmetic
from isobit.verify.forward import Run, shaped
from isobit.verify.metrics import Distance

Origin = Literal["faulty", "faulty in B", "faulty in both", "propagated", "not replayed"]


class Replay:
    """Follows two runs A and B stage by stage."""

    def __init__(self, graph: Graph, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic
        self.graph = graph
        self.exact = arithmetic.exact
        """Whether equal bits can be expected; float64 tells how far off an operation is."""
        self._a, self._b = Run(graph), Run(graph)

    def start(self, tokens: I32, positions: I32) -> None:
        """A chunk begins: its tokens and their positions."""
        self._positions = positions
        self._a.start(tokens, positions)
        self._b.start(tokens, positions)

    def shaped(self, stage: str, layer: int | None, value: Array) -> Array:
        """See :func:`isobit.verify.forward.shaped`."""
        return shaped(self.graph, stage, layer, value)

    def put(self, stage: str, layer: int | None, a: Array, b: Array) -> None:
        """Both runs' values of a stage, after it was judged."""
        for run, value in ((self._a, a), (self._b, b)):
            run.advance(stage, layer, self._arithmetic)
            run.put(stage, layer, value)

    def inputs(self, stage: str, layer: int | None, *, of_b: bool = False) -> list[Array] | None:
        """What A, or B, recorded of a stage's inputs; None if not all of it."""
        return (self._b if of_b else self._a).inputs(stage, layer)

    def in_float64(self, stage: str, layer: int | None, inputs: Sequence[Array]) -> Array:
        """A stage of given inputs in float64."""
        return self._a.compute(stage, layer, inputs, Float64Arithmetic())

    def own_error(self, stage: str, layer: int | None, a: Array, total: Distance) -> None:
        """Add A's value against the same operation on A's own inputs, if they are there."""
        self._same(self._a, stage, layer, a, total)

    def origin(self, stage: str, layer: int | None, a: Array, b: Array, total: Distance) -> Origin:
        """Where the difference between A's and B's value comes from; adds A's own error."""
        same_a = self._same(self._a, stage, layer, a, total)
        same_b = self._same(self._b, stage, layer, b, Distance())
        if same_a is None or same_b is None:
            return "not replayed"
        if same_a and same_b:
            return "propagated"
        if same_b:
            return "faulty"
        return "faulty in B" if same_a else "faulty in both"

    def _same(
        self, run: Run, stage: str, layer: int | None, got: Array, total: Distance
    ) -> bool | None:
        inputs = run.inputs(stage, layer)
        if inputs is None:
            return None
        expected = run.compute(stage, layer, inputs, self._arithmetic)
        before = total.differing
        total.add(got, expected, self._positions)
        return total.differing == before
