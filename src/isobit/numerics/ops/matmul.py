"""Matrix products with a model's weights (docs/numerics.md, section 4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight, matmul
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require

_UNPACKED = 1 << 24  # values of a weight that the float64 form holds at a time


def product(run: Context, w: Weight, x: Array) -> Array:
    """``x @ w.T`` as specified: x float32 [T, K], w [N, K]."""
    return matmul(w, np.ascontiguousarray(x), run.planes, run.integers)


def product_float64(run: Context, w: Weight, x: Array) -> Array:
    """``x @ w.T`` in float64, so many rows of w at a time that they are unpacked in 128 MiB."""
    x, step = x.astype(np.float64), max(1, _UNPACKED // w.shape[1])
    starts = range(0, w.shape[0], step)
    parts = [x @ run.doubles(w.rows(i, min(i + step, w.shape[0]))).T for i in starts]
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class MatMul(Operation):
    """x [T, K] times each weight [N, K] transposed, the products side by side: [T, sum of N]."""

    kind = "matmul"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        for w in weights:
            require(f"columns of {w.name}", w.shape[1], inputs[0].width)
        require("the input's axes", len(inputs[0].row), 1)
        return (Shape((sum(w.shape[0] for w in weights),), inputs[0].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (np.concatenate([product(run, w, inputs[0]) for w in weights], axis=1),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (np.concatenate([product_float64(run, w, inputs[0]) for w in weights], axis=1),)


@dataclass(frozen=True)
class ExpertMatMul(Operation):
    """x [T, K] or [T, k, K] and ids int32 [T, k]: each through its expert of the weight
    [experts, N, K]: [T, k, N]."""

    part: tuple[int, int] | None = None
    """The weight has experts first … end - 1 alone; rows of others are zero, or anything."""
    kind = "expert_matmul"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        x, ids = inputs
        experts, rows, columns = weights[0].shape
        require(f"columns of {weights[0].name}", columns, x.row[-1])
        first, end = self.part or (0, ids.below or 0)
        require(f"experts of {weights[0].name}", experts, end - first)
        require("the last expert", end <= (ids.below or 0), True)
        return (Shape((*ids.row, rows), x.rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (self.each(product, run, weights[0], *inputs, part=self.part),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (self.each(product_float64, run, weights[0], *inputs, part=self.part),)

    @staticmethod
    def each(
        multiply: Callable[[Context, Weight, Array], Array],
        run: Context,
        stack: Weight,
        x: Array,
        ids: Array,
        *,
        part: tuple[int, int] | None = None,
    ) -> Array:
        """Every token through its experts by a given product."""
        first, end = part or (0, stack.shape[0])
        out: Array = np.zeros((*ids.shape, stack.shape[1]), np.float32)
        for e in np.unique(ids[(first <= ids) & (ids < end)]).tolist():
            at = np.nonzero(ids == e)
            y = multiply(run, stack.expert(e - first), x[at[0]] if x.ndim == 2 else x[at])
            out = out.astype(y.dtype, copy=False)
            out[at] = y
        return out
