"""Tokens that a caller runs pass by pass, as comparing and measuring need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from isobit.backends.base import I32
from isobit.errors import CacheLost, ContextFull, UsageError
from isobit.runtime.blocks import PageTable

if TYPE_CHECKING:
    from isobit.runtime.engine import Engine


class Sequence:
    """One run of tokens and the pages that hold its keys and values; a context manager.

    It shares its pages with nobody, and every token of it is run.
    """

    def __init__(self, engine: Engine, context: int) -> None:
        self.engine = engine
        self.context = context
        self.length = 0
        self.table = PageTable(None)
        self._lost = False
        self._losses = 0

    def extend(self, n: int) -> I32:
        """Make room for n more tokens, in the engine's turn; their positions, int32 [n].

        Raises ContextFull; CacheLost if what it has is not there any more.
        """
        losses = self.engine.model.backend.losses
        if self.length and losses != self._losses:
            raise CacheLost("sequence: the KV cache was lost: close it and start again")
        self._losses = losses
        end = self.length + n
        if end > self.context:
            raise ContextFull(
                f"context: {end} positions needed, the model was loaded with {self.context}"
            )
        if self._lost:
            raise UsageError(
                "sequence: expected one whose last pass ended well; a recurrent model cannot go "
                "back: close it and start again"
            )
        self.engine.hold(self.table, end)
        positions = np.arange(self.length, end, dtype=np.int32)
        self.length = end
        return positions

    def undo(self, n: int) -> None:
        """A pass over the last n tokens failed: their keys and values may not all be there, and a
        recurrent state is lost."""
        self.length -= n
        self._lost = self.table.state >= 0

    def close(self) -> None:
        """Give the pages back."""
        self.engine.release(self.table)
        self.length, self._lost = 0, False

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
