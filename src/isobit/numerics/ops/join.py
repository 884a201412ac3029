"""Join: head vectors, one behind the other in each head. Moves values, computes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require


@dataclass(frozen=True)
class Join(Operation):
    """x [T, G, a] and y [T, H, b] as [T, H, a + b]: x's vector before y's in each head, the same
    one of x for H / G heads that are neighbours."""

    kind = "join"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        (groups, a), (heads, b) = (v.row for v in inputs)
        require("rows", inputs[0].rows, inputs[1].rows)
        if heads % groups:
            raise ValueError(f"heads: expected a multiple of {groups}, got {heads}")
        return (Shape((heads, a + b), inputs[1].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, y = inputs
        return (np.concatenate([x.repeat(y.shape[1] // x.shape[1], axis=1), y], axis=2),)

    float64 = specification
