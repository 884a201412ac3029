"""Embedding: rows of a table (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape


@dataclass(frozen=True)
class Embedding(Operation):
    """tokens int32 [T] to rows [T, width] of the weight."""

    kind = "embedding"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return (Shape((weights[0].shape[1],), inputs[0].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        table = weights[0]
        return (np.concatenate([table.rows(t, t + 1).float32() for t in inputs[0].tolist()]),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (self.specification(run, weights, *inputs)[0].astype(np.float64),)
