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
    the table rotates, by its angles; the others as they are."""

    table: RopeTable
    neighbours: bool = False
    """Whether pairs are (2i, 2i + 1); else (i, i + half)."""
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
        rotated = rope(_halves(x[..., :n], self), cos[positions - first], sin[positions - first])
        return (np.concatenate([_back(rotated, self), x[..., n:]], axis=-1),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, positions = inputs
        n = self.table.size
        frequencies, scale = self.table.float64()
        angle = positions[:, None] * frequencies
        c, s = scale * np.cos(angle)[:, None], scale * np.sin(angle)[:, None]
        x = x.astype(np.float64)
        pairs = _halves(x[..., :n], self)
        a, b = pairs[..., : n // 2], pairs[..., n // 2 :]
        rotated = np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
        return (np.concatenate([_back(rotated, self), x[..., n:]], axis=-1),)


def _halves(x: Array, rope: Rope) -> Array:
    """The pairs' first values, then their second ones."""
    return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1) if rope.neighbours else x


def _back(x: Array, rope: Rope) -> Array:
    """The reverse of :func:`_halves`."""
    if not rope.neighbours:
        return x
    out = np.empty_like(x)
    out[..., ::2], out[..., 1::2] = np.split(x, 2, axis=-1)
    return out
