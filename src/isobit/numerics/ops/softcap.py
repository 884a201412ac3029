"""Softcap: logits held within bounds (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape
from isobit.numerics.pointwise import exp


@dataclass(frozen=True)
class Softcap(Operation):
    """cap * tanh(x / cap), value by value."""

    cap: float
    kind = "softcap"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        (x,), one, cap = inputs, np.float32(1), np.float32(self.cap)
        with np.errstate(over="ignore"):
            y = np.abs(x / cap)
            t = exp(-(y + y))
        bounded = np.copysign(cap * ((one - t) / (one + t)), x)
        return (np.where(np.isinf(x), x, bounded),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (self.cap * np.tanh(inputs[0].astype(np.float64) / self.cap),)
