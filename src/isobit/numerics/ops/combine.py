"""Combine: the weighted sum of a token's experts (docs/numerics.md, section 7)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.moe import combine
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require


@dataclass(frozen=True)
class Combine(Operation):
    """Weights [T, k] and outputs [T, k, N]: their sum by rank [T, N]."""

    kind = "combine"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require("weights", inputs[0].row, inputs[1].row[:1])
        return (Shape(inputs[1].row[1:], inputs[1].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (combine(*inputs),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        w, y = (x.astype(np.float64) for x in inputs)
        return (np.einsum("tk,tkn->tn", w, y),)
