"""Tokens to be drawn: what decides them beside the logits (docs/numerics.md, section 10)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32, I32
from isobit.backends.cpu.sampler import Columns, RowSampler
from isobit.numerics.sampling import adjust

ADJUSTED = np.dtype(
    [("draw", np.int32), ("id", np.int32), ("bias", np.float32), ("seen", np.uint32)]
)
"""An id whose logit changes, as a device takes it. draw: see :meth:`Adjusted.number`. seen: how
often it is in the output, with OCCURRED if it is in prompt or output."""
OCCURRED = 1 << 31


@dataclass(eq=False)
class Adjusted:
    """Bias and penalties of one sequence."""

    ids: NDArray[np.void]
    """ADJUSTED [N], each id once, in any order."""
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    draw: int = 0
    """By which number all of ``ids`` have it."""

    def number(self, draw: int) -> None:
        """Have that number among the draws of a step; written anew only where it is another, as
        there may be a whole vocabulary of ids."""
        if draw != self.draw:
            self.ids["draw"] = self.draw = draw

    def edits(self, logits: F32) -> tuple[I32, F32]:
        """Ids int32 [N], and what their logits become of float32 [V]."""
        ids = np.ascontiguousarray(self.ids["id"])
        return ids, adjust(
            logits[ids],
            bias=self.ids["bias"],
            occurred=self.ids["seen"] >= OCCURRED,
            generated=(self.ids["seen"] & np.uint32(OCCURRED - 1)).view(np.int32),
            repetition=self.repetition,
            presence=self.presence,
            frequency=self.frequency,
        )


Fill = Callable[[NDArray[np.uint32]], None]
"""Writes the ids that a grammar allows, uint32 [ceil(V / 32)]: bit i % 32 of word i // 32. It may
take long; a device can work meanwhile."""


@dataclass
class Draws:
    """A token for each of some rows."""

    rows: I32
    """int32 [D]: rows of a pass, each once."""
    columns: Columns
    """Settings of each."""
    index: NDArray[np.uint64]
    """[D]: of each token in its sequence's output, from 1."""
    adjusted: Sequence[tuple[int, Adjusted]] = ()
    """By the draw's number, in order; few have them."""
    held: Sequence[tuple[int, Fill]] = ()
    """To grammars, by the draw's number, in order; each is asked once."""
    logprobs: bool = False
    """Whether the tokens' log-probabilities are wanted: section 11, of the logits as they are."""

    def choose(self, sampler: RowSampler, logits: F32) -> tuple[I32, F32 | None]:
        """The tokens, or NOT_FINITE or NONE_ALLOWED, and their log-probabilities if wanted, NaN
        where there is no token.

        logits: float32 [D, V].
        """
        edits = [(i, *adjusted.edits(logits[i])) for i, adjusted in self.adjusted]
        allowed = None
        if self.held:
            shape = len(logits), -(-logits.shape[1] // 32)
            allowed = np.full(shape, 0xFFFFFFFF, np.uint32)
            for i, fill in self.held:
                fill(allowed[i])
        ids = sampler.draw(logits, self.columns, self.index, edits, allowed)
        if not self.logprobs:
            return ids, None
        logprobs = sampler.measure(logits, np.maximum(ids, 0)[:, None])[1][:, 0]
        logprobs[ids < 0] = np.nan
        return ids, logprobs
