"""Choosing the next token from logits: seeded, and the same on every backend.

Equal logits bits give equal tokens everywhere: the arithmetic is binary32 with the specification's
exp, sums are sequential in binary64, and random numbers are the raw output of Philox 4x64.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from isobit.backends.base import F32
from isobit.errors import UsageError
from isobit.numerics import exp

_NEGLIGIBLE = np.float32(40)  # e^-40: less likely than 4e-18 of the likeliest is never drawn


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy."""

    temperature: float = 0.0
    """0 takes the largest logit (the lowest id among equals)."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest."""
    repeat_penalty: float = 1.0
    """Divide positive (multiply negative) logits of tokens already in the sequence by this."""
    seed: int | None = None
    """None draws a seed; it is reported with the completion."""

    @property
    def likeliest_only(self) -> bool:
        """Whether every token is the largest logit's, whatever came before."""
        return self.temperature == 0.0 and self.repeat_penalty == 1.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        possible = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6
        _check("temperature", self.temperature, possible, "that is 0, or from 1e-6 to 1e6")
        possible = isinstance(self.top_k, Integral) and self.top_k >= 0
        _check("top_k", self.top_k, possible, "that is whole, >= 0")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        possible = 1e-6 <= self.repeat_penalty <= 1e6
        _check("repeat_penalty", self.repeat_penalty, possible, "from 1e-6 to 1e6")
        if self.seed is not None:
            possible = isinstance(self.seed, Integral) and 0 <= self.seed < 1 << 64
            _check("seed", self.seed, possible, "that is whole, in [0, 2^64)")


def _check(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name}: expected a number {expected}, got {value!r}")


class Sampler:
    """Draws one token after another for one sequence."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._random = np.random.Philox(self.seed)

    def choose(self, logits: F32, history: Sequence[int]) -> int:
        """The next token id from logits float32 [vocabulary] after the ids in ``history``."""
        s = self.sampling
        if s.repeat_penalty != 1.0:
            logits = _penalised(logits, history, np.float32(s.repeat_penalty))
        if s.temperature == 0.0:
            return int(np.argmax(logits))
        with np.errstate(over="ignore"):
            below = (logits.max() - logits) / np.float32(s.temperature)
        # Only values are sorted, a sixth of the time that an order of ids takes: among equals the
        # ids are in order, so that the place of what was drawn tells which it is.
        values = below[below <= _NEGLIGIBLE]
        if 0 < s.top_k < len(values):
            values = np.partition(values, s.top_k - 1)[: s.top_k]
        values.sort()
        p = exp(-values).astype(np.float64)
        sums = np.cumsum(p)
        keep = int(np.searchsorted(sums, s.top_p * sums[-1])) + 1
        if s.min_p:
            keep = min(keep, int(np.count_nonzero(p >= s.min_p)))
        sums = sums[:keep]
        u = float(self._random.random_raw() >> 11) * 2.0**-53
        drawn = np.searchsorted(sums, u * sums[-1], side="right")  # u <= 1 - 2^-53: below the last
        value = values[drawn]
        among_equals = drawn - np.searchsorted(values, value)
        return int(np.flatnonzero(below == value)[among_equals])


def _penalised(logits: F32, history: Sequence[int], penalty: np.float32) -> F32:
    seen = np.unique(np.array(history, np.int64))
    out = logits.copy()
    with np.errstate(over="ignore"):
        out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    largest = np.finfo(np.float32).max
    return out.clip(-largest, largest)  # the difference of two infinities would be no number
