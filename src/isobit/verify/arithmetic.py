"""The operations a stage is made of, apart from the precision they run in.

``SpecArithmetic`` is docs/numerics.md: a test holds the graph run with it to the bits of the
reference backend. ``isobit.verify.oracle`` has them in float64.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from isobit import numerics
from isobit.backends.base import I32
from isobit.config import ModelConfig
from isobit.numerics import IntegerWeight, Weight

Array = NDArray[Any]


class Arithmetic(Protocol):
    """The operations of docs/numerics.md in some precision; axes as in ``isobit.model.stages``."""

    def embedding(self, table: Weight, tokens: I32) -> Array:
        """Rows of a table."""

    def matmul(self, w: Weight, x: Array) -> Array:
        """``x @ w.T``: x [T, K], w [N, K]."""

    def rms_norm(self, x: Array, weight: Array) -> Array:
        """RMS norm of the last axis."""

    def rope(self, x: Array, positions: I32) -> Array:
        """Rotation of x [T, heads, head_dim]."""

    def scores(self, q: Array, keys: Array, positions: I32) -> Array:
        """Attention scores [T, H, N], 0 beyond positions."""

    def softmax(self, scores: Array, positions: I32) -> Array:
        """Softmax of scores up to positions, 0 beyond."""

    def attention(self, q: Array, keys: Array, values: Array, positions: I32) -> Array:
        """Attention [T, H, head_dim]; keys and values [N, G, head_dim]."""

    def top_k(self, logits: Array, k: int, *, normalise: bool) -> tuple[I32, Array]:
        """Chosen experts [T, k] and their weights."""

    def silu_gate(self, gate: Array, up: Array) -> Array:
        """SwiGLU's pointwise part."""

    def combine(self, weights: Array, outputs: Array) -> Array:
        """Weighted sum of expert outputs [T, k, N]."""

    def add(self, x: Array, y: Array) -> Array:
        """The residual sum."""


T = TypeVar("T")


class Kept(Generic[T]):
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


class SpecArithmetic:
    """docs/numerics.md, through ``isobit.numerics``."""

    def __init__(self, config: ModelConfig, planes: int) -> None:
        self.config = config
        self.planes = planes
        self._unpack = Kept(IntegerWeight.of)
        self._frequencies = numerics.inverse_frequencies(config.head_dim, config.rope_base)

    def embedding(self, table: Weight, tokens: I32) -> Array:
        """See :class:`Arithmetic`."""
        return np.concatenate([table.rows(t, t + 1).float32() for t in tokens.tolist()])

    def matmul(self, w: Weight, x: Array) -> Array:
        """See :class:`Arithmetic`."""
        return numerics.matmul(w, np.ascontiguousarray(x), self.planes, self._unpack)

    def rms_norm(self, x: Array, weight: Array) -> Array:
        """See :class:`Arithmetic`."""
        return numerics.rms_norm(x, weight, np.float32(self.config.eps))

    def rope(self, x: Array, positions: I32) -> Array:
        """See :class:`Arithmetic`."""
        first, last = int(positions.min()), int(positions.max())
        cos, sin = numerics.rope_table(self._frequencies, first, last + 1)
        return numerics.rope(x, cos[positions - first], sin[positions - first])

    def scores(self, q: Array, keys: Array, positions: I32) -> Array:
        """See :class:`Arithmetic`."""
        k, dk = numerics.quantise(np.ascontiguousarray(keys), planes=2)
        group = q.shape[1] // keys.shape[1]
        out = []
        for h in range(q.shape[1]):
            k_h, dk_h = _i16(k, h // group), dk[:, h // group]
            out.append(numerics.attention_scores(np.ascontiguousarray(q[:, h]), k_h, dk_h))
        return masked(np.stack(out, axis=1), positions)

    def softmax(self, scores: Array, positions: I32) -> Array:
        """See :class:`Arithmetic`."""
        heads = range(scores.shape[1])
        return np.stack(
            [numerics.attention_softmax(scores[:, h], positions) for h in heads], axis=1
        )

    def attention(self, q: Array, keys: Array, values: Array, positions: I32) -> Array:
        """See :class:`Arithmetic`."""
        k, dk = numerics.quantise(np.ascontiguousarray(keys), planes=2)
        v, dv = numerics.quantise(np.ascontiguousarray(values), planes=2)
        group = q.shape[1] // keys.shape[1]
        out = np.empty_like(q)
        for h in range(q.shape[1]):
            g = h // group
            out[:, h] = numerics.attention(
                np.ascontiguousarray(q[:, h]), positions, _i16(k, g), dk[:, g], _i16(v, g), dv[:, g]
            )
        return out

    def top_k(self, logits: Array, k: int, *, normalise: bool) -> tuple[I32, Array]:
        """See :class:`Arithmetic`."""
        return numerics.top_k(logits, k, normalise=normalise)[:2]

    def silu_gate(self, gate: Array, up: Array) -> Array:
        """See :class:`Arithmetic`."""
        return numerics.silu_gate(gate, up)

    def combine(self, weights: Array, outputs: Array) -> Array:
        """See :class:`Arithmetic`."""
        return numerics.combine(weights, outputs)

    def add(self, x: Array, y: Array) -> Array:
        """See :class:`Arithmetic`."""
        return x + y


def _i16(k: Array, head: int) -> NDArray[np.int16]:
    return np.ascontiguousarray(k[:, head]).astype(np.int16)


def masked(maps: Array, positions: I32) -> Array:
    """Attention maps [T, H, N] with 0 beyond each token's position."""
    seen = np.arange(maps.shape[2]) <= positions[:, None]
    return np.where(seen[:, None], maps, maps.dtype.type(0))
