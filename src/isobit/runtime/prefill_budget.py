"""How many tokens of prompts may run beside generations, so that these wait little for them.

Pure: it is told how long passes took. What runs together changes no bit, so that it may follow
from a clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHARE = 0.45
"""So much longer may a step take for a prompt beside it: a little less than the half that is
promised, since passes of one kind differ among themselves."""
THRIFT = 1.0
"""So many times what it costs in a pass of its own may a token of a prompt cost beside a step, on a
device whose passes of few tokens cost almost as much as those of many, as they read as many
weights: one that reads prompts in crumbs does little else."""
WHOLE = 512
"""Tokens of a prompt's own pass."""
RARELY = 150
"""Where one token of a prompt makes a step too long, a piece of the prompt runs in one pass of so
many: fewer than one in a hundred, whose time nobody was promised."""
STALL = 1.0, 16
"""A piece takes no longer than so many seconds, or as so many steps if that is more."""
_PIECE = 16  # tokens of one at least
_RECENT = 64  # passes
_REFIT = 8  # passes
_LOOK = 7
"""After so many passes with prompts is one without: else nobody knew what these cost."""
_BEFORE = 0.1  # of the weight of one pass


class PassTiming(NamedTuple):
    """A pass."""

    generating: int
    prompt: int
    """Tokens of prompts."""
    attended: int
    """Positions that all its tokens attended to."""
    seconds: float


