"""Heads: some columns of rows as head vectors. Moves values, computes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape


@dataclass(frozen=True)
class Heads(Operation):
    """Columns ``first`` … of x [T, width] as [T, count, size]."""

    first: int
    count: int
    size: int
    kind = "heads"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        last = self.first + self.count * self.size
        if last > inputs[0].width:
            raise ValueError(f"columns: expected {last} or more, got {inputs[0].width}")
        return (Shape((self.count, self.size), inputs[0].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x = inputs[0].reshape(len(inputs[0]), -1)
        columns = x[:, self.first : self.first + self.count * self.size]
        return (np.ascontiguousarray(columns).reshape(len(x), self.count, self.size),)

    float64 = specification
