"""Columns: some neighbouring columns of rows. Moves values, computes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape


@dataclass(frozen=True)
class Columns(Operation):
    """Columns first … first + width - 1 of x [T, …]: [T, width]."""

    first: int
    width: int
    kind = "columns"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        if self.first + self.width > inputs[0].width:
            raise ValueError(f"columns: expected {self.first + self.width}, got {inputs[0].width}")
        return (Shape((self.width,), inputs[0].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x = inputs[0].reshape(len(inputs[0]), -1)
        return (np.ascontiguousarray(x[:, self.first : self.first + self.width]),)

    float64 = specification
