"""What is wanted of logits, made where they lie (docs/numerics.md, section 11)."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32, I32, Wanted
from isobit.backends.wgpu.device import Device, Step

MOST = 256
"""Words of a row. The likeliest are found one after the other: for more than a few, logits that
come to the host cost less."""


class Asked(NamedTuple):
    """What is wanted of a row beside its likeliest id."""

    given: int = 0
    """Log-probabilities of so many ids."""
    top: int = 0
    """So many of the likeliest."""

    @property
    def words(self) -> int:
        """Of a row: the likeliest id, what is given, the likeliest and theirs in turn."""
        return 1 + self.given + 2 * self.top

    @classmethod
    def of(cls, wanted: Wanted, vocabulary: int) -> "Asked | None":
        """None: logits must come to the host."""
        given = 0 if wanted.given is None else wanted.given.shape[1]
        asked = cls(given, min(wanted.top, vocabulary))
        little = wanted.logits is False and not wanted.digests and asked.words <= MOST
        return asked if little and wanted.measures else None


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

    @classmethod
    def empty(cls, rows: int, asked: Asked) -> "Measured":
        """Room for it."""
        shapes = (rows,), (rows, asked.given), (rows, asked.top), (rows, asked.top)
        kinds = np.int32, np.float32, np.int32, np.float32
        return cls(*(np.empty(s, k) for s, k in zip(shapes, kinds, strict=True)))

    def take(self, rows: NDArray[np.intp], words: I32, asked: Asked) -> None:
        """Some rows, as the kernel writes them: int32 [n, words]."""
        values, top = words.view(np.float32), 1 + asked.given + np.arange(0, 2 * asked.top, 2)
        self.likeliest[rows] = words[:, 0]
        self.given[rows] = values[:, 1 : 1 + asked.given]
        self.top_ids[rows] = words[:, top]
        self.top[rows] = values[:, top + 1]


class Measuring:
    """Buffers for so many rows at once."""

    def __init__(self, device: Device, rows: int) -> None:
        self._device = device
        self._ids = device.empty(4 * rows * MOST)
        self.found = device.empty(4 * rows * MOST)
        """A row after the other."""

    def give(self, ids: I32) -> None:
        """The ids of the rows that come next."""
        if ids.size:
            self._device.write(self._ids, ids)

    def step(self, logits: Any, vocabulary: int, rows: int, asked: Asked) -> Step:
        """Measures rows of logits in a buffer."""
        kernel = self._device.kernel(("scalar", "reduce", "measure"), "measure")
        return Step(kernel, (logits, self._ids, self.found), (vocabulary, *asked), (rows,))
