"""What each part of a split model has of a value: columns, head vectors, experts."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from types import MappingProxyType

import numpy as np

from isobit.model.graph import Graph, Key, Value
from isobit.numerics import Weight
from isobit.numerics.ops import Array
from isobit.numerics.ops.gather import Ranges, of_experts, together

_STEP = 64
"""Columns of a product are shared out in so many, where their number allows it."""


@dataclass(frozen=True)
class Cut:
    """What each part has of a value: columns of its last axis, head vectors, or experts."""

    parts: tuple[Ranges, ...]
    heads: bool = False
    ids: Value | None = None
    """If each part has the rows of some experts: which experts the rows are of."""

    @property
    def bounds(self) -> tuple[int, ...]:
        """The first expert of each part, and how many there are."""
        return (*(part[0][0] for part in self.parts), self.parts[-1][0][1])

    def columns(self, size: int) -> "Cut":
        """The cut of head vectors as that of the columns in which they lie, side by side."""
        return Cut(tuple(tuple((a * size, b * size) for a, b in part) for part in self.parts))


@dataclass(frozen=True)
class Part:
    """One part of a model: its graph, and of which stages it has only some columns or heads."""

    graph: Graph
    cuts: Mapping[Key, Cut]

    def beside(self, names: frozenset[str]) -> frozenset[str]:
        """Stages that :meth:`merged` needs to put these together."""
        cuts = (cut for (name, _), cut in self.cuts.items() if name in names)
        return frozenset(c.ids.name for c in cuts if c.ids is not None and c.ids.name is not None)

    def merged(
        self, key: Key, pieces: Sequence[Array], shown: Mapping[Key, Array] = MappingProxyType({})
    ) -> Array:
        """A stage [T, …] from every part's; ``shown``: what this part shows of others."""
        cut = self.cuts.get(key)
        if cut is None:
            return pieces[0]
        if cut.ids is not None:
            assert cut.ids.key is not None
            return of_experts(cut.bounds, pieces, shown[cut.ids.key])
        return together(cut.parts, pieces, axis=1 if cut.heads else -1)


def bounds(total: int, shares: Sequence[int]) -> list[int]:
    """Where each part begins, and the last one ends: of so many things, about in these proportions,
    one or more for each."""
    n = len(shares)
    found = [total * sum(shares[:r]) // sum(shares) for r in range(n + 1)]
    for r in range(1, n):
        found[r] = max(found[r], found[r - 1] + 1)
    for r in range(n - 1, 0, -1):
        found[r] = min(found[r], found[r + 1] - 1)
    return found


def shared_out(total: int, shares: Sequence[int]) -> tuple[Ranges, ...]:
    """Columns in steps of a power of two, about in these proportions."""
    step = gcd(total, _STEP)
    while step > 1 and total // step < 4 * len(shares):
        step //= 2
    each = itertools.pairwise(bounds(total // step, shares))
    return tuple(((a * step, b * step),) for a, b in each)


def merged(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Ranges in ascending order, neighbours joined."""
    out: list[tuple[int, int]] = []
    for first, end in sorted(set(ranges)):
        if out and out[-1][1] == first:
            out[-1] = out[-1][0], end
        else:
            out.append((first, end))
    return tuple(out)


def united(cuts: Sequence[Cut]) -> Cut:
    """What all of these need."""
    each = zip(*(cut.parts for cut in cuts), strict=True)
    return Cut(tuple(merged([r for part in parts for r in part]) for parts in each))


def has(part: Ranges, first: int, end: int) -> bool:
    """Whether a part has all of these columns."""
    return any(a <= first and end <= b for a, b in part)


def before(part: Ranges, at: int) -> int:
    """So many columns of a part come before a column of the whole."""
    return sum(max(0, min(b, at) - a) for a, b in part)


def columns_of(w: Weight, ranges: Ranges) -> Weight:
    """Some values of a vector, or rows of a matrix."""
    values = w.data.reshape(w.shape[0], -1)
    data = np.concatenate([values[a:b] for a, b in ranges])
    name = ",".join(f"{a}:{b}" for a, b in ranges)
    return Weight(f"{w.name}[{name}]", w.format, (len(data), *w.shape[1:]), data.reshape(-1))
