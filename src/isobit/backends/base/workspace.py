"""Memory of a pass on a device, as its lowering asks for it before there is any."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from isobit.model.graph import Value
from isobit.numerics.ops import TOKENS

TILES = "tiles"
"""Rows of a slot: a token's tiles of keys, as many as the context has."""
BATCH = "batch"
"""Rows of a slot: none; what the pass as a whole needs."""


@dataclass(eq=False)
class Slot:
    """Memory of a pass."""

    name: str
    words: int
    """For a row …"""
    rows: str = TOKENS
    """… of these (see numerics.ops.base, and above)"""
    more: int = 0
    """Words besides."""
    users: int = 0
    """Values in it, and launches being made; a slot without is free."""


S = TypeVar("S", bound=Slot)


class Slots(Generic[S]):
    """Slots that values lie in as a graph is lowered, free again when nothing reads them."""

    def __init__(self, kind: type[S]) -> None:
        self._kind = kind
        self.slots: list[S] = []
        self._live: dict[Value, list[S]] = {}
        self._held: list[S] = []

    def slot(self, name: str, words: int, rows: str = TOKENS, more: int = 0) -> S:
        """Memory that no value uses now; its own until a value is put there, or :meth:`end`."""
        needs = words, rows, more
        free = (s for s in self.slots if not s.users and (s.words, s.rows, s.more) == needs)
        found = next(free, None) or self._slot(name, words, rows, more)
        found.users += 1
        self._held.append(found)
        return found

    def fixed(self, name: str, words: int, rows: str = BATCH) -> S:
        """Memory that nothing else ever uses."""
        slot = self._slot(name, words, rows, 0)
        slot.users = 1
        return slot

    def _slot(self, name: str, words: int, rows: str, more: int) -> S:
        self.slots.append(self._kind(name, words, rows, more))
        return self.slots[-1]

    def keep(self, value: Value, slot: S) -> None:
        """A value lies there, until nothing reads it."""
        slot.users += 1
        self._live.setdefault(value, []).append(slot)

    def end(self, last_use: Mapping[Value, int], at: int) -> None:
        """What is before ``at`` is lowered: free what nothing reads any more."""
        for slot in self._held:
            slot.users -= 1
        self._held = []
        for value in [v for v in self._live if last_use.get(v, -1) < at]:
            for slot in self._live.pop(value):
                slot.users -= 1
