"""RoPE: the rotation of head vectors by their position (docs/numerics.md, sections 5 and 8)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape
from isobit.numerics.pointwise import rope
from isobit.numerics.rope_table import RopeTable


@dataclass(frozen=True)
class Rope(Operation):
    """x [T, heads, size] and positions int32 [T]: the first values of each head vector, as many as
    the table turns, rotated by its angles in pairs (i, i + half); the others as they are."""

    table: RopeTable
    kind = "rope"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        size = inputs[0].row[-1]
        if self.table.size > size or self.table.size % 2:
            raise ValueError(f"values to rotate: expected an even number up to {size}")
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, positions = inputs
        first, n = int(positions.min()), self.table.size
        cos, sin = self.table.rows(first, int(positions.max()) + 1)
        turned = rope(x[..., :n], cos[positions - first], sin[positions - first])
        return (np.concatenate([turned, x[..., n:]], axis=-1),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, positions = inputs
        n = self.table.size
        angle = positions[:, None] * self.table.base ** (-np.arange(0, n, 2) / n)
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        x = x.astype(np.float64)
        a, b = x[..., : n // 2], x[..., n // 2 : n]
        return (np.concatenate([a * c - b * s, b * c + a * s, x[..., n:]], axis=-1),)
