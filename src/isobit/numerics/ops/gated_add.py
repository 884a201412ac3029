"""Gated add: a shared expert's output, scaled by its gate, added to the routed sum
(docs/numerics.md, section 7)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require
from isobit.numerics.pointwise import exp


@dataclass(frozen=True)
class GatedAdd(Operation):
    """x and y [T, n], gate [T, 1]: x + (1 / (1 + exp(-gate))) * y."""

    kind = "gated_add"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require("the second addend", inputs[1], inputs[0])
        require("the gate", inputs[2].row, (1,))
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, y, gate = inputs
        one = np.float32(1)
        return (x + (one / (one + exp(-gate))) * y,)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, y, gate = (v.astype(np.float64) for v in inputs)
        with np.errstate(over="ignore"):
            return (x + y / (1 + np.exp(-gate)),)
