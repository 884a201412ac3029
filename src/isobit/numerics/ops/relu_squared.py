"""Squared ReLU (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape


@dataclass(frozen=True)
class ReluSquared(Operation):
    """max(x, 0)^2."""

    kind = "relu_squared"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        m = np.maximum(inputs[0], np.float32(0))
        return (m * m,)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (np.maximum(inputs[0].astype(np.float64), 0) ** 2,)
