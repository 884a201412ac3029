"""What a device makes of rows of logits where they lie, in a few words a row."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32, I32, Results, Wanted

MAX_WORDS = 256
"""Words of a row. The most likely are found one after the other: for more than a few, logits that
come to the host cost less."""
DIGEST = 8  # words


class RowRequest(NamedTuple):
    """What is wanted of a row beside its most likely id."""

    given: int = 0
    """Log-probabilities of so many ids."""
    top: int = 0
    """So many of the most likely."""
    drawn: bool = False
    """A token that is drawn, and its log-probability."""
    digest: bool = False

    @property
    def words(self) -> int:
        """Of a row: the argmax, what is given, the most likely and theirs in turn, the token drawn
        and its, the digest."""
        return self.drawn_at + 2 * self.drawn + DIGEST * self.digest

    @property
    def drawn_at(self) -> int:
        """The token's word."""
        return 1 + self.given + 2 * self.top

    @classmethod
    def of(cls, wanted: Wanted, vocabulary: int) -> "RowRequest | None":
        """None: logits must come to the host."""
        given = 0 if wanted.given is None else wanted.given.shape[1]
        drawn = wanted.drawn is not None
        asked = cls(given, min(wanted.top, vocabulary), drawn, wanted.digests)
        return asked if wanted.logits is False and asked.words <= MAX_WORDS else None


class RowResults(NamedTuple):
    """Of R rows; of one that is not finite ids are -1 and values NaN."""

    argmax: I32
    """[R]"""
    given: F32
    """[R, n]"""
    top_ids: I32
    """[R, k], in order."""
    top: F32
    """[R, k]"""
    drawn: I32
    """[R], of rows that a token is drawn of."""
    drawn_logprobs: F32
    """[R]"""
    digests: NDArray[np.uint8]
    """[R, 32]"""

    @classmethod
    def empty(cls, rows: int, asked: RowRequest) -> "RowResults":
        """Room for it."""
        each = (rows,), (rows, asked.given), (rows, asked.top), (rows, asked.top)
        shapes = *each, (rows,), (rows,), (rows, 32)
        kinds = np.int32, np.float32, np.int32, np.float32, np.int32, np.float32, np.uint8
        return cls(*(np.empty(s, k) for s, k in zip(shapes, kinds, strict=True)))

    def take(self, rows: NDArray[np.intp], words: I32, asked: RowRequest) -> None:
        """Some rows, as a kernel writes them: int32 [n, words]."""
        values, top = words.view(np.float32), 1 + asked.given + np.arange(0, 2 * asked.top, 2)
        self.argmax[rows] = words[:, 0]
        self.given[rows] = values[:, 1 : 1 + asked.given]
        self.top_ids[rows] = words[:, top]
        self.top[rows] = values[:, top + 1]
        if asked.drawn:
            self.drawn[rows] = words[:, asked.drawn_at]
            self.drawn_logprobs[rows] = values[:, asked.drawn_at + 1]
        if asked.digest:
            self.digests[rows] = np.ascontiguousarray(words[:, -DIGEST:]).view(np.uint8)

    def results(self, wanted: Wanted) -> Results:
        """What of it is wanted."""
        drawn = None if wanted.drawn is None else wanted.drawn.rows
        return Results(
            self.argmax >= 0,
            argmax=self.argmax if wanted.argmax else None,
            top_ids=self.top_ids if wanted.top else None,
            top=self.top if wanted.top else None,
            given=None if wanted.given is None else self.given,
            drawn=None if drawn is None else self.drawn[drawn],
            drawn_logprobs=None if drawn is None else self.drawn_logprobs[drawn],
            digests=self.digests if wanted.digests else None,
        )
