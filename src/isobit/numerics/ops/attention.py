"""Attention over the keys and values of a sequence (docs/numerics.md, section 6)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.numerics.attention import attention, attention_scores, attention_softmax
from isobit.numerics.fixed import quantise
from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import HISTORY, Array, Arrays, Context, Operation, Shape


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
    """q [T, H, size], keys [N, G, size], positions int32 [T]: scores [T, H, N], 0 beyond positions.

    A definition for traces and ablations; attention does not read it.
    """

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
            out.append(attention_scores(np.ascontiguousarray(q[:, h]), k_h, dk_h))
        return (masked(np.stack(out, axis=1), positions),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        q, keys, positions = inputs
        out = np.empty((*q.shape[:2], len(keys)))
        for h, k in _float64_heads(q, keys):
            out[:, h] = q[:, h].astype(np.float64) @ k.T / np.sqrt(q.shape[2])
        return (masked(out, positions),)


@dataclass(frozen=True)
class AttentionSoftmax(Operation):
    """Scores [T, H, N] and positions int32 [T]: their softmax, 0 beyond positions. A definition for
    traces and ablations."""

    kind = "attention_softmax"
    per_sequence = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return (inputs[0],)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        scores, positions = inputs
        heads = range(scores.shape[1])
        return (np.stack([attention_softmax(scores[:, h], positions) for h in heads], axis=1),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        scores, positions = inputs
        seen = np.arange(scores.shape[2]) <= positions[:, None]
        return (softmax(np.where(seen[:, None], scores.astype(np.float64), -np.inf)),)


@dataclass(frozen=True)
class Attention(Operation):
    """q [T, H, size], keys and values [N, G, size], positions int32 [T]: [T, H * size], heads side
    by side."""

    kind = "attention"
    per_sequence = True

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        q, keys, values, _ = inputs
        if q.row[0] % keys.row[0] or q.row[1] != keys.row[1]:
            raise ValueError(f"query heads {q.row}: expected a multiple of {keys.row}")
        return (Shape((q.row[0] * values.row[1],), q.rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        q, keys, values, positions = inputs
        k, dk = quantise(np.ascontiguousarray(keys), planes=2)
        v, dv = quantise(np.ascontiguousarray(values), planes=2)
        group = q.shape[1] // keys.shape[1]
        out = np.empty_like(q)
        for h in range(q.shape[1]):
            g = h // group
            out[:, h] = attention(
                np.ascontiguousarray(q[:, h]),
                positions,
                _head(k, g),
                dk[:, g],
                _head(v, g),
                dv[:, g],
            )
        return (out.reshape(len(out), -1),)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """Head by head, to bound the memory."""
        q, keys, values, positions = inputs
        out = np.empty(q.shape)
        for h, k in _float64_heads(q, keys):
            one = q[:, h : h + 1], k[:, None], positions
            (scores,) = AttentionScores().float64(run, (), *one)
            (s,) = AttentionSoftmax().float64(run, (), scores, positions)
            out[:, h] = s[:, 0] @ values[:, h * keys.shape[1] // q.shape[1]].astype(np.float64)
        return (out.reshape(len(out), -1),)


def masked(maps: Array, positions: Array) -> Array:
    """Attention maps [T, H, N] with 0 beyond each token's position."""
    seen = np.arange(maps.shape[2]) <= positions[:, None]
    return np.where(seen[:, None], maps, maps.dtype.type(0))


def softmax(x: Array) -> NDArray[np.float64]:
    """Softmax of the last axis in float64."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    out: NDArray[np.float64] = e / e.sum(axis=-1, keepdims=True)
    return out


def _head(k: Array, head: int) -> NDArray[np.int16]:
    return np.ascontiguousarray(k[:, head]).astype(np.int16)


def _float64_heads(q: Array, keys: Array) -> Iterator[tuple[int, Array]]:
    for h in range(q.shape[1]):
        yield h, keys[:, h * keys.shape[1] // q.shape[1]].astype(np.float64)
