"""What the reference backend keeps of a sequence: pages of the values of an append operation."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import Batch
from isobit.numerics import KV_PAGE
from isobit.numerics.ops import Array, Shape


class Pages:
    """The values of one append operation, page by page; a page can belong to several sequences."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self._shapes = shapes
        self._pages: dict[int, list[Array]] = {}

    def append(self, batch: Batch, values: Sequence[Array]) -> None:
        """Store each of the values [T, …] at the batch's positions."""
        places = zip(batch.positions.tolist(), batch.sequence.tolist(), strict=True)
        for i, (position, s) in enumerate(places):
            number = int(batch.pages[s, position // KV_PAGE])
            if number not in self._pages:
                self._pages[number] = [np.zeros((KV_PAGE, *x.row), x.dtype) for x in self._shapes]
            for page, value in zip(self._pages[number], values, strict=True):
                page[position % KV_PAGE] = value[i]

    def read(self, batch: Batch, sequence: int, n: int) -> list[Array]:
        """What positions 0 … n - 1 of a sequence have stored: [n, …] each."""
        used = [self._pages[int(p)] for p in batch.pages[sequence, : -(-n // KV_PAGE)]]
        return [np.concatenate(parts)[:n] for parts in zip(*used, strict=True)]


def sequences(batch: Batch) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Each sequence of a batch and the tokens that belong to it."""
    for s in np.unique(batch.sequence).tolist():
        yield s, np.flatnonzero(batch.sequence == s)
