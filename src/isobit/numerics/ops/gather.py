"""Gather: what each part of a split model has of a value, put together. Moves values, computes
nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require

Ranges = tuple[tuple[int, int], ...]
"""Columns (first, end), one range behind the other."""


@dataclass(frozen=True)
class Gather(Operation):
    """x [T, …, n of this part] of every part: [T, …, width], on every part.

    ``parts[r]`` says which columns of the whole part r has, in the order in which it has them.
    """

    parts: tuple[Ranges, ...]
    rank: int
    """Which part this is."""
    kind = "gather"

    @property
    def width(self) -> int:
        """Columns of the whole."""
        return max(end for ranges in self.parts for _, end in ranges)

    def columns(self, rank: int) -> int:
        """Columns that a part has."""
        return sum(end - first for first, end in self.parts[rank])

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require("columns of the part", inputs[0].row[-1], self.columns(self.rank))
        return (Shape((*inputs[0].row[:-1], self.width), inputs[0].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        every = run.exchange(inputs[0])
        whole = np.empty((*inputs[0].shape[:-1], self.width), inputs[0].dtype)
        for ranges, piece in zip(self.parts, every, strict=True):
            at = 0
            for first, end in ranges:
                whole[..., first:end] = piece[..., at : at + end - first]
                at += end - first
        return (whole,)

    float64 = specification
