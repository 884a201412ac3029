"""Clamped gate: the SwiGLU of gpt-oss (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require
from isobit.numerics.pointwise import exp


@dataclass(frozen=True)
class ClampedGate(Operation):
    """gate and up of one shape, the gate clamped above and up on both sides at ``limit``:
    gate / (1 + exp(-(gate * factor))) * (up + 1)."""

    limit: float
    factor: float
    kind = "clamped_gate"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require("up", inputs[1], inputs[0])
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        one, limit = np.float32(1), np.float32(self.limit)
        gate, up = np.minimum(inputs[0], limit), np.clip(inputs[1], -limit, limit)
        return ((gate / (one + exp(-(gate * np.float32(self.factor))))) * (up + one),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        gate, up = (x.astype(np.float64) for x in inputs)
        gate, up = np.minimum(gate, self.limit), np.clip(up, -self.limit, self.limit)
        with np.errstate(over="ignore"):
            return (gate / (1 + np.exp(-gate * self.factor)) * (up + 1),)
