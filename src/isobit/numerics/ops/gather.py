"""Gathers: what each part of a split model has of a value, put together. They move values, and
compute nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require

Ranges = tuple[tuple[int, int], ...]
"""Columns (first, end), one range behind the other."""


def together(parts: Sequence[Ranges], pieces: Sequence[Array], axis: int) -> Array:
    """Every part's piece in its places along an axis of the whole."""
    shape = list(pieces[0].shape)
    shape[axis] = max(end for ranges in parts for _, end in ranges)
    whole = np.empty(shape, pieces[0].dtype)
    out = np.moveaxis(whole, axis, 0)
    for ranges, piece in zip(parts, pieces, strict=True):
        at = 0
        for first, end in ranges:
            out[first:end] = np.moveaxis(piece, axis, 0)[at : at + end - first]
            at += end - first
    return whole


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
        return (together(self.parts, run.exchange(inputs[0]), axis=-1),)

    float64 = specification


def of_experts(bounds: Sequence[int], pieces: Sequence[Array], ids: Array) -> Array:
    """Of pieces [T, k, N] each row from the part that has its expert: ids [T, k]."""
    part = np.searchsorted(np.array(bounds), ids, side="right") - 1
    rows, ranks = np.indices(ids.shape)
    whole: Array = np.stack(pieces)[part, rows, ranks]
    return whole


@dataclass(frozen=True)
class GatherExperts(Operation):
    """x [T, k, N], of which every part has the rows of its experts, and ids int32 [T, k]: all rows,
    on every part.

    Part r has experts ``bounds[r]`` … ``bounds[r + 1]`` - 1.
    """

    bounds: tuple[int, ...]
    rank: int
    """Which part this is."""
    kind = "gather_experts"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        x, ids = inputs
        require("ids", ids.row, x.row[:-1])
        require("experts", ids.below, self.bounds[-1])
        return (x,)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        x, ids = inputs
        return (of_experts(self.bounds, run.exchange(x), ids),)

    float64 = specification
