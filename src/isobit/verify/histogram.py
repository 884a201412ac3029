"""Value histograms of a stage in two runs, for the report."""

from dataclasses import dataclass, field

import numpy as np

from isobit.verify.arithmetic import Array

BINS = 40
SMALLEST, LARGEST = -12, 4  # powers of ten of |A - B|


@dataclass
class Histogram:
    """Counts of A's and B's values in equal bins, and of log10 |A - B|; added up over chunks.

    The first chunk sets the range of the values; later values beyond it count at its ends.
    """

    low: float = 0.0
    high: float = 0.0
    a: list[int] = field(default_factory=lambda: [0] * BINS)
    b: list[int] = field(default_factory=lambda: [0] * BINS)
    difference: list[int] = field(default_factory=lambda: [0] * BINS)
    """Of values that differ, bins from 10^SMALLEST to 10^LARGEST."""

    def add(self, a: Array, b: Array) -> None:
        """Count the finite values of another chunk."""
        x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        if not x.size:
            return
        if self.low == self.high:
            self.low = float(min(x.min(), y.min()))
            self.high = max(float(max(x.max(), y.max())), self.low + 1e-30)
        self.a = _added(self.a, x, self.low, self.high)
        self.b = _added(self.b, y, self.low, self.high)
        d = np.abs(x - y)
        self.difference = _added(self.difference, np.log10(d[d > 0]), SMALLEST, LARGEST)


def _added(counts: list[int], x: Array, low: float, high: float) -> list[int]:
    place = ((x - low) / (high - low) * BINS).astype(np.int64).clip(0, BINS - 1)
    more: list[int] = (np.array(counts) + np.bincount(place, minlength=BINS)).tolist()
    return more
