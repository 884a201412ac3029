"""Attention over the keys and values of a sequence (docs/numerics.md, section 6)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.numerics.attention import attention, attention_scores, attention_softmax, visible
from isobit.numerics.fixed import quantise
from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import (
    HISTORY,
    Array,
    Arrays,
    Context,
    Operation,
    Shape,
    require,
)


@dataclass(frozen=True)
class Append(Operation):
    """k and v [T, G, size] stored at their positions; what the sequence has stored so far, [N, G,
    size] each. Whoever runs the graph keeps what is stored; a backend keeps it quantised to 16 bits
    a head vector, as attention reads it."""

    kind = "append"
    per_sequence = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return tuple(Shape(x.row, HISTORY) for x in inputs)


@dataclass(frozen=True)
class AttentionScores(Operation):
    """q [T, H, size], keys [N, G, size], positions int32 [T]: scores [T, H, N], 0 beyond positions
    and before the window. ``scale``: see :func:`isobit.numerics.attention_scale`.

    A definition for traces and ablations; attention does not read it.
    """

    window: int | None = None
    scale: float | None = None
    kind = "attention_scores"
    per_sequence = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return (Shape((inputs[0].row[0], -1), inputs[0].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        q, keys, positions = inputs
        k, dk = quantise(np.ascontiguousarray(keys), planes=2)
        group = q.shape[1] // keys.shape[1]
        out = []
        for h in range(q.shape[1]):
            k_h, dk_h = _head(k, h // group), dk[:, h // group]
            out.append(attention_scores(np.ascontiguousarray(q[:, h]), k_h, dk_h, self.scale))
        return (masked(np.stack(out, axis=1), positions, self.window),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        q, keys, positions = inputs
        out = np.empty((*q.shape[:2], len(keys)))
        for h, k in _float64_heads(q, keys):
            out[:, h] = q[:, h].astype(np.float64) @ k.T * exact_scale(q, self.scale)
        return (masked(out, positions, self.window),)


@dataclass(frozen=True)
class AttentionSoftmax(Operation):
    """Scores [T, H, N] and positions int32 [T]: their softmax, 0 where they are; the weight [H], if
    there is one, are sinks. A definition for traces and ablations."""

    window: int | None = None
    kind = "attention_softmax"
    per_sequence = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        scores, positions = inputs
        sinks = sinks_of(weights, scores.shape[1])
        maps = [
            attention_softmax(scores[:, h], positions, self.window, sink)
            for h, sink in enumerate(sinks)
        ]
        return (np.stack(maps, axis=1),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        scores, positions = inputs
        sinks = sinks_of(weights, scores.shape[1])
        maps = [
            _softmax_float64(scores[:, h], positions, self.window, sink)
            for h, sink in enumerate(sinks)
        ]
        return (np.stack(maps, axis=1),)


@dataclass(frozen=True)
class Attention(Operation):
    """q [T, H, size], keys and values [N, G, size], positions int32 [T]: [T, H * size], heads side
    by side. ``window``: how many positions a query sees, its own among them; None: all up to it.
    ``scale``: what scores are multiplied by; None: 1 / sqrt(size). The weight [H], if there is one:
    sinks, which join the softmax without a value."""

    window: int | None = None
    scale: float | None = None
    kind = "attention"
    per_sequence = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        q, keys, values, _ = inputs
        if q.row[0] % keys.row[0] or q.row[1] != keys.row[1]:
            raise ValueError(f"query heads {q.row}: expected a multiple of {keys.row}")
        for w in weights:
            require(f"length of {w.name}", w.shape, q.row[:1])
        return (Shape((q.row[0] * values.row[1],), q.rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        q, keys, values, positions = inputs
        k, dk = quantise(np.ascontiguousarray(keys), planes=2)
        v, dv = quantise(np.ascontiguousarray(values), planes=2)
        group = q.shape[1] // keys.shape[1]
        out = np.empty_like(q)
        for h, sink in enumerate(sinks_of(weights, q.shape[1])):
            g = h // group
            out[:, h] = attention(
                np.ascontiguousarray(q[:, h]),
                positions,
                _head(k, g),
                dk[:, g],
                _head(v, g),
                dv[:, g],
                self.window,
                sink,
                self.scale,
            )
        return (out.reshape(len(out), -1),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """Head by head, to bound the memory."""
        q, keys, values, positions = inputs
        out = np.empty(q.shape)
        sinks = sinks_of(weights, q.shape[1])
        for h, k in _float64_heads(q, keys):
            scores = q[:, h].astype(np.float64) @ k.T * exact_scale(q, self.scale)
            s = _softmax_float64(scores, positions, self.window, sinks[h])
            out[:, h] = s @ values[:, h * keys.shape[1] // q.shape[1]].astype(np.float64)
        return (out.reshape(len(out), -1),)


def exact_scale(q: Array, scale: float | None) -> float:
    """What scores of q [T, H, size] are multiplied by, in binary64."""
    return float(q.shape[2] ** -0.5) if scale is None else scale


def sinks_of(weights: Sequence[Weight], heads: int) -> Sequence[np.float32 | None]:
    """The sink of each head, if there are any."""
    return list(weights[0].float32()) if weights else [None] * heads


def masked(maps: Array, positions: Array, window: int | None) -> Array:
    """Attention maps [T, H, N] with 0 for the keys that a token does not see."""
    seen = visible(np.arange(maps.shape[2]), positions, window)
    return np.where(seen[:, None], maps, maps.dtype.type(0))


def softmax(x: Array) -> NDArray[np.float64]:
    """Softmax of the last axis in float64."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    out: NDArray[np.float64] = e / e.sum(axis=-1, keepdims=True)
    return out


def _softmax_float64(
    scores: Array, positions: Array, window: int | None, sink: np.float32 | None
) -> NDArray[np.float64]:
    """Softmax of a head's scores [T, N] over the keys that each token sees, and its sink."""
    x = np.full((len(scores), scores.shape[1] + 1), -np.inf)
    seen = visible(np.arange(scores.shape[1]), positions, window)
    x[:, :-1] = np.where(seen, scores.astype(np.float64), -np.inf)
    if sink is not None:
        x[:, -1] = sink
    return softmax(x)[:, :-1]


def _head(k: Array, head: int) -> NDArray[np.int16]:
    return np.ascontiguousarray(k[:, head]).astype(np.int16)


def _float64_heads(q: Array, keys: Array) -> Iterator[tuple[int, Array]]:
    for h in range(q.shape[1]):
        yield h, keys[:, h * keys.shape[1] // q.shape[1]].astype(np.float64)
