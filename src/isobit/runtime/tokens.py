"""What an engine hands out: the tokens of one generation, one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32
from isobit.errors import UsageError
from isobit.runtime.generation import FinishReason, Watcher
from isobit.runtime.request import Request
from isobit.runtime.sampler import Sampler

if TYPE_CHECKING:
    from isobit.runtime.engine import Engine


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    logprob: float | None = None
    """Its log-probability as the model gives it, if it was asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids at its place and their log-probabilities, descending."""


class Generation(Iterator[Token]):
    """Tokens as they are chosen. Read it to the end, or ``cancel`` it."""

    def __init__(
        self,
        engine: Engine,
        request: Request,
        sampler: Sampler,
        *,
        ends: frozenset[int],
        logprobs: int | None,
        hidden: bool,
        watch: Watcher | None,
        listen: Callable[[], None] | None,
    ) -> None:
        self.request = request
        self.sampler = sampler
        self.finish_reason: FinishReason | None = None
        self.prompt: list[Token] = []
        """The prompt's tokens from the second on, if their log-probabilities were asked for."""
        self.hidden: F32 | None = None
        """float32 [hidden]: the state after the prompt, once it is run, if it was asked for."""
        self._engine = engine
        self._wants_hidden = hidden
        self._ends = ends
        self._logprobs = logprobs
        self._watch = watch
        self._listen = listen
        self._ready: deque[Token] = deque()
        self._error: BaseException | None = None
        self._routes: list[NDArray[np.int16]] = []
        """Experts of the tokens run so far: [n, layers, k] of each pass."""
        self._cancelled = False
        self._state = -1

    def __next__(self) -> Token:
        """The next token; runs passes until there is one. Raises what the pass did."""
        while True:
            found = self.take()
            if found:
                return found
            if self._error is not None:
                raise self._error
            if self.finish_reason is not None:
                raise StopIteration
            self._engine._advance(self)

    def take(self) -> Token | None:
        """A token that is there already."""
        with self._engine._books:
            return self._ready.popleft() if self._ready else None

    @property
    def routes(self) -> NDArray[np.int16]:
        """Experts of the tokens that were run so far, int16 [T, layers, k], if it is watched.

        Raises UsageError for a dense model.
        """
        with self._engine._books:
            if not self._routes:
                raise UsageError("routes: expected a mixture of experts that ran, got none")
            return np.concatenate(self._routes)

    @property
    def error(self) -> BaseException | None:
        """What ended it, if that was an error."""
        return self._error

    def cancel(self) -> None:
        """End it, from any thread; its pages are free at once, or after the pass it is in."""
        self._engine._cancel(self)
