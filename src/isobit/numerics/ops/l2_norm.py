"""L2 norm of head vectors (docs/numerics.md, section 12)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape
from isobit.numerics.pointwise import sum256


@dataclass(frozen=True)
class L2Norm(Operation):
    """Each vector over its length: (x * (1 / sqrt(sum of squares + eps))) * scale, the scale
    rounded to binary32."""

    eps: float
    scale: float = 1.0
    kind = "l2_norm"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x = inputs[0]
        r = np.float32(1) / np.sqrt(sum256(x * x) + np.float32(self.eps))
        return ((x * r[..., None]) * np.float32(self.scale),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x = inputs[0].astype(np.float64)
        return (x / np.sqrt((x * x).sum(-1, keepdims=True) + self.eps) * self.scale,)
