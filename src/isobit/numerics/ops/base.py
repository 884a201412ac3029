"""What an operation is: its parameters, the shapes it makes, its specification, its float64 form.

Each kind is a frozen dataclass in a file of its own in this folder; its fields are its parameters.
The graph of a model (``isobit.model.graph``) says what is computed from what; a backend has a
kernel for each kind, under the kind's name.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from isobit.numerics.matmul import IntegerWeight, Weight

Array = NDArray[Any]
Arrays = tuple[Array, ...]
T = TypeVar("T")
Exchange = Callable[[Array], Sequence[Array]]
"""Gives one part's piece of a value to the others; returns every part's (``Gather``)."""

TOKENS, LOGIT_ROWS, HISTORY = "T", "R", "N"
"""What a value has a row for: each token of the batch; each token whose logits are wanted; each
position of a sequence up to the batch's last (what an ``append`` gives)."""


@dataclass(frozen=True)
class Shape:
    """The shape and type of a value: rows of ``row`` values, or scalars."""

    row: tuple[int, ...] = ()
    """Of one row; -1 stands for the number of positions N."""
    rows: str = TOKENS
    dtype: type[np.generic] = np.float32
    below: int | None = None
    """For integers: they lie in 0 … below - 1."""

    @property
    def width(self) -> int:
        """Values in a row."""
        return prod(self.row)


class UnpackCache(Generic[T]):
    """Unpacked weights by name, the most recently used of them kept."""

    def __init__(self, unpack: Callable[[Weight], T], limit: int = 1 << 30) -> None:
        self._unpack = unpack
        self._limit = limit
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._bytes = 0

    def __call__(self, w: Weight) -> T:
        """The unpacked form of a weight; anything with ``nbytes``."""
        if w.name in self._kept:
            self._kept.move_to_end(w.name)
            return self._kept[w.name]
        made = self._kept[w.name] = self._unpack(w)
        self._bytes += made.nbytes  # type: ignore[attr-defined]
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes  # type: ignore[attr-defined]
        return made


class Context:
    """What the operations of a run share: the setting of planes, and weights unpacked before."""

    def __init__(self, planes: int = 2, exchange: Exchange | None = None) -> None:
        self.planes = planes
        self.exchange: Exchange = exchange or (lambda x: [x])
        self.received: Array | None = None
        """What the batch brings (``Receive``)."""
        self.integers: Callable[[Weight], IntegerWeight] = UnpackCache(IntegerWeight.of)
        self.doubles: Callable[[Weight], NDArray[np.float64]] = UnpackCache(
            lambda w: w.float32().astype(np.float64)
        )


class Operation:
    """One kind of operation with its parameters."""

    kind: ClassVar[str]
    per_sequence: ClassVar[bool] = False
    """Whether a row depends on other rows of its sequence: then each sequence is run by itself."""
    per_vector: ClassVar[bool] = False
    """Whether each vector (the last axis) of what it gives depends on one vector of each input."""

    def state(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """What it keeps of a sequence between passes: arrays of float32, zero at the start.

        An operation with a state gets it behind its inputs, and gives the new one behind its
        outputs.
        """
        return ()

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """The shapes of what it makes. Raises ValueError if they do not fit together."""
        raise NotImplementedError

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """What docs/numerics.md says, to the bit: one array for each output."""
        raise NotImplementedError

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """The same in float64 over dequantised weights, as accurately as it goes."""
        raise NotImplementedError


def require(what: str, got: object, expected: object) -> None:
    """Raise ValueError unless two facts about shapes agree."""
    if got != expected:
        raise ValueError(f"{what}: expected {expected}, got {got}")
