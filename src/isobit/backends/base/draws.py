"""Tokens to be drawn: what decides them beside the logits (docs/numerics.md, section 10)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32, I32
from isobit.backends.cpu.sampler import Columns, RowSampler

Edits = Callable[[F32], tuple[I32, F32]]
"""From a row of logits to ids, and what bias and penalties make of their logits."""


@dataclass
class Draws:
    """A token for each of some rows."""

    rows: I32
    """int32 [D]: rows of a pass, each once."""
    columns: Columns
    """Settings of each."""
    index: NDArray[np.uint64]
    """[D]: of each token in its sequence's output, from 1."""
    edits: Sequence[tuple[int, Edits]] = ()
    """By the draw's number, in order; few have them."""
    allowed: NDArray[np.uint32] | None = None
    """[D, ceil(V / 32)]: the ids that grammars allow, bit i % 32 of word i // 32; None: all."""
    logprobs: bool = False
    """Whether the tokens' log-probabilities are wanted: section 11, of the logits as they are."""

    @property
    def plain(self) -> bool:
        """Whether they are drawn from the logits as they are."""
        return not self.edits and self.allowed is None

    def choose(self, sampler: RowSampler, logits: F32) -> tuple[I32, F32 | None]:
        """The tokens, or NOT_FINITE or NONE_ALLOWED, and their log-probabilities if wanted.

        logits: float32 [D, V].
        """
        edits = [(i, *edit(logits[i])) for i, edit in self.edits]
        ids, _ = sampler.draw(logits, self.columns, self.index, edits, self.allowed)
        if not self.logprobs:
            return ids, None
        return ids, sampler.measure(logits, np.maximum(ids, 0)[:, None])[1][:, 0]
