"""How many tokens of prompts may run beside generations, so that these wait little for them.

Pure: it is told how long passes took. What runs together changes no bit, so that it may follow
from a clock.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHARE = 0.45
"""So much longer may a step take for a prompt beside it: a little less than the half that is
promised, since passes of one kind differ among themselves."""
_RECENT = 64  # passes
_LOOK = 7
"""After so many passes with prompts is one without: else nobody knew what these cost."""
_BEFORE = 0.1  # of the weight of one pass


class Ran(NamedTuple):
    """A pass."""

    generating: int
    prompt: int
    """Tokens of prompts."""
    attended: int
    """Positions that all its tokens attended to."""
    seconds: float


class Pace:
    """What passes have cost lately: so much each, for a generation, for a token of a prompt, and
    for a position that a token attends to."""

    def __init__(self) -> None:
        self._passes: deque[Ran] = deque(maxlen=_RECENT)
        self._known: NDArray[np.float64] | None = None

    def ran(self, generating: int, prompt: int, attended: int, seconds: float) -> None:
        """A pass took so long."""
        self._passes.append(Ran(generating, prompt, attended, seconds))

    def beside(self, generating: int, attended: int, prompts: int, position: int) -> int:
        """Tokens of prompts that a step of generations may have beside it; now and then none, else
        at least one.

        attended: positions that the generations attend to. prompts: how many there are; beyond the
        first each has the share of one that generates: where many wait, those that generate would
        else be few for long, and few together cost more. position: of the next token of a prompt.
        """
        latest = [ran.prompt for ran in self._passes if ran.generating][-_LOOK:]
        if len(latest) == _LOOK and all(latest):
            return 0
        # At first half as many: a token of a prompt costs hardly more than one that is generated.
        # Then twice as many as were seen: what they cost is learned on the way.
        seen = max((n for among, n, *_ in self._passes if among), default=0)
        most = 2 * seen or max(generating // 2, 1)
        if any(n for _, n, *_ in self._passes):
            fixed, each, token, attending = self._costs()
            step = fixed + each * generating + attending * attended
            token += attending * position
            if step > 0 and token > 0:
                most = min(most, int(max(SHARE, (prompts - 1) / generating) * step / token))
        return max(most, 1)

    def _costs(self) -> list[float]:
        """Seconds of each kind.

        Least squares of relative errors, so that a pass that something else held up counts for
        little. What was found before counts for a little, too: passes that are all alike do not say
        what their parts cost.
        """
        passes = np.array(self._passes)
        seconds = np.maximum(passes[:, 3], 1e-9)
        kinds = np.column_stack([np.ones(len(passes)), passes[:, :3]])
        most = seconds.mean() / np.maximum(kinds.mean(axis=0), 1e-9)
        before = most / len(most) if self._known is None else self._known
        rows = np.vstack([kinds / seconds[:, None], np.diag(_BEFORE / before)])
        sums = np.append(np.ones(len(passes)), np.full(len(most), _BEFORE))
        found, *_ = np.linalg.lstsq(rows, sums)
        self._known = np.clip(found, most / 50, most)
        return [float(cost) for cost in found]
