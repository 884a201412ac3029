"""Scale: products times what their weight's blocks leave out (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require


@dataclass(frozen=True)
class Scale(Operation):
    """x [T, n] times the weight [n], value by value."""

    kind = "scale"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require(f"length of {weights[0].name}", weights[0].shape, inputs[0].row)
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (inputs[0] * weights[0].float32(),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (inputs[0].astype(np.float64) * weights[0].float32(),)


@dataclass(frozen=True)
class ExpertScale(Operation):
    """x [T, k, n] and ids int32 [T, k]: each vector times its expert's value of the weight [E]."""

    kind = "expert_scale"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        x, ids = inputs
        require("experts of a token", x.row[:1], ids.row)
        require(f"length of {weights[0].name}", weights[0].shape, (ids.below,))
        return (x,)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, ids = inputs
        return (x * weights[0].float32()[ids][:, :, None],)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, ids = inputs
        return (x.astype(np.float64) * weights[0].float32()[ids][:, :, None],)
