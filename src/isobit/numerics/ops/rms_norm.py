"""RMS norm (docs/numerics.md, section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require
from isobit.numerics.pointwise import rms_norm


@dataclass(frozen=True)
class RmsNorm(Operation):
    """The last axis of x over its root mean square, times the weight."""

    eps: float
    kind = "rms_norm"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require(f"length of {weights[0].name}", weights[0].shape, inputs[0].row[-1:])
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (rms_norm(inputs[0], weights[0].float32(), np.float32(self.eps)),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x = inputs[0].astype(np.float64)
        mean = (x * x).mean(-1, keepdims=True)
        return (x / np.sqrt(mean + self.eps) * weights[0].float32(),)
