"""Version 1 of choosing a token, for the replay of receipts of format 1 and for nothing else.

After penalty and temperature as today, in binary64: C_i = p_1 + … + p_i in descending order, the
first i with C_i >= top_p * C_n kept and those before it; of these the ones with p_i >= min_p; drawn
is the first with C_i > u * C_kept, u being the next 53 bits of NumPy's ``Philox(seed)``.
"""

from collections.abc import Sequence

import numpy as np

from isobit.backends.base import F32
from isobit.numerics import exp
from isobit.runtime.sampler import Sampling

_NEGLIGIBLE = np.float32(40)


class SamplerV1:
    """Draws one token after another for one sequence."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._random = np.random.Philox(sampling.seed)
        self._history = list(prompt)

    def append(self, token: int) -> None:
        """The sequence goes on with a token."""
        self._history.append(token)

    def choose(self, logits: F32, _rows: object = None) -> int:
        """The next token id from logits float32 [vocabulary]."""
        s = self.sampling
        if s.repeat_penalty != 1.0:
            logits = _penalised(logits, self._history, np.float32(s.repeat_penalty))
        if s.temperature == 0.0:
            return int(np.argmax(logits))
        with np.errstate(over="ignore"):
            below = (logits.max() - logits) / np.float32(s.temperature)
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
