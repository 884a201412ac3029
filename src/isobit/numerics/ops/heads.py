"""Heads: some columns of rows as head vectors. Moves values, computes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape


@dataclass(frozen=True)
class Heads(Operation):
    """Columns of x [T, width] as [T, count, size]: head i begins at column first + i * step."""

    first: int
    count: int
    size: int
    stride: int | None = None
    """From one head to the next; None: size, one behind the other."""
    kind = "heads"

    @property
    def step(self) -> int:
        """Columns from one head to the next."""
        return self.size if self.stride is None else self.stride

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        last = self.first + (self.count - 1) * self.step + self.size
        if last > inputs[0].width:
            raise ValueError(f"columns: expected {last} or more, got {inputs[0].width}")
        return (Shape((self.count, self.size), inputs[0].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x = inputs[0].reshape(len(inputs[0]), -1)
        starts = self.first + self.step * np.arange(self.count)
        return (np.ascontiguousarray(x[:, starts[:, None] + np.arange(self.size)]),)

    float64 = specification
