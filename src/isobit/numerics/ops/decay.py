"""Decay: how much of a delta net's state a token keeps, as a logarithm (docs/numerics.md,
section 12)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require
from isobit.numerics.pointwise import exp

_ODD = [np.float32(1 / k) for k in (15, 13, 11, 9, 7, 5, 3, 1)]


def softplus(x: Array) -> Array:
    """log(1 + e^x) as specified, float32: max(x, 0) + log1p(exp(-|x|))."""
    u = exp(-np.abs(x))
    s = u / (np.float32(2) + u)
    z = s * s
    p = np.full_like(z, _ODD[0])
    for c in _ODD[1:]:
        p = p * z + c
    out: Array = np.maximum(x, np.float32(0)) + (s + s) * p
    return out


@dataclass(frozen=True)
class Decay(Operation):
    """a [T, heads]; the weights dt [heads] and A [heads], A < 0: softplus(a + dt) * A."""

    kind = "decay"
    per_vector = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        for w in weights:
            require(f"length of {w.name}", w.shape, (inputs[0].width,))
        return (Shape((inputs[0].width,), inputs[0].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        dt, a = (w.float32() for w in weights)
        return (softplus(inputs[0] + dt) * a,)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        dt, a = (w.float32().astype(np.float64) for w in weights)
        return (np.logaddexp(0, inputs[0] + dt) * a,)
