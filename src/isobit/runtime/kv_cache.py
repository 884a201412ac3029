"""Which pages of the KV cache belong to which sequence. Pure book-keeping: no memory here."""

import threading

import numpy as np

from isobit.backends.base import I32
from isobit.errors import ContextFull
from isobit.numerics import TILE


class PagePool:
    """Hands out pages of 64 positions; safe to use from threads."""

    def __init__(self, n_pages: int) -> None:
        self._free = list(range(n_pages - 1, -1, -1))
        self._n_pages = n_pages
        self._lock = threading.Lock()

    def take(self, n: int) -> list[int]:
        """Take n pages, or raise ContextFull and take none."""
        with self._lock:
            if n > len(self._free):
                raise ContextFull(
                    f"KV cache: {n} more pages of {TILE} positions needed, {len(self._free)} of "
                    f"{self._n_pages} free; finish or close another sequence, or load the model "
                    "with a larger context"
                )
            return [self._free.pop() for _ in range(n)]

    def give_back(self, pages: list[int]) -> None:
        """Return pages."""
        with self._lock:
            self._free.extend(reversed(pages))


class Sequence:
    """One run of tokens and the pages that hold its keys and values; a context manager."""

    def __init__(self, pool: PagePool, context: int) -> None:
        self._pool = pool
        self.context = context
        self.length = 0
        self._pages: list[int] = []

    def extend(self, n: int) -> tuple[I32, I32]:
        """Make room for n more tokens: (their positions int32 [n], the page table int32 [P])."""
        end = self.length + n
        if end > self.context:
            raise ContextFull(
                f"context: {end} positions needed, the model was loaded with {self.context}"
            )
        missing = -(-end // TILE) - len(self._pages)
        if missing > 0:
            self._pages += self._pool.take(missing)
        positions = np.arange(self.length, end, dtype=np.int32)
        self.length = end
        return positions, np.array(self._pages, np.int32)

    def close(self) -> None:
        """Give the pages back."""
        self._pool.give_back(self._pages)
        self._pages, self.length = [], 0

    def __enter__(self) -> "Sequence":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
