"""How many tokens of prompts may run beside generations, so that these wait little for them.

Pure: it is told how long passes took. What runs together changes no bit, so that it may follow
from a clock.
"""

from __future__ import annotations

from collections import deque

import numpy as np

SHARE = 0.4
"""So much longer may a step take for a prompt beside it: less than the half that is promised, since
passes of one kind differ among themselves."""
FIRST = 16
"""Tokens of prompts in a step while it is not known what they cost."""
_RECENT = 32  # passes of each kind


class Pace:
    """What passes have cost lately: so much each, for a generation, and for a token of a prompt."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=_RECENT)
        self._prompts: deque[tuple[int, int, float]] = deque(maxlen=_RECENT)
        """(generating, tokens of prompts, seconds) of passes without such tokens, and with."""

    def beside(self, generating: int, prompts: int = 1) -> int:
        """Tokens of so many prompts that a step of generations may have beside it; at least one.

        Beyond the first prompt each has the share of one that generates: where many wait, those
        that generate would else be few for long, and few together cost more.
        """
        if not self._prompts:
            return FIRST
        # Twice as many as were seen beside others: what a token costs is learned on the way.
        most = 2 * max((n for among, n, _ in self._prompts if among), default=FIRST // 2)
        fixed, each, token = self._costs()
        step = fixed + each * generating
        if step > 0 and token > 0:
            most = min(most, int(max(SHARE, (prompts - 1) / generating) * step / token))
        return max(most, 1)

    def ran(self, generating: int, prompt: int, seconds: float) -> None:
        """A pass of so many generations, and tokens of prompts, took so long."""
        (self._prompts if prompt else self._steps).append((generating, prompt, seconds))

    def _costs(self) -> list[float]:
        """Seconds of a pass, of a generation in it, of a token: least squares of relative errors,
        so that a pass that something else held up counts for nothing."""
        passes = np.array([*self._steps, *self._prompts])
        seconds = np.maximum(passes[:, 2], 1e-9)
        kinds = np.column_stack([np.ones(len(passes)), passes[:, :2]])
        found, *_ = np.linalg.lstsq(kinds / seconds[:, None], np.ones(len(passes)))
        return [float(cost) for cost in found]
