"""RoPE tables that do not depend on a platform's libm (docs/numerics.md, section 8)."""

from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache
from math import factorial

import numpy as np
from numpy.typing import NDArray

from isobit.numerics.pointwise import F32

F64 = NDArray[np.float64]

_TWO_OVER_PI = 2 / np.pi
_C1, _C2, _C3 = np.array(
    [0x3FF921FB40000000, 0x3E74442D00000000, 0x3CF8469898CC5170], np.uint64
).view(np.float64)
_SIN = [(-1) ** (k // 2) / factorial(k) for k in range(17, 0, -2)]
_COS = [(-1) ** (k // 2) / factorial(k) for k in range(16, -1, -2)]


@dataclass(frozen=True)
class RopeTable:
    """The angles of a model: for head vectors of ``size`` values, base^(-2i/size) a position."""

    size: int
    base: float

    def rows(self, start: int, stop: int) -> tuple[F32, F32]:
        """Cosines and sines of positions start … stop - 1, float32 [count, size / 2]."""
        return rope_table(_frequencies(self), start, stop)


@cache
def _frequencies(table: RopeTable) -> F64:
    return inverse_frequencies(table.size, table.base)


def inverse_frequencies(head_dim: int, base: float) -> F64:
    """base^(-2i/head_dim) for i < head_dim/2, correctly rounded to binary64."""
    with localcontext() as context:
        context.prec = 60
        b = Decimal(base)
        values = [float(b ** (Decimal(-2 * i) / head_dim)) for i in range(head_dim // 2)]
    return np.array(values, np.float64)


def rope_table(frequencies: F64, start: int, stop: int) -> tuple[F32, F32]:
    """Cosines and sines for positions start … stop-1: two float32 [stop - start, head_dim / 2]."""
    angle = np.arange(start, stop, dtype=np.float64)[:, None] * frequencies
    n = np.rint(angle * _TWO_OVER_PI)
    r = ((angle - n * _C1) - n * _C2) - n * _C3
    r2 = r * r
    sin = _horner(_SIN, r2) * r
    cos = _horner(_COS, r2)
    quadrant = n.astype(np.int64) & 3
    swap = (quadrant & 1).astype(bool)
    c = np.where(swap, sin, cos) * np.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0)
    s = np.where(swap, cos, sin) * np.where(quadrant >= 2, -1.0, 1.0)
    return c.astype(np.float32), s.astype(np.float32)


def _horner(coefficients: list[float], x: F64) -> F64:
    p = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        p = p * x + c
    return p
