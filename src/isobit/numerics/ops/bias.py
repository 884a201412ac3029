"""Bias: a vector added to rows (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require


@dataclass(frozen=True)
class Bias(Operation):
    """x [T, n] plus the weight [n]."""

    kind = "bias"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require(f"length of {weights[0].name}", weights[0].shape, inputs[0].row)
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (inputs[0] + weights[0].float32(),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (inputs[0].astype(np.float64) + weights[0].float32(),)
