"""Which pages of the KV cache hold what: pages in use, and pages kept for whoever begins alike.

A page holds 64 positions. A full page is known by the exact tokens in it and before it: its key is
the page before it and its 64 ids, so that equal keys are equal texts and there is no hash to
collide. The first page's key has a salt in place of a page; texts of different salts share nothing.
Keys and values depend on nothing else (docs/numerics.md, section 6), which is why a page of another
request's can stand in for one of the own, bit for bit.

Every page is in one of three states: *held* by tables that use it, *cached* (full, its text known,
nobody's), or *free*. When free ones run out, cached ones are taken, the longest unused first. Since
a table holds a text from its beginning and gives up its end first, a page is never taken before
those that continue it.

A recurrent model has states beside its pages, which cannot be taken back and are there only as a
pass leaves them. A state is *held* by a sequence, *kept* as it was at the end of a known page, or
free; kept ones are taken like cached pages. A text is then found up to its last kept state.

Pure book-keeping: no memory, no device, no thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from isobit.backends.base import I32, Routes
from isobit.errors import ContextFull
from isobit.numerics import KV_PAGE

_Key = tuple[int | str, bytes]


@dataclass(eq=False)
class PageTable:
    """The pages of one sequence, in order of position."""

    salt: str | None
    """None: shares with nobody."""
    pages: list[int] = field(default_factory=list)
    known: int = 0
    """So many of them, the first, can be found by others."""
    state: int = -1
    """The recurrent state that it holds."""
    kept: int | None = None
    """The kept state that it begins with."""
    _numbers: I32 | None = None

    @property
    def numbers(self) -> I32:
        """The pages as an array, the same one until they change."""
        if self._numbers is None:
            self._numbers = np.array(self.pages, np.int32)
        return self._numbers


@dataclass(slots=True)
class _Known:
    """A full page that can be found by its text."""

    key: _Key
    routes: Routes | None = None


class Blocks:
    """All pages of a cache, and all states of a recurrent model."""

    def __init__(self, total: int, states: int = 0) -> None:
        self.total = total
        self.states = states
        self._free: list[int] = []
        self._fresh = 0
        """Pages from here on were never taken."""
        self._holders: dict[int, int] = {}
        self._known: dict[int, _Known] = {}
        self._by_key: dict[_Key, int] = {}
        self._cached: dict[int, None] = {}
        """In the order in which they were given up."""
        self._free_states = list(range(states - 1, -1, -1))
        self._kept: dict[int, int] = {}
        """Of a known page the state at its end, in the order in which they were used."""

    @property
    def free(self) -> int:
        """Pages that hold nothing of use."""
        return len(self._free) + self.total - self._fresh

    @property
    def held(self) -> int:
        """Pages in use."""
        return self.total - self.available

    @property
    def cached(self) -> int:
        """Pages that are kept for what they hold, and can be taken."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return self.free + len(self._cached)

    @property
    def available_states(self) -> int:
        """States that can be taken."""
        return len(self._free_states) + len(self._kept)

    @property
    def kept(self) -> int:
        """States that are kept for what they hold."""
        return len(self._kept)

    def open(self, ids: Sequence[int], salt: str | None = "", *, routes: bool = False) -> PageTable:
        """A table that holds the pages there are of a text's beginning.

        Where there are states, only up to a page at whose end one is kept: the table's ``kept``.

        ids: no more than may be taken from the cache; a last part of a page never is. routes: only
        pages whose experts are known.
        """
        table = PageTable(salt)
        if salt is None:
            return table
        parent: int | str = salt
        for i in range(len(ids) // KV_PAGE):
            page = self._by_key.get((parent, _text(ids, i)))
            if page is None or (routes and self._known[page].routes is None):
                break
            table.pages.append(page)
            parent = page
        if self.states:
            while table.pages and table.pages[-1] not in self._kept:
                table.pages.pop()
            if table.pages:
                table.kept = self._use(table.pages[-1])
        for page in table.pages:
            self._hold(page)
        table.known = len(table.pages)
        return table

    def extend(self, table: PageTable, n: int, spare: int = 0) -> None:
        """Take n more pages for a table, or none and raise ContextFull; ``spare`` are left over."""
        if n > self.available - spare:
            raise ContextFull(
                f"KV cache: {n} more pages of {KV_PAGE} positions needed, "
                f"{self.available - spare} of {self.total} free; finish "
                "or close another sequence, or load the model with more sequences"
            )
        for _ in range(n):
            page = self._take()
            self._hold(page)
            table.pages.append(page)
        table._numbers = None

    def hold_state(self, table: PageTable) -> None:
        """Take a state for a table; raises ContextFull if all are held."""
        if not self.available_states:
            raise ContextFull(
                f"recurrent states: {self.states} in all, all in use; finish or close another "
                "sequence, or load the model with more sequences"
            )
        table.state = self._take_state()

    def keep_state(self, table: PageTable, computed: int) -> int | None:
        """Where to copy a table's state, which then is kept as that after its ``computed`` tokens.

        None if it is not to be kept: it is already, or there is no room.
        """
        if computed % KV_PAGE or not 0 < computed == table.known * KV_PAGE:
            return None
        page = table.pages[table.known - 1]
        if page in self._kept:
            self._use(page)
            return None
        if not self.available_states:
            return None
        self._kept[page] = state = self._take_state()
        return state

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
        for i in range(table.known, computed // KV_PAGE):
            key = (table.pages[i - 1] if i else table.salt, _text(ids, i))
            page = self._by_key.setdefault(key, table.pages[i])
            if page == table.pages[i]:
                self._known[page] = _Known(key)
            else:
                self._hold(page)
                self._release(table.pages[i])
                table.pages[i], table._numbers = page, None
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
        if table.state >= 0:
            self._free_states.append(table.state)
        table.pages, table.known, table.state, table.kept = [], 0, -1, None
        table._numbers = None

    def forget(self) -> None:
        """Free all cached pages, as after a change of weights."""
        while self._cached:
            self._free.append(self._evict())

    def check(self, tables: Sequence[PageTable]) -> None:
        """Assert that the books are in order and that these tables are all there are."""
        holders = Counter(page for table in tables for page in table.pages)
        for table in tables:
            assert all(page in self._known for page in table.pages[: table.known])
            assert not any(page in self._known for page in table.pages[table.known :])
            for before, page in pairwise(table.pages[: table.known]):
                assert self._known[page].key[0] == before
        assert holders == self._holders
        assert self.free + self.cached + len(holders) == self.total
        assert len({*self._free, *self._cached}) == len(self._free) + self.cached
        assert max([-1, *self._free, *self._cached, *holders]) < self._fresh <= self.total
        assert not any(holders[page] or page in self._known for page in self._free)
        assert not any(holders[page] or page not in self._known for page in self._cached)
        assert {known.key: page for page, known in self._known.items()} == self._by_key
        order = {page: i for i, page in enumerate(self._cached)}
        for page, known in self._known.items():
            if isinstance(parent := known.key[0], int):
                assert parent in self._known
                assert holders[parent] >= holders[page]
                assert holders[parent] or order[parent] > order[page]
        held = [table.state for table in tables if table.state >= 0]
        states = [*held, *self._free_states, *self._kept.values()]
        assert sorted(states) == list(range(self.states))
        assert self._kept.keys() <= self._known.keys()

    def _hold(self, page: int) -> None:
        self._cached.pop(page, None)
        self._holders[page] = self._holders.get(page, 0) + 1

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            del self._holders[page]
            if page in self._known:
                self._cached[page] = None
            else:
                self._free.append(page)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._fresh < self.total:
            self._fresh += 1
            return self._fresh - 1
        return self._evict()

    def _use(self, page: int) -> int:
        """The state kept at a page's end, which is taken after all others now."""
        self._kept[page] = state = self._kept.pop(page)
        return state

    def _take_state(self) -> int:
        if self._free_states:
            return self._free_states.pop()
        return self._kept.pop(next(iter(self._kept)))

    def _evict(self) -> int:
        """Make the cached page that was longest unused hold nothing; it is returned, not freed."""
        page = next(iter(self._cached))
        del self._cached[page]
        del self._by_key[self._known.pop(page).key]
        if page in self._kept:
            self._free_states.append(self._kept.pop(page))
        return page


def _text(ids: Sequence[int], page: int) -> bytes:
    return np.array(ids[KV_PAGE * page : KV_PAGE * (page + 1)], np.int32).tobytes()
