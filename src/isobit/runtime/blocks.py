"""Which pages of the KV cache hold what: pages in use, and pages kept for whoever begins alike.

A page holds 64 positions. A full page is known by the exact tokens in it and before it: its key is
the page before it and its 64 ids, so that equal keys are equal texts and there is no hash to
collide. The first page's key has a salt in place of a page; texts of different salts share nothing.
Keys and values depend on nothing else (docs/numerics.md, section 6), which is why a page of another
request's can stand in for one of the own, bit for bit.

Every page is in one of three states: *held* by tables that use it, *cached* (full, its text known,
nobody's), or *free*. When free ones run out, cached ones are taken, the longest unused first. Since
a table holds a text from its beginning and gives up its end first, a page is never taken before
those that continue it. Pure book-keeping: no memory, no device, no thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from isobit.errors import ContextFull
from isobit.numerics import TILE

Routes = NDArray[np.integer]
"""Experts of the tokens of a page: [64, layers, k]."""

_Key = tuple[int | str, bytes]


@dataclass(eq=False)
class PageTable:
    """The pages of one sequence, in order of position."""

    salt: str | None
    """None: shares with nobody."""
    pages: list[int] = field(default_factory=list)
    known: int = 0
    """So many of them, the first, can be found by others."""


@dataclass(slots=True)
class _Known:
    """A full page that can be found by its text."""

    key: _Key
    routes: Routes | None = None


class Blocks:
    """All pages of a cache."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._known: dict[int, _Known] = {}
        self._by_key: dict[_Key, int] = {}
        self._cached: dict[int, None] = {}
        """In the order in which they were given up."""

    @property
    def free(self) -> int:
        """Pages that hold nothing of use."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Pages in use."""
        return self.total - len(self._free) - len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that are kept for what they hold, and can be taken."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._cached)

    def open(self, ids: Sequence[int], salt: str | None = "", *, routes: bool = False) -> PageTable:
        """A table that holds the pages there are of a text's beginning.

        ids: no more than may be taken from the cache; a last part of a page never is. routes: only
        pages whose experts are known.
        """
        table = PageTable(salt)
        if salt is None:
            return table
        parent: int | str = salt
        for i in range(len(ids) // TILE):
            page = self._by_key.get((parent, _text(ids, i)))
            if page is None or (routes and self._known[page].routes is None):
                break
            self._hold(page)
            table.pages.append(page)
            parent = page
        table.known = len(table.pages)
        return table

    def extend(self, table: PageTable, n: int) -> None:
        """Take n more pages for a table, or none and raise ContextFull."""
        if n > self.available:
            raise ContextFull(
                f"KV cache: {n} more pages of {TILE} positions needed, {self.available} of "
                f"{self.total} free; finish or close another sequence, or load the model with a "
                "larger context"
            )
        for _ in range(n):
            page = self._free.pop() if self._free else self._evict()
            self._hold(page)
            table.pages.append(page)

    def publish(
        self,
        table: PageTable,
        ids: Sequence[int],
        computed: int,
        routes: Sequence[Routes] | None = None,
    ) -> None:
        """Make the full pages of a table known, of a sequence whose first tokens are computed.

        routes: for each page, if experts were recorded. A page that is already known to hold the
        same text takes the place of the table's own.
        """
        if table.salt is None:
            return
        for i in range(table.known, computed // TILE):
            key = (table.pages[i - 1] if i else table.salt, _text(ids, i))
            page = self._by_key.setdefault(key, table.pages[i])
            if page == table.pages[i]:
                self._known[page] = _Known(key)
            else:
                self._hold(page)
                self._release(table.pages[i])
                table.pages[i] = page
            if routes is not None:
                self._known[page].routes = routes[i]
            table.known = i + 1

    def routes(self, table: PageTable) -> list[Routes]:
        """The experts of a table's known pages, as far as all of them are recorded."""
        found = []
        for page in table.pages[: table.known]:
            recorded = self._known[page].routes
            if recorded is None:
                break
            found.append(recorded)
        return found

    def close(self, table: PageTable) -> None:
        """Give a table's pages back; known ones stay cached."""
        for page in reversed(table.pages):
            self._release(page)
        table.pages, table.known = [], 0

    def forget(self) -> None:
        """Free all cached pages, as after a change of weights."""
        while self._cached:
            self._free.append(self._evict())

    def check(self, tables: Sequence[PageTable]) -> None:
        """Assert that the books are in order and that these tables are all there are."""
        holders = [0] * self.total
        for table in tables:
            for page in table.pages:
                holders[page] += 1
            assert all(page in self._known for page in table.pages[: table.known])
            assert not any(page in self._known for page in table.pages[table.known :])
            for before, page in pairwise(table.pages[: table.known]):
                assert self._known[page].key[0] == before
        assert holders == self._holders
        assert self.free + self.cached + sum(map(bool, holders)) == self.total
        assert len({*self._free, *self._cached}) == self.free + self.cached
        assert not any(holders[page] or page in self._known for page in self._free)
        assert not any(holders[page] or page not in self._known for page in self._cached)
        assert {known.key: page for page, known in self._known.items()} == self._by_key
        order = {page: i for i, page in enumerate(self._cached)}
        for page, known in self._known.items():
            if isinstance(parent := known.key[0], int):
                assert parent in self._known
                assert holders[parent] >= holders[page]
                assert holders[parent] or order[parent] > order[page]

    def _hold(self, page: int) -> None:
        self._cached.pop(page, None)
        self._holders[page] += 1

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            if page in self._known:
                self._cached[page] = None
            else:
                self._free.append(page)

    def _evict(self) -> int:
        """Make the cached page that was longest unused hold nothing; it is returned, not freed."""
        page = next(iter(self._cached))
        del self._cached[page]
        del self._by_key[self._known.pop(page).key]
        return page


def _text(ids: Sequence[int], page: int) -> bytes:
    return np.array(ids[TILE * page : TILE * (page + 1)], np.int32).tobytes()
