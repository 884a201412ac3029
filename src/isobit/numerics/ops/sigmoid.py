"""Sigmoid (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape
from isobit.numerics.pointwise import exp


@dataclass(frozen=True)
class Sigmoid(Operation):
    """1 / (1 + exp(-x))."""

    kind = "sigmoid"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (np.float32(1) / (np.float32(1) + exp(-inputs[0])),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x = inputs[0].astype(np.float64)
        with np.errstate(over="ignore"):
            return (1 / (1 + np.exp(-x)),)
