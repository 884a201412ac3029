"""Expert bias: to each output of an expert its own vector (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require


@dataclass(frozen=True)
class ExpertBias(Operation):
    """y [T, k, n] of the experts ids int32 [T, k], plus each one's row of the weight
    [experts, n]."""

    kind = "expert_bias"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        y, ids = inputs
        require(f"shape of {weights[0].name}", weights[0].shape, (ids.below, y.row[-1]))
        require("ids", ids.row, y.row[:-1])
        return (y,)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        y, ids = inputs
        return (y + weights[0].float32()[ids],)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        y, ids = inputs
        return (y.astype(np.float64) + weights[0].float32()[ids],)
