"""RoPE tables that do not depend on a platform's libm (docs/numerics.md, section 8)."""

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from functools import cache
from math import factorial

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32

F64 = NDArray[np.float64]

_TWO_OVER_PI = 2 / np.pi
_C1, _C2, _C3 = np.array(
    [0x3FF921FB40000000, 0x3E74442D00000000, 0x3CF8469898CC5170], np.uint64
).view(np.float64)
_SIN = [(-1) ** (k // 2) / factorial(k) for k in range(17, 0, -2)]
_COS = [(-1) ** (k // 2) / factorial(k) for k in range(16, -1, -2)]


@dataclass(frozen=True)
class Yarn:
    """YaRN's stretching of a context (Peng et al., 2023): pairs that turn fast stay, those that
    turn slowly are divided by ``factor``, with a ramp between."""

    factor: float
    original_context: int
    attention_factor: float = 1.0
    """What cosines and sines are multiplied by besides 1 + 0.1 ln(factor)."""
    fast: float = 32.0
    slow: float = 1.0
    """Turns in the original context from which on a pair stays, and up to which it is divided."""


@dataclass(frozen=True)
class RopeTable:
    """The angles of a model: for head vectors of which ``size`` values turn, base^(-2i/size) a
    position, divided by ``factors[i]``, and as ``yarn`` says."""

    size: int
    base: float
    factors: tuple[float, ...] | None = None
    yarn: Yarn | None = None

    def rows(self, start: int, stop: int) -> tuple[F32, F32]:
        """Cosines and sines of positions start … stop - 1, float32 [count, size / 2]."""
        frequencies, scale = _frequencies(self)
        return rope_table(frequencies, start, stop, scale)

    def float64(self) -> tuple[F64, float]:
        """The angle of each pair a position, by binary64 power; what cosines and sines are scaled
        by."""
        exact, scale = _frequencies(self)
        plain = self.base ** (-np.arange(0, self.size, 2) / self.size)
        return exact / inverse_frequencies(self.size, self.base) * plain, scale


@cache
def _frequencies(table: RopeTable) -> tuple[F64, float]:
    """The angle of each pair a position, and what cosines and sines are multiplied by."""
    inv = inverse_frequencies(table.size, table.base)
    if table.factors is not None:
        inv = inv / np.array(table.factors, np.float64)
    if (y := table.yarn) is None:
        return inv, 1.0
    with localcontext() as context:
        context.prec = 60
        pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494")

        def pair(turns: float) -> Decimal:
            ratio = Decimal(y.original_context) / (Decimal(turns) * 2 * pi)
            return table.size * ratio.ln() / (2 * Decimal(table.base).ln())

        low = max(0, int(pair(y.fast).to_integral_value(ROUND_FLOOR)))
        high = min(table.size - 1, int(pair(y.slow).to_integral_value(ROUND_CEILING)))
        span = max(Decimal(high - low), Decimal("0.001"))
        stay = [
            float(1 - min(Decimal(1), max(Decimal(0), (i - low) / span)))
            for i in range(table.size // 2)
        ]
        scale = float(Decimal(y.attention_factor) * (1 + Decimal("0.1") * Decimal(y.factor).ln()))
    ramp = np.array(stay, np.float64)
    return inv * (ramp + (1.0 - ramp) / y.factor), scale


@cache
def inverse_frequencies(head_dim: int, base: float) -> F64:
    """base^(-2i/head_dim) for i < head_dim/2, correctly rounded to binary64."""
    with localcontext() as context:
        context.prec = 60
        b = Decimal(base)
        values = [float(b ** (Decimal(-2 * i) / head_dim)) for i in range(head_dim // 2)]
    return np.array(values, np.float64)


def rope_table(frequencies: F64, start: int, stop: int, scale: float = 1.0) -> tuple[F32, F32]:
    """Cosines and sines for positions start … stop-1, times ``scale``: two float32 [stop - start,
    head_dim / 2]."""
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
    if scale != 1.0:
        c, s = c * scale, s * scale
    return c.astype(np.float32), s.astype(np.float32)


def _horner(coefficients: list[float], x: F64) -> F64:
    p = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        p = p * x + c
    return p
