"""What is wanted of logits, made where they lie (docs/numerics.md, section 11)."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32, I32, Wanted
from isobit.backends.wgpu.device import Device, Step
from isobit.numerics.digest import PIECE

MOST = 256
"""Words of a row. The likeliest are found one after the other: for more than a few, logits that
come to the host cost less."""
_DIGEST = 8  # words
_PIECE = PIECE // 4  # words that a leaf of the tree of digests has
_PIECES = 64  # of a workgroup of digest.wgsl


class Asked(NamedTuple):
    """What is wanted of a row beside its likeliest id."""

    given: int = 0
    """Log-probabilities of so many ids."""
    top: int = 0
    """So many of the likeliest."""
    digest: bool = False

    @property
    def words(self) -> int:
        """Of a row: the likeliest id, what is given, the likeliest and theirs in turn, the
        digest."""
        return 1 + self.given + 2 * self.top + _DIGEST * self.digest

    @classmethod
    def of(cls, wanted: Wanted, vocabulary: int) -> "Asked | None":
        """None: logits must come to the host."""
        given = 0 if wanted.given is None else wanted.given.shape[1]
        asked = cls(given, min(wanted.top, vocabulary), wanted.digests)
        return asked if wanted.logits is False and asked.words <= MOST else None


class Measured(NamedTuple):
    """Of R rows; of one that is not finite ids are -1 and values NaN."""

    likeliest: I32
    """[R]"""
    given: F32
    """[R, n]"""
    top_ids: I32
    """[R, k], in order."""
    top: F32
    """[R, k]"""
    digests: NDArray[np.uint8]
    """[R, 32]"""

    @classmethod
    def empty(cls, rows: int, asked: Asked) -> "Measured":
        """Room for it."""
        shapes = (rows,), (rows, asked.given), (rows, asked.top), (rows, asked.top), (rows, 32)
        kinds = np.int32, np.float32, np.int32, np.float32, np.uint8
        return cls(*(np.empty(s, k) for s, k in zip(shapes, kinds, strict=True)))

    def take(self, rows: NDArray[np.intp], words: I32, asked: Asked) -> None:
        """Some rows, as the kernel writes them: int32 [n, words]."""
        values, top = words.view(np.float32), 1 + asked.given + np.arange(0, 2 * asked.top, 2)
        self.likeliest[rows] = words[:, 0]
        self.given[rows] = values[:, 1 : 1 + asked.given]
        self.top_ids[rows] = words[:, top]
        self.top[rows] = values[:, top + 1]
        if asked.digest:
            self.digests[rows] = np.ascontiguousarray(words[:, -_DIGEST:]).view(np.uint8)


class Measuring:
    """Buffers for so many rows of logits at once."""

    def __init__(self, device: Device, rows: int, vocabulary: int) -> None:
        self._device, self._vocabulary = device, vocabulary
        pieces = -(-vocabulary // _PIECE)
        self._levels = [
            device.empty(4 * _DIGEST * rows * n) for n in (pieces, -(-_DIGEST * pieces // _PIECE))
        ]
        """Of the tree of digests, in turn."""
        self._ids = device.empty(4 * rows * MOST)
        self.found = device.empty(4 * rows * MOST)
        """A row after the other."""

    def give(self, ids: I32) -> None:
        """The ids of the rows that come next."""
        if ids.size:
            self._device.write(self._ids, ids)

    def steps(self, logits: Any, rows: int, asked: Asked) -> Iterator[Step]:
        """Measure rows of logits in a buffer."""
        kernel = self._device.kernel(("scalar", "reduce", "measure"), "measure")
        parameters = self._vocabulary, asked.given, asked.top, asked.words
        yield Step(kernel, (logits, self._ids, self.found), parameters, (rows,))
        if asked.digest:
            yield from self._digests(logits, rows, asked)

    def _digests(self, of: Any, rows: int, asked: Asked) -> Iterator[Step]:
        """Level by level, of ever fewer words of a row, into the last words of what is found."""
        kernel = self._device.kernel(("scalar", "digest"), "digest")
        words, levels = self._vocabulary, cycle(self._levels)
        while (pieces := -(-words // _PIECE)) > 1:
            to, groups = next(levels), (-(-pieces // _PIECES), rows)
            yield Step(kernel, (of, to), (words, words, 0, _DIGEST * pieces), groups)
            of, words = to, _DIGEST * pieces
        parameters = words, words, asked.words - _DIGEST, asked.words
        yield Step(kernel, (of, self.found), parameters, (1, rows))
