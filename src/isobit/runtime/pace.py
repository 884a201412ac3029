"""How many tokens of prompts may run beside generations, so that these wait little for them.

Pure: it is told how long passes took. What runs together changes no bit, so that it may follow
from a clock.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

SHARE = 0.4
"""So much longer may a step take for a prompt beside it: less than the half that is promised, since
passes of one kind differ among themselves."""
_RECENT = 64  # passes
_BEFORE = 0.1  # of the weight of one pass


class Pace:
    """What passes have cost lately: so much each, for a generation, and for a token of a prompt."""

    def __init__(self) -> None:
        self._passes: deque[tuple[int, int, float]] = deque(maxlen=_RECENT)
        """(generating, tokens of prompts, seconds)."""
        self._known: NDArray[np.float64] | None = None

    def beside(self, generating: int, prompts: int = 1) -> int:
        """Tokens of so many prompts that a step of generations may have beside it; at least one.

        Beyond the first prompt each has the share of one that generates: where many wait, those
        that generate would else be few for long, and few together cost more.
        """
        # At first half as many: a token of a prompt costs hardly more than one that is generated.
        # Then twice as many as were seen: what they cost is learned on the way.
        seen = max((n for among, n, _ in self._passes if among), default=0)
        most = 2 * seen or max(generating // 2, 1)
        if not any(n for _, n, _ in self._passes):
            return most
        fixed, each, token = self._costs()
        step = fixed + each * generating
        if step > 0 and token > 0:
            most = min(most, int(max(SHARE, (prompts - 1) / generating) * step / token))
        return max(most, 1)

    def ran(self, generating: int, prompt: int, seconds: float) -> None:
        """A pass of so many generations, and tokens of prompts, took so long."""
        self._passes.append((generating, prompt, seconds))

    def _costs(self) -> list[float]:
        """Seconds of a pass, of a generation in it, of a token.

        Least squares of relative errors, so that a pass that something else held up counts for
        little. What was found before counts for a little, too: passes that are all alike do not say
        what their parts cost.
        """
        passes = np.array(self._passes)
        seconds = np.maximum(passes[:, 2], 1e-9)
        kinds = np.column_stack([np.ones(len(passes)), passes[:, :2]])
        most = seconds.mean() / np.maximum(kinds.mean(axis=0), 1e-9)
        before = most / len(most) if self._known is None else self._known
        rows = np.vstack([kinds / seconds[:, None], np.diag(_BEFORE / before)])
        sums = np.append(np.ones(len(passes)), np.full(len(most), _BEFORE))
        found, *_ = np.linalg.lstsq(rows, sums)
        self._known = np.clip(found, most / 50, most)
        return [float(cost) for cost in found]
