"""Sigmoid gate: attention's output gate (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require
from isobit.numerics.pointwise import exp


@dataclass(frozen=True)
class SigmoidGate(Operation):
    """x [T, heads * size] and gate [T, heads, size]: x * (1 / (1 + exp(-gate)))."""

    kind = "sigmoid_gate"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require("the input's axes", len(inputs[0].row), 1)
        require("the gate's width", inputs[1].width, inputs[0].width)
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, gate = inputs
        one = np.float32(1)
        return (x * (one / (one + exp(-gate.reshape(x.shape)))),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, gate = (v.astype(np.float64) for v in inputs)
        with np.errstate(over="ignore"):
            return (x / (1 + np.exp(-gate.reshape(x.shape))),)
