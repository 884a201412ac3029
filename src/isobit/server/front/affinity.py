"""Where conversations are in a cache: requests that begin alike go where their beginning is."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

Place = TypeVar("Place", bound=Hashable)

_BLOCK = 256  # bytes of a conversation, by which its beginning is known
_BLOCKS = 256  # of one conversation
_KNOWN = 1 << 16  # blocks that are remembered
_SPOKEN = ("system", "instructions", "messages", "prompt", "input", "text", "input_ids")


class PrefixAffinity(Generic[Place]):
    """Which places were given which beginnings."""

    def __init__(self) -> None:
        self._of: OrderedDict[bytes, frozenset[Place]] = OrderedDict()

    def find(self, blocks: Sequence[bytes], load: Mapping[Place, int]) -> Place:
        """The least loaded of the places that have most of a beginning, unless others have far
        less to do; ``load``: what each has to do."""
        least = min(load, key=load.__getitem__)
        known = (self._of.get(block, frozenset()) & load.keys() for block in reversed(blocks))
        homes: frozenset[Place] = next(filter(None, known), frozenset())
        chosen = min(homes, key=load.__getitem__, default=least)
        return least if load[chosen] > 2 * load[least] + 4 else chosen

    def learn(self, blocks: Sequence[bytes], place: Place) -> None:
        """A place was given this beginning."""
        for block in blocks:
            self._of[block] = self._of.get(block, frozenset()) | {place}
            self._of.move_to_end(block)
        while len(self._of) > _KNOWN:
            self._of.popitem(last=False)


def prefix_hashes(body: Any) -> list[bytes]:
    """Names of a conversation's beginnings, the shortest first: equal ones have equal names."""
    return list(_blocks(body))


def _blocks(body: Any) -> Iterator[bytes]:
    if not isinstance(body, dict):
        return
    said = [body[name] for name in _SPOKEN if body.get(name) is not None]
    try:
        text = json.dumps(said, ensure_ascii=False).encode(errors="replace")[: _BLOCK * _BLOCKS]
    except RecursionError:  # the replica refuses it
        return
    name = b""
    for at in range(0, len(text) - _BLOCK + 1, _BLOCK):  # full ones
        name = hashlib.blake2b(name + text[at : at + _BLOCK], digest_size=16).digest()
        yield name
