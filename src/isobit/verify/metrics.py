"""Figures for how far two tensors are apart.

Bits decide what is identical; everything else is computed in float64 from them.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from isobit.verify.arithmetic import Array

F64 = NDArray[np.float64]
_AT_ONCE = 1 << 22
"""Values that float64 copies are made of at a time: logits of a large vocabulary are many."""
WORST = 5
"""Values kept that are furthest apart, for each tensor."""


@dataclass
class WorstValue:
    """One value that differs: its token's position, its index in that token's row, both sides."""

    position: int
    index: int
    a: float
    b: float

    def shown(self) -> list[str]:
        """Position, index, both values and how far apart they are; none hides a difference."""
        with np.errstate(over="ignore"):
            x, y = np.float32(self.a), np.float32(self.b)
        apart = f"{abs(self.a - self.b):.3g}"
        if float(x) == self.a and float(y) == self.b:
            apart += f" ({int(ulp_distance(np.array([x]), np.array([y]))[0])} ulp)"
        return [str(self.position), str(self.index), exact(self.a), exact(self.b), apart]


def exact(x: float) -> str:
    """A value to nine digits with its bits in binary32; of binary64, all its digits.

    Nine digits tell any two values of binary32 apart, except zeros of two signs and NaNs.
    """
    with np.errstate(over="ignore"):
        value = np.float32(x)
    if float(value) == x or np.isnan(value):
        return f"{x:.9g} (0x{int(value.view(np.uint32)):08x})"
    return repr(x)


@dataclass
class Distance:
    """How far tensor A is from tensor B, added up part by part with :func:`measure`.

    B is the one measured against. Pairs with a NaN or an infinity count as differing unless their
    bits are equal, and take no part in the sums.
    """

    values: int = 0
    differing: int = 0
    """Values whose bits differ; of two types, see :func:`differing`."""
    max_ulp: int | None = 0
    """Largest distance in units in the last place; None where the types have none in common."""
    max_abs: float = 0.0
    nonfinite_a: int = 0
    nonfinite_b: int = 0
    first_position: int | None = None
    """Lowest position that differs."""
    worst: list[WorstValue] = field(default_factory=list)
    numbers: bool = True
    """Whether the values are quantities; expert ids are not, and have no cosine."""
    _finite: int = 0
    _aa: float = 0.0
    _bb: float = 0.0
    _ab: float = 0.0
    _dd: float = 0.0

    @property
    def identical(self) -> bool:
        """Whether every bit is equal."""
        return self.differing == 0

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle of A and B; None if one alone is zero, for ids or without numbers."""
        if not self.numbers or not self._finite:
            return None
        if self._dd == 0:
            return 1.0
        norm = math.sqrt(self._aa) * math.sqrt(self._bb)
        return self._ab / norm if norm else None

    @property
    def relative_rms(self) -> float | None:
        """RMS of A - B over that of B; None if B alone is zero, for ids or without numbers."""
        if not self.numbers or not self._finite:
            return None
        if self._dd == 0:
            return 0.0
        return math.sqrt(self._dd / self._bb) if self._bb else None

    def add(self, a: Array, b: Array, positions: NDArray[np.int32]) -> None:
        """Add the tokens of another part: a, b of equal shape [T, …], positions int32 [T]."""
        for rows in _blocks(a):
            self._add(a[rows], b[rows], positions[rows])

    def _add(self, a: Array, b: Array, positions: NDArray[np.int32]) -> None:
        self.values += a.size
        self.numbers = a.dtype.kind == "f"
        differs = differing(a, b)
        count = int(np.count_nonzero(differs))
        self._add_sums(a, b, count)
        if not count:
            return
        self.differing += count
        rows = np.flatnonzero(differs.reshape(len(a), -1).any(axis=1))
        first = int(positions[rows].min())
        self.first_position = min(
            first, first if self.first_position is None else self.first_position
        )
        self._add_worst(a, b, differs, positions)

    def _add_sums(self, a: Array, b: Array, count: int) -> None:
        x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
        finite_x, finite_y = np.isfinite(x), np.isfinite(y)
        self.nonfinite_a += int(x.size - np.count_nonzero(finite_x))
        self.nonfinite_b += int(y.size - np.count_nonzero(finite_y))
        if self.nonfinite_a or self.nonfinite_b:
            finite = finite_x & finite_y
            x, y = x[finite], y[finite]
        self._finite += x.size
        self._bb += _dot(y, y)
        if not count:
            self._aa, self._ab = self._aa + _dot(y, y), self._ab + _dot(y, y)
            return
        d = x - y
        self._aa, self._ab = self._aa + _dot(x, x), self._ab + _dot(x, y)
        self._dd += _dot(d, d)
        self.max_abs = max(self.max_abs, float(np.abs(d).max(initial=0.0)))
        if a.dtype == b.dtype == np.float32 and self.max_ulp is not None:
            a32, b32 = x.astype(np.float32), y.astype(np.float32)
            self.max_ulp = max(self.max_ulp, int(ulp_distance(a32, b32).max(initial=0)))
        else:
            self.max_ulp = None

    def _add_worst(
        self, a: Array, b: Array, differs: NDArray[np.bool_], positions: NDArray[np.int32]
    ) -> None:
        with np.errstate(invalid="ignore"):
            d = np.abs(a.astype(np.float64) - b.astype(np.float64)).ravel()
        d = np.where(np.isnan(d), np.inf, d)
        d[~differs.ravel()] = -1
        top = np.argpartition(d, -min(WORST, d.size))[-WORST:]
        width = a[0].size
        for i in top[np.argsort(-d[top])].tolist():
            if d[i] >= 0:
                at = int(positions[i // width])
                self.worst.append(
                    WorstValue(at, i % width, float(a.ravel()[i]), float(b.ravel()[i]))
                )
        self.worst.sort(key=lambda w: -_gap(w))
        del self.worst[WORST:]


def differing(a: Array, b: Array) -> NDArray[np.bool_]:
    """Which values' bits differ; of floats of two types the bits in binary64, which has each."""
    if a.dtype != b.dtype and a.dtype.kind == b.dtype.kind == "f":
        a, b = a.astype(np.float64), b.astype(np.float64)
    found: NDArray[np.bool_] = _bits(a) != _bits(b)
    return found


def _blocks(a: Array) -> list[slice]:
    step = max(1, _AT_ONCE // max(1, a[:1].size))
    return [slice(i, i + step) for i in range(0, len(a), step)]


def _dot(x: F64, y: F64) -> float:
    """Not by BLAS, whose threads wait for each other longer than this takes."""
    return float(np.einsum("i,i->", x, y))


def _gap(w: WorstValue) -> float:
    gap = abs(w.a - w.b)
    return math.inf if math.isnan(gap) else gap


def _bits(a: Array) -> Array:
    a = np.ascontiguousarray(a)
    return a.view({4: np.uint32, 8: np.uint64}[a.itemsize]) if a.dtype.kind == "f" else a


def ulp_distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.int64]:
    """Representable float32 values between a and b, element by element; ±0 count as one value."""

    def ordered(x: NDArray[np.float32]) -> NDArray[np.int64]:
        bits = np.ascontiguousarray(x).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    distance: NDArray[np.int64] = np.abs(ordered(a) - ordered(b))
    return distance


def log_softmax(x: Array) -> F64:
    """Log softmax of the last axis in float64."""
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    out: F64 = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return out


def perplexity_of(nll: float, tokens: int) -> float:
    """exp of the mean negative log likelihood; infinite where that is more than a float holds."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def kl_divergence(p_logits: Array, q_logits: Array) -> F64:
    """KL(p || q) in nats of each row's softmax; logits [T, vocabulary]."""
    out = np.empty(len(p_logits))
    for rows in _blocks(p_logits):
        p, q = log_softmax(p_logits[rows]), log_softmax(q_logits[rows])
        out[rows] = (np.exp(p) * (p - q)).sum(axis=-1)
    return out


def router_margin(logits: Array, k: int) -> F64:
    """How far the first expert left out lies below the last chosen: (p_k - p_k+1) / p_k.

    logits [T, E]; float64 [T] from 0 (a tie) to 1 (also where no expert is left out).
    """
    if k >= logits.shape[1]:
        return np.ones(len(logits))
    z = -np.sort(-logits.astype(np.float64), axis=1)
    return -np.expm1(z[:, k] - z[:, k - 1])
