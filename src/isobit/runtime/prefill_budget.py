"""How many tokens of prompts may run beside generations, so that these wait little for them.

Pure: it is given how long passes took. What runs together changes no bit, so that it may follow
from a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isobit.runtime.pass_costs import LinearCosts, PaddedCosts, PassCosts, PassTiming

SHARE = 0.45
"""So much longer may a step take for each prompt that waits: a little less than the half that is
promised beside one, since passes of one kind differ among themselves."""
RARELY = 160
"""Where too few tokens of a prompt fit beside a step, a piece of it runs in one pass of so many:
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
_LOOK = 7
"""After so many passes with prompts is one without: else nobody knew what these cost."""


class PrefillBudget:
    """How many tokens of prompts may run, by what passes have cost lately."""

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        """sizes: ascending numbers of tokens that passes are padded to, up to the last; those of a
        device that THRIFT is for."""
        self._sizes = np.array(sizes, np.int64)
        self._costs: PassCosts = PaddedCosts(sizes) if sizes else LinearCosts()
        self._enough = WHOLE // RARELY if sizes else 1
        """No more tokens beside a step than these are too few: pieces read more, or it is none."""
        self.steady = False
        """Whether steps take no longer however many prompts wait, and whatever that costs."""
        self._seen: deque[int] = deque(maxlen=_LOOK)
        """Tokens of prompts that ran lately beside generations."""
        self._turn = 0
        """So many answers in turn had tokens."""
        self._dear: tuple[int, int] | None = None
        """Of how many generations and prompts it was that too few tokens fitted."""
        self._long = 0, 0
        """The next position of the long prompt that waits alone, and where it ends, if any."""
        self._since_piece = RARELY
        self.piece_comes = False
        """Whether a piece was asked for that has not run yet."""
        self._pieces = 0
        self._wait = RARELY
        """So many passes after a piece is the next; or now and then, between two of them, a try of
        few tokens, which may have been slow by chance."""
        self._piece = _FEW, 0.0
        """Tokens and seconds of the last pass of many."""

    def ran(self, generating: int, prompt: int, attended: int, seconds: float) -> None:
        """A pass took so long."""
        piece = self.piece_comes and generating and prompt
        if generating:
            self._since_piece += 1
        if prompt >= _FEW and (piece or not generating):
            self._piece = prompt, seconds
        if piece:
            self.piece_comes = False
            if not len(self._sizes):  # says nothing of a few tokens
                return
        elif self._since_piece > 1:  # whose prompt it was has left
            self.piece_comes = False
        self._costs.ran(PassTiming(generating, prompt, attended, seconds))
        if generating and prompt:
            self._seen.append(prompt)

    def tokens(self, generating: int, attended: int, prompts: int, left: int, position: int) -> int:
        """Tokens of prompts that a step of generations may have beside it; now and then none, or
        where a single one would make it too long, mostly none.

        attended: positions that the generations attend to. prompts, left: how many wait, and how
        many tokens of them: who waits for the first token counts as much as all who generate.
        position: of the next token of a prompt.
        """
        if self._dear == (generating, prompts) and self._since_piece < self._wait:
            return 0
        if self._turn == _LOOK:
            self._turn = 0
            return 0
        self._turn, self._dear = self._turn + 1, None
        at, end = position, position + left
        goes_on = self._long[0] <= at and end == self._long[1]
        self._long = (at, end) if prompts == 1 and (left > WHOLE or goes_on) else (0, 0)
        thrifty = len(self._sizes) > 0 and not self.steady and not self._long[1]
        return self._beside(generating, attended, prompts, position, thrifty)

    def _beside(
        self, generating: int, attended: int, prompts: int, position: int, thrifty: bool
    ) -> int:
        """thrifty: whether tokens may not cost more than in a pass of their own."""
        n = self._choices(generating)
        # At first half as many: a token of a prompt costs hardly more than one that is generated.
        # Then twice as many as were seen: what they cost is learned on the way.
        seen = max(self._seen, default=0)
        most = int(np.searchsorted(n, min(2 * seen or max(generating // 2, 1), n[-1])))
        passes = self._costs.seconds(generating, n, attended + position * n)
        if passes is None or min(passes[0], passes[-1] - passes[0]) <= 0:  # nobody knows yet
            return int(n[-1 if len(self._sizes) else most])
        step, longer = passes[0], passes - passes[0]
        share = SHARE * (1 if self.steady else prompts) * step
        few = int((longer <= share).sum()) - 1
        if thrifty:
            alone = passes[-1] / (generating + n[-1])
            dear = int((longer > THRIFT * alone * n).sum())
            return int(n[max(few, min(dear + 1, len(n) - 1))])
        if n[few] > self._enough:
            return int(n[min(few, most)])
        self._dear = generating, prompts
        if self._wait <= self._since_piece < RARELY:
            self._wait = RARELY
            if not self._costs.sure(generating + int(n[1])):
                return int(n[1])
        if self._since_piece < RARELY:
            return 0
        self._pieces += 1
        self._wait = RARELY // (1 if self._pieces % 4 else 2)
        self._since_piece, self.piece_comes = 0, True
        return int(n[np.searchsorted(n, min(self._of_piece(share, step), n[-1]))])

    def _of_piece(self, share: float, step: float) -> int:
        """Tokens of a piece: all pieces together lengthen steps by no more than ``share`` each."""
        tokens, seconds = self._piece
        least, steps = STALL
        worth = min(share * RARELY, max(least, steps * step))
        affordable = int(worth * tokens / seconds) if seconds else WHOLE
        return min(max(affordable, _FEW), 4 * tokens, WHOLE)

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