class PrefillBudget:
    """What passes have cost lately: so much each, for the experts that are read, for a generation,
    for a token of a prompt, and for a position that a token attends to."""

    def __init__(self, sizes: Sequence[int] = (), used: float = 0.0) -> None:
        """sizes: ascending numbers of tokens that passes are padded to, up to the last; those of a
        device that THRIFT is for. used: the share of its experts that it reads for one token, if
        there are any."""
        self._sizes, self._used = sizes, used if sizes else 0.0
        self.steady = not sizes
        """Whether only those count that generate."""
        self._passes: deque[PassTiming] = deque(maxlen=_RECENT)
        self._with_prompts: deque[PassTiming] = deque(maxlen=_LOOK)
        """The last generations beside prompts, however long ago."""
        self._without = False
        """Whether a pass without prompts is asked for that has not run yet."""
        self._known: NDArray[np.float64] | None = None
        self._fit: NDArray[np.float64] | None = None
        """What was found in the last ``_REFIT`` passes."""
        self._age = 0
        self._dear: tuple[int, int] | None = None
        """Of how many generations and prompts it was that one token made a step too long."""
        self._since_piece = RARELY
        self._asked = False
        """Whether a piece is about to run."""
        self._piece = _PIECE, 0.0
        """Tokens and seconds of the last pass of many."""

    def ran(self, generating: int, prompt: int, attended: int, seconds: float) -> None:
        """A pass took so long."""
        if generating:
            self._since_piece = min(self._since_piece + 1, 2 * RARELY)
        if prompt >= _PIECE and (self._asked or not generating):
            self._piece = prompt, seconds
        if generating and prompt and self._asked:  # says nothing of a few tokens
            self._asked = False
            return
        self._age += 1
        last = self._passes[-1] if self._passes else None
        if last and (last.generating != generating or prompt > last.prompt):
            self._fit = None  # of what is new it says less
        self._passes.append(PassTiming(generating, prompt, attended, seconds))
        if generating and not prompt:
            self._without = False
        if generating and prompt:
            self._with_prompts.append(self._passes[-1])

    def tokens(self, generating: int, attended: int, prompts: int, position: int) -> int:
        """Tokens of prompts that a step of generations may have beside it; now and then none, or
        where a single one would make it too long, mostly none.

        attended: positions that the generations attend to. prompts: how many there are; beyond the
        first each has the share of one that generates: where many wait, those that generate would
        else be few for long, and few together cost more. position: of the next token of a prompt.
        """
        dear = self._dear == (generating, prompts) and self._since_piece < RARELY
        if dear and self._since_piece % _REFIT:  # looked at again now and then
            return 0
        latest = [ran.prompt for ran in self._passes if ran.generating][-_LOOK:]
        if len(latest) == _LOOK and all(latest) and not self._without:
            self._without = True
            return 0
        # At first half as many: a token of a prompt costs hardly more than one that is generated.
        # Then twice as many as were seen: what they cost is learned on the way.
        seen = max((ran.prompt for ran in self._with_prompts), default=0)
        most = 2 * seen or max(generating // 2, 1)
        if self._with_prompts or any(ran.prompt for ran in self._passes):
            share = max(SHARE, (prompts - 1) / generating)
            if not self.steady:  # whoever waits for the first token counts as much
                share = max(share, SHARE * prompts)
            few, step = self._most(generating, attended, position, share, most)
            self._dear = None if few else (generating, prompts)
            if not few:
                return self._of_piece(step)
            most = min(most, few)
        return self._filled(generating, max(most, 1))

    def _most(
        self, generating: int, attended: int, position: int, share: float, most: int
    ) -> tuple[int, float]:
        """Tokens for which a step takes so much longer, of so many at most; more if they would cost
        too much each. And the seconds of a step."""
        n = np.arange((most if self.steady else WHOLE) + 1)
        costs = self._costs()
        with_n = self._kinds(np.full_like(n, generating), n, attended + position * n) @ costs
        step, longer = with_n[0], with_n[1:] - with_n[0]
        if min(step, longer[-1]) <= 0:  # nobody knows yet
            return most, step
        few = int((longer <= share * step).sum())
        if self.steady:
            return few, step
        alone = self._kinds(n[:1], n[-1:], position * n[-1:]) @ costs
        dear = longer * WHOLE > THRIFT * alone * n[1:]
        return max(few, min(int(dear.sum()) + 1, WHOLE)), step

    def _of_piece(self, step: float) -> int:
        """Tokens of a piece, if it is time for one: all pieces together lengthen steps no more than
        tokens beside each of them may."""
        if self._since_piece < RARELY:
            return 0
        self._since_piece -= RARELY
        self._asked = True
        tokens, seconds = self._piece
        least, steps = STALL
        worth = min(SHARE * RARELY * step, max(least, steps * step))
        affordable = int(worth * tokens / seconds) if seconds else WHOLE
        return min(max(affordable, _PIECE), 4 * tokens, WHOLE)

    def _filled(self, generating: int, prompt: int) -> int:
        """As many as fill a padded pass: they cost nothing, but in the next size up some time."""
        total, last = generating + prompt, max(self._sizes, default=0)
        at = bisect_left(self._sizes, total)
        if total > last:  # which is queued launch by launch: not for a few more
            return last - generating if generating < last and 2 * total < 3 * last else prompt
        if self.steady and total < self._sizes[at] and at and self._sizes[at - 1] > generating:
            at -= 1
        return self._sizes[at] - generating

    def _kinds(
        self, generating: NDArray[np.int64], prompt: NDArray[np.int64], attended: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """What passes [n] are made of: [n, kinds]."""
        parts = [np.ones(len(prompt)), generating, prompt, attended]
        if self._used:  # experts that some token is sent to, if each were sent anywhere
            parts.append(1 - (1 - self._used) ** (generating + prompt))
        return np.column_stack(parts)

    def _costs(self) -> NDArray[np.float64]:
        """Seconds of each kind.

        Least squares of relative errors, so that a pass that something else held up counts for
        little. What was found before counts for a little, too: passes that are all alike do not say
        what their parts cost.
        """
        if self._fit is not None and self._age < _REFIT:
            return self._fit
        lately = [*self._passes]
        if not any(ran.generating and ran.prompt for ran in lately):
            lately += self._with_prompts
        passes = np.array(lately)
        seconds = np.maximum(passes[:, 3], 1e-9)
        kinds = self._kinds(*passes[:, :3].T)
        most = seconds.mean() / np.maximum(kinds.mean(axis=0), 1e-9)
        before = most / len(most) if self._known is None else self._known
        rows = np.vstack([kinds / seconds[:, None], np.diag(_BEFORE / before)])
        sums = np.append(np.ones(len(passes)), np.full(len(most), _BEFORE))
        found: NDArray[np.float64]
        found, *_ = np.linalg.lstsq(rows, sums)
        self._known = np.clip(found, most / 50, most)
        if len(passes) >= _REFIT:
            self._fit, self._age = found, 0
        return found
