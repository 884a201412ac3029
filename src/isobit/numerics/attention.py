"""Attention over a fixed-point KV cache (docs/numerics.md, section 6)."""

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32
from isobit.numerics.fixed import planes_of, quantise
from isobit.numerics.pointwise import exp, tree

KV_PAGE = 64
"""Keys in a tile, and positions in a page of the KV cache."""

_256 = np.float32(256)
_ONE = np.float32(1)


def attention_scale(head_dim: int, scale: float | None = None) -> np.float32:
    """What scores are multiplied by: ``scale``, or 1 / sqrt(head_dim); rounded once from
    binary64."""
    return np.float32(1.0 / np.sqrt(np.float64(head_dim)) if scale is None else scale)


def attention(
    q: F32,
    positions: NDArray[np.int32],
    k: NDArray[np.int16],
    dk: F32,
    v: NDArray[np.int16],
    dv: F32,
    window: int | None = None,
    sink: np.float32 | None = None,
    scale: float | None = None,
) -> F32:
    """One query head over one key-value head of one sequence.

    q float32 [T, head_dim] after RoPE; positions int32 [T]; k, v int16 [n, head_dim] with scales
    dk, dv float32 [n], n > max(positions). ``window``: how many positions a query sees, its own
    among them (None: all up to its own). ``sink``: what joins the softmax without a value;
    ``scale``: see :func:`attention_scale`. Returns float32 [T, head_dim].
    """
    head_dim = q.shape[1]
    q_int, dq = quantise(q, planes=2)
    dq = dq * attention_scale(head_dim, scale)
    first_tile, last_tile = first_seen(positions, window) // KV_PAGE, positions // KV_PAGE
    m = np.zeros(len(q), np.float32)
    total = np.zeros(len(q), np.float32)
    out = np.zeros_like(q)
    for t in range(int(first_tile.min()), int(last_tile.max()) + 1):
        rows = np.flatnonzero((first_tile <= t) & (t <= last_tile))  # queries that see this tile
        keys = np.arange(KV_PAGE * t, min(KV_PAGE * (t + 1), len(k)))
        seen = visible(keys, positions[rows], window)
        mt, lt, ot = _tile(q_int[rows], dq[rows], seen, k[keys], dk[keys], v[keys], dv[keys])
        first = first_tile[rows] == t
        top = np.where(first, mt, np.maximum(m[rows], mt))
        a, b = exp(m[rows] - top), exp(mt - top)
        total[rows] = np.where(first, lt, total[rows] * a + lt * b)
        out[rows] = np.where(first[:, None], ot, out[rows] * a[:, None] + ot * b[:, None])
        m[rows] = top
    if sink is not None:
        top = np.maximum(m, sink)
        a = exp(m - top)
        total, out = total * a + exp(sink - top), out * a[:, None]
    return out * (_ONE / total)[:, None]


def first_seen(positions: NDArray[np.int32], window: int | None) -> NDArray[np.int32]:
    """The first position that each query sees: int32 [T]."""
    return positions * 0 if window is None else np.maximum(positions - np.int32(window - 1), 0)


def visible(
    keys: NDArray[np.integer], positions: NDArray[np.int32], window: int | None
) -> NDArray[np.bool_]:
    """Which keys, given by position, each query sees: [T, keys]."""
    positions = positions[:, None]
    return (keys <= positions) & (keys >= first_seen(positions, window))


def attention_scores(q: F32, k: NDArray[np.int16], dk: F32, scale: float | None = None) -> F32:
    """The scores s_j of one head: q float32 [T, head_dim], keys as in :func:`attention`.

    Returns float32 [T, n], the keys beyond a query's position included.
    """
    q_int, dq = quantise(q, planes=2)
    return _scores(q_int, dq * attention_scale(q.shape[1], scale), k, dk)


def attention_softmax(
    s: F32,
    positions: NDArray[np.int32],
    window: int | None = None,
    sink: np.float32 | None = None,
) -> F32:
    """Softmax of scores [T, n] as the tiles' p, m and l give it: (p_j * exp(m_t - m)) * (1 / l).

    Nothing is computed from it; :func:`attention` weighs values tile by tile. +0 beyond positions
    and before the window.
    """
    tokens, n = s.shape
    tiles = np.full((tokens, -(-n // KV_PAGE), KV_PAGE), -np.inf, np.float32)
    tiles.reshape(tokens, -1)[:, :n] = np.where(
        visible(np.arange(n), positions, window), s, -np.inf
    )
    mt = tiles.max(axis=2)
    p = exp(tiles - np.where(np.isneginf(mt), np.float32(0), mt)[..., None])
    lt = tree(p)
    m, total = mt[:, 0], lt[:, 0]
    for t in range(1, tiles.shape[1]):
        top = np.maximum(m, mt[:, t])
        base = np.where(np.isneginf(top), np.float32(0), top)  # before the window
        total = total * exp(m - base) + lt[:, t] * exp(mt[:, t] - base)
        m = top
    if sink is not None:
        top = np.maximum(m, sink)
        total, m = total * exp(m - top) + exp(sink - top), top
    weights = (p * exp(mt - m[:, None])[..., None]) * (_ONE / total)[:, None, None]
    return weights.reshape(tokens, -1)[:, :n]


def _scores(q: NDArray[np.int32], dq: F32, k: NDArray[np.int16], dk: F32) -> F32:
    high, low = planes_of(k.astype(np.int32), planes=2)
    return (dq[:, None] * dk) * (_dot(q, high.T) * _256 + _dot(q, low.T))


def _tile(
    q: NDArray[np.int32],
    dq: F32,
    seen: NDArray[np.bool_],
    k: NDArray[np.int16],
    dk: F32,
    v: NDArray[np.int16],
    dv: F32,
) -> tuple[F32, F32, F32]:
    """A tile's keys for queries that each see at least one of them: (m_t, l_t, o_t)."""
    n = len(k)
    s = np.where(seen, _scores(q, dq, k, dk), np.float32(-np.inf))
    m = s.max(axis=1)
    p = np.zeros((len(q), KV_PAGE), np.float32)
    p[:, :n] = np.where(seen, exp(s - m[:, None]), np.float32(0))
    weighted = np.zeros_like(p)
    weighted[:, :n] = np.where(seen, p[:, :n] * dv, np.float32(0))
    p_int, g = quantise(weighted, planes=2)
    high, low = planes_of(v.astype(np.int32), planes=2)
    o = g[:, None] * (_dot(p_int[:, :n], high) * _256 + _dot(p_int[:, :n], low))
    return m, tree(p), o


def _dot(a: NDArray[np.int32], b: NDArray[np.int32]) -> F32:
    """Integer matrix product, exact in float64, rounded once to float32."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
