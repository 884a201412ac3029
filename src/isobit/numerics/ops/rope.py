"""RoPE: the rotation of head vectors by their position (docs/numerics.md, sections 5 and 8)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require
from isobit.numerics.pointwise import rope
from isobit.numerics.rope_table import RopeTable


@dataclass(frozen=True)
class Rope(Operation):
    """x [T, heads, size] and positions int32 [T]: the pairs (i, i + size/2) of each head vector
    rotated by the table's angles."""

    table: RopeTable
    kind = "rope"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require("head vector", inputs[0].row[-1], self.table.size)
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, positions = inputs
        first = int(positions.min())
        cos, sin = self.table.rows(first, int(positions.max()) + 1)
        return (rope(x, cos[positions - first], sin[positions - first]),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, positions = inputs
        half = self.table.size // 2
        angle = positions[:, None] * self.table.base ** (-np.arange(half) / half)
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        x = x.astype(np.float64)
        a, b = x[..., :half], x[..., half:]
        return (np.concatenate([a * c - b * s, b * c + a * s], axis=-1),)
