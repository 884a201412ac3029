"""What passes cost, learnt from those that ran: of so many tokens, or of a padded size."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

_RECENT = 64  # passes
_KEPT = 7  # generations beside prompts
_BEFORE = 0.1  # of the weight of one pass
_BENT = 0.75
"""On an H200 what passes of 8 to 512 tokens take (Qwen3-30B-A3B) is within 6 % of a line between
these two, by their tokens to this power."""
_TRIED, _SURE, _LATELY = 3, 5, 9
"""After so many passes of a size it is known what it takes, after so many it is sure: the middle
one of the last so many, as the first two of a size may take longer (a graph is captured), and
whatever follows a long pass seems shorter."""


class PassTiming(NamedTuple):
    """A pass."""

    generating: int
    prompt: int
    """Tokens of prompts."""
    attended: int
    """Positions that all its tokens attended to."""
    seconds: float


class PassCosts(Protocol):
    """What passes cost."""

    def ran(self, timing: PassTiming) -> None:
        """A pass took so long."""

    def seconds(
        self, generating: int, prompt: NDArray[np.int64], attended: NDArray[np.int64]
    ) -> NDArray[np.float64] | None:
        """Of generations with so many tokens of prompts beside them, [n], the first without; None
        if nobody knows yet."""

    def sure(self, tokens: int) -> bool:
        """Whether passes of so many tokens, prompts among them, ran often enough."""


class LinearCosts:
    """So much for each pass, for a generation, for a token of a prompt, and for a position that a
    token attends to."""

    def __init__(self) -> None:
        self._passes: deque[PassTiming] = deque(maxlen=_RECENT)
        self._beside: deque[PassTiming] = deque(maxlen=_KEPT)
        """The last generations beside prompts, however long ago: they count twice."""
        self._known: NDArray[np.float64] | None = None

    def ran(self, timing: PassTiming) -> None:
        """A pass took so long."""
        self._passes.append(timing)
        if timing.generating and timing.prompt:
            self._beside.append(timing)

    def seconds(
        self, generating: int, prompt: NDArray[np.int64], attended: NDArray[np.int64]
    ) -> NDArray[np.float64] | None:
        """See :class:`PassCosts`."""
        if not self._beside and not any(ran.prompt for ran in self._passes):
            return None
        return _kinds(np.full_like(prompt, generating), prompt, attended) @ self._costs()

    def sure(self, tokens: int) -> bool:  # noqa: ARG002
        """Any pass tells of all."""
        return True

    def _costs(self) -> NDArray[np.float64]:
        """Seconds of each kind.

        Least squares of relative errors, so that a pass that something else held up counts for
        little. What was found before counts for a little, too: passes that are all alike do not say
        what their parts cost.
        """
        passes = np.array([*self._passes, *self._beside])
        seconds = np.maximum(passes[:, 3], 1e-9)
        kinds = _kinds(*passes[:, :3].T)
        most = seconds.mean() / np.maximum(kinds.mean(axis=0), 1e-9)
        before = most / len(most) if self._known is None else self._known
        rows = np.vstack([kinds / seconds[:, None], np.diag(_BEFORE / before)])
        sums = np.append(np.ones(len(passes)), np.full(len(most), _BEFORE))
        found, *_ = np.linalg.lstsq(rows, sums)
        self._known = np.clip(found, most / 50, most)
        costs: NDArray[np.float64] = found
        return costs


def _kinds(
    generating: NDArray[np.int64], prompt: NDArray[np.int64], attended: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What passes [n] are made of: [n, kinds]."""
    return np.column_stack([np.ones(len(prompt)), generating, prompt, attended])


class PaddedCosts:
    """So much for each size that passes are padded to, as it was lately. Between sizes that are
    known others are on a curve, as experts are shared by more tokens, and known once they ran."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._steps: dict[int, deque[float]] = {}
        """Of passes without prompts."""
        self._with: dict[int, deque[float]] = {}
        """Of those with."""

    def ran(self, timing: PassTiming) -> None:
        """A pass took so long."""
        kind = self._with if timing.prompt else self._steps
        size = self._padded(timing.generating + timing.prompt)
        kind.setdefault(size, deque(maxlen=_LATELY)).append(timing.seconds)

    def _padded(self, tokens: int) -> int:
        """Fewer than the smallest size have steps of their own."""
        at = bisect_left(self._sizes, tokens)
        return tokens if tokens < self._sizes[0] or at == len(self._sizes) else self._sizes[at]

    def seconds(
        self,
        generating: int,
        prompt: NDArray[np.int64],
        attended: NDArray[np.int64],  # noqa: ARG002
    ) -> NDArray[np.float64] | None:
        """See :class:`PassCosts`."""
        size = self._padded(generating)
        known = {n: _usual(took) for n, took in self._with.items() if len(took) >= _TRIED}
        steps = {n: _usual(took) for n, took in self._steps.items()}
        if not steps:
            return None
        ran = sorted(steps)
        step = float(np.interp(size, ran, [steps[n] for n in ran]))
        larger = sorted(n for n in known if n > size)
        if not larger or 2 * larger[-1] < self._sizes[-1]:
            return None
        took = np.maximum.accumulate([step, *(known[n] for n in larger)])
        total = np.append(size, generating + prompt[1:])
        at = np.array([size, *larger]) ** _BENT
        between: NDArray[np.float64] = np.interp(total**_BENT, at, took)
        beyond: NDArray[np.float64] = took[-1] / larger[-1] * total * (total > larger[-1])
        return np.maximum(between, beyond)

    def sure(self, tokens: int) -> bool:
        """See :class:`PassCosts`."""
        return len(self._with.get(self._padded(tokens), ())) >= _SURE


def _usual(took: Sequence[float]) -> float:
    return sorted(took)[(len(took) - 1) // 2]
