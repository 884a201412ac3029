"""Which pages of the KV cache belong to which sequence. Pure book-keeping: no memory here."""

import threading
from collections.abc import Callable

import numpy as np

from isobit.backends.base import I32
from isobit.errors import ContextFull, UsageError
from isobit.numerics import TILE


class PagePool:
    """Hands out pages of 64 positions, and recurrent states; safe to use from threads.

    ``states``: how many sequences a recurrent model keeps a state of; None for another model.
    """

    def __init__(self, n_pages: int, states: int | None = None) -> None:
        self._n_pages = n_pages
        self.recurrent = states is not None
        self._n_states = states or 0
        self._states = list(range(self._n_states - 1, -1, -1))
        self._given_back: list[int] = []
        self._fresh = 0  # pages from here on were never taken
        self._changed = threading.Condition()
        self._runners: list[int] = []

    def take(self, n: int) -> list[int]:
        """Take n pages, or raise ContextFull and take none."""
        with self._changed:
            return self._take(n)

    def wait_for(self, n: int, *, runner: int | None, give_up: Callable[[], bool]) -> list[int]:
        """Take n pages, waiting for those that other threads will surely give back.

        Those are the pages of sequences that have a ``runner``, the thread that fills and closes
        them. Raises ContextFull if there are none to wait for, or when ``give_up`` says so.
        """
        me = threading.get_ident()
        with self._changed:
            while n > self._free and any(t != me for t in self._runners) and not give_up():
                self._changed.wait(0.1)  # for a moment, to see give_up, and Ctrl-C
            pages = self._take(n)
            if runner is not None:
                self._runners.append(runner)
            return pages

    def take_state(self) -> int:
        """Take a recurrent state, or raise ContextFull."""
        with self._changed:
            if not self._states:
                raise ContextFull(
                    f"recurrent states: one for each of {self._n_states} sequences, all in use; "
                    "finish or close another sequence, or load the model with more sequences"
                )
            return self._states.pop()

    def give_back_state(self, state: int) -> None:
        """Return a recurrent state."""
        with self._changed:
            self._states.append(state)

    def give_back(self, pages: list[int], runner: int | None = None) -> None:
        """Return the pages of a sequence."""
        with self._changed:
            self._given_back.extend(reversed(pages))
            if runner is not None:
                self._runners.remove(runner)
            self._changed.notify_all()

    @property
    def _free(self) -> int:
        return len(self._given_back) + self._n_pages - self._fresh

    def _take(self, n: int) -> list[int]:
        if n > self._free:
            raise ContextFull(
                f"KV cache: {n} more pages of {TILE} positions needed, {self._free} of "
                f"{self._n_pages} free; finish or close another sequence, or load the model with "
                "more sequences"
            )
        again = [self._given_back.pop() for _ in range(min(n, len(self._given_back)))]
        start, self._fresh = self._fresh, self._fresh + n - len(again)
        return again + list(range(start, self._fresh))


class Sequence:
    """One run of tokens and the pages that hold its keys and values; a context manager."""

    def __init__(self, pool: PagePool, context: int) -> None:
        self._pool = pool
        self.context = context
        self.length = 0
        self._pages: list[int] = []
        self._runner: int | None = None
        self.state = -1
        """Its recurrent state, from its first token on."""
        self._lost = False

    def reserve(
        self, n: int, *, running: bool = False, give_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Take the pages of the first n tokens now, waiting as :meth:`PagePool.wait_for` does.

        ``running`` says that this thread fills the sequence and closes it without waiting for
        anyone. Raises ContextFull, and then nothing is lost yet.
        """
        missing = max(-(-min(n, self.context) // TILE) - len(self._pages), 0)
        runner = threading.get_ident() if running else None
        self._pages += self._pool.wait_for(missing, runner=runner, give_up=give_up)
        self._runner = runner

    def extend(self, n: int) -> tuple[I32, I32]:
        """Make room for n more tokens: (their positions int32 [n], the page table int32 [P])."""
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
        if self._pool.recurrent and self.state < 0:
            self.state = self._pool.take_state()
        missing = -(-end // TILE) - len(self._pages)
        if missing > 0:
            self._pages += self._pool.take(missing)
        positions = np.arange(self.length, end, dtype=np.int32)
        self.length = end
        return positions, np.array(self._pages, np.int32)

    def undo(self, n: int) -> None:
        """A pass over the last n tokens failed: their keys and values may not all be there, and a
        recurrent state is lost."""
        self.length -= n
        self._lost = self._pool.recurrent

    def close(self) -> None:
        """Give the pages back."""
        self._pool.give_back(self._pages, self._runner)
        if self.state >= 0:
            self._pool.give_back_state(self.state)
        self._pages, self.length, self._runner, self.state, self._lost = [], 0, None, -1, False

    def __enter__(self) -> "Sequence":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
