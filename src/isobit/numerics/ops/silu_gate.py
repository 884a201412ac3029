"""SwiGLU's pointwise part (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require
from isobit.numerics.pointwise import silu_gate


@dataclass(frozen=True)
class SiluGate(Operation):
    """gate / (1 + exp(-gate)) * up, of one shape."""

    kind = "silu_gate"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require("up", inputs[1], inputs[0])
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (silu_gate(*inputs),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        g = inputs[0].astype(np.float64)
        with np.errstate(over="ignore"):
            return (g / (1 + np.exp(-g)) * inputs[1],)
