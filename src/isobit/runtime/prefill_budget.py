"""How many tokens of prompts may run beside generations, so that these wait little for them.

Pure: it is told how long passes took. What runs together changes no bit, so that it may follow
from a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHARE = 0.45
"""So much longer may a step take for each prompt that waits: a little less than the half that is
promised beside one, since passes of one kind differ among themselves."""
RARELY = 150
"""Where no two tokens of a prompt fit beside a step, a piece of it runs in one pass of so many:
fewer than one in a hundred, whose time nobody was promised."""
STALL = 1.0, 16
"""A piece takes no longer than so many seconds, or as so many steps if that is more."""
THRIFT = 1.0
"""So many times what it costs in a pass of its own may a token of a prompt cost beside a step, on a
device whose passes of few tokens cost almost as much as those of many, as they read as many
weights: one that reads prompts in crumbs does little else. A long prompt that waits alone is read
in crumbs all the same: it would hold up those who generate for long, and nobody waits behind it."""
WHOLE = 512
"""Tokens of a prompt's own pass; a prompt of more is long."""
_FEW = 16  # tokens of a piece, at least
_RECENT = 64  # passes
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
        self._sizes, self._used = np.array(sizes, np.int64), used if sizes else 0.0
        self.steady = not sizes
        """Whether no step takes longer than its share for a prompt, whatever that costs."""
        self._passes: deque[PassTiming] = deque(maxlen=_RECENT)
        self._with_prompts: deque[PassTiming] = deque(maxlen=_LOOK)
        """The last generations beside prompts, however long ago: they count twice."""
        self._known: NDArray[np.float64] | None = None
        self._turn = 0
        """So many answers in turn had tokens."""
        self._dear: tuple[int, int] | None = None
        """Of how many generations and prompts it was that no two tokens fitted."""
        self._long_end = 0
        """Where the last long prompt ends that was read alone."""
        self._since_piece = RARELY
        self._asked = 0
        """Tokens of a piece that has not run yet."""
        self._piece = _FEW, 0.0
        """Tokens and seconds of the last pass of many."""

    def ran(self, generating: int, prompt: int, attended: int, seconds: float) -> None:
        """A pass took so long."""
        piece = 0 < self._asked < 2 * prompt
        if generating:
            self._since_piece += 1
        if piece or (not generating and prompt >= _FEW):
            self._piece = prompt, seconds
        if generating and piece:  # says nothing of a few tokens
            self._asked = 0
            return
        self._passes.append(PassTiming(generating, prompt, attended, seconds))
        if generating and prompt:
            self._with_prompts.append(self._passes[-1])

    def tokens(self, generating: int, attended: int, prompts: int, left: int, position: int) -> int:
        """Tokens of prompts that a step of generations may have beside it; now and then none, or
        where a single one would make it too long, mostly none.

        attended: positions that the generations attend to. prompts, left: how many wait, and how
        many tokens of them: who waits for the first token counts as much as all who generate.
        position: of the next token of a prompt.
        """
        if self._dear == (generating, prompts) and self._since_piece < RARELY:
            return 0
        if self._turn == _LOOK:
            self._turn = 0
            return 0
        self._turn, self._dear = self._turn + 1, None
        if prompts == 1 and left > WHOLE:
            self._long_end = position + left
        thrifty = not self.steady and (prompts > 1 or position + left != self._long_end)
        return self._beside(generating, attended, prompts, position, thrifty)

    def _beside(
        self, generating: int, attended: int, prompts: int, position: int, thrifty: bool
    ) -> int:
        """thrifty: whether tokens may not cost more than in a pass of their own."""
        n = self._choices(generating)
        # At first half as many: a token of a prompt costs hardly more than one that is generated.
        # Then twice as many as were seen: what they cost is learned on the way.
        seen = max((ran.prompt for ran in self._with_prompts), default=0)
        most = int(np.searchsorted(n, min(2 * seen or max(generating // 2, 1), n[-1])))
        if not self._with_prompts and not any(ran.prompt for ran in self._passes):
            return int(n[most])
        costs = self._costs()
        passes = self._kinds(np.full_like(n, generating), n, attended + position * n) @ costs
        step, longer = passes[0], passes - passes[0]
        if min(step, longer[-1]) <= 0:  # nobody knows yet
            return int(n[most])
        share = SHARE * prompts * step
        few = int((longer <= share).sum()) - 1
        if thrifty:
            alone = self._kinds(n[:1], n[-1:], position * n[-1:]) @ costs
            dear = int((longer * n[-1] > THRIFT * alone * n).sum())
            return int(n[max(few, min(dear + 1, len(n) - 1))])
        if n[few] > 1:
            return int(n[min(few, most)])
        self._dear = generating, prompts
        return int(n[np.searchsorted(n, min(self._of_piece(share, step), n[-1]))])

    def _of_piece(self, share: float, step: float) -> int:
        """Tokens of a piece, if it is time for one: all pieces together lengthen steps by no more
        than ``share`` each."""
        if self._since_piece < RARELY:
            return 0
        tokens, seconds = self._piece
        least, steps = STALL
        worth = min(share * RARELY, max(least, steps * step))
        affordable = int(worth * tokens / seconds) if seconds else WHOLE
        self._since_piece, self._asked = 0, min(max(affordable, _FEW), 4 * tokens, WHOLE)
        return self._asked

    def _choices(self, generating: int) -> NDArray[np.int64]:
        """Ascending numbers of tokens that a pass may have beside generations, the first 0: where
        passes are padded, so many as fill one, for these cost as much as fewer."""
        sizes = self._sizes
        if not len(sizes):
            return np.arange(WHOLE + 1)
        full = sizes[sizes > generating] - generating
        if 2 * (generating + WHOLE) >= 3 * sizes[-1]:  # queued launch by launch: not for a few more
            full = np.append(full, WHOLE)
        return np.append(0, full)

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
        passes = np.array([*self._passes, *self._with_prompts])
        seconds = np.maximum(passes[:, 3], 1e-9)
        kinds = self._kinds(*passes[:, :3].T)
        most = seconds.mean() / np.maximum(kinds.mean(axis=0), 1e-9)
        before = most / len(most) if self._known is None else self._known
        rows = np.vstack([kinds / seconds[:, None], np.diag(_BEFORE / before)])
        sums = np.append(np.ones(len(passes)), np.full(len(most), _BEFORE))
        found, *_ = np.linalg.lstsq(rows, sums)
        self._known = np.clip(found, most / 50, most)
        costs: NDArray[np.float64] = found
        return costs
