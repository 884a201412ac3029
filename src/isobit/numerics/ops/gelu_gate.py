"""GeGLU's pointwise part (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require
from isobit.numerics.pointwise import gelu_gate


@dataclass(frozen=True)
class GeluGate(Operation):
    """GELU of the gate, in its tanh form, times up, of one shape; 0.5 (1 + tanh(z)) is
    1 / (1 + exp(-2 z))."""

    kind = "gelu_gate"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require("up", inputs[1], inputs[0])
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (gelu_gate(*inputs),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        gate, up = (x.astype(np.float64) for x in inputs)
        z = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        return (0.5 * gate * (1 + np.tanh(z)) * up,)
