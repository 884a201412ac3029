"""How many tokens of prompts may run beside generations, so that these wait little for them.

Pure: it is told how long passes took. What runs together changes no bit, so that it may follow
from a clock.
"""

from __future__ import annotations

from collections import deque

SHARE = 0.4
"""So much longer may a step take for the prompts beside it: less than the half that is promised,
since passes of one kind differ among themselves."""
FIRST = 16
"""Tokens of prompts in a step while it is not known what they cost."""
_RECENT = 16  # passes; of these the quickest counts: what else the machine does only slows them


class Pace:
    """What passes have cost lately."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[float]] = {}
        """Seconds of steps without prompts, by the binary digits of how many generated."""
        self._tokens: deque[float] = deque(maxlen=_RECENT)
        """Seconds that each token of a prompt added."""

    def beside(self, generating: int) -> int:
        """Tokens of prompts that a step of so many generations may have beside it; at least one."""
        known = [kind for kind in self._steps if kind <= generating.bit_length()]
        if not known or not self._tokens:
            return FIRST
        step, token = min(self._steps[max(known)]), min(self._tokens)
        return max(int(SHARE * step / token), 1) if token else FIRST

    def ran(self, generating: int, prompt: int, seconds: float) -> None:
        """A pass of so many generations, and tokens of prompts, took so long."""
        kind = generating.bit_length()
        steps = self._steps.get(kind)
        if prompt and (steps or not generating):
            step = min(steps) if steps else 0.0
            self._tokens.append(max(seconds - step, seconds / 10) / prompt)
            return
        if prompt and not self._tokens:
            return
        if prompt:  # so many were never seen without a prompt
            seconds = max(seconds - min(self._tokens) * prompt, seconds / 4)
        self._steps.setdefault(kind, deque(maxlen=_RECENT)).append(seconds)
