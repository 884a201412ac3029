"""Attention over the fixed-point cache of two sequences, on pages in any order."""

import numpy as np

from isobit.model.graph import Value
from isobit.numerics import RopeTable
from isobit.numerics.ops import Append, Attention, MatMul, Multiply, RmsNorm, Rope
from tests.ops.harness import Array, Case, Writer
from tests.ops.inputs import edge_rows, floats, values

from .products import one_hot


def attend(g: Writer, q: Value, k: Value, v: Value, of: Attention, sinks: object = None) -> Value:
    """Keys and values stored, then read."""
    keys, stored = g.add(None, Append(), k, v)
    weights = [] if sinks is None else [floats(np.array(sinks))]
    return g.one("y", of, q, keys, stored, g.positions, weights=weights)


def vectors(g: Writer, *counts: int, size: int, x: Array) -> list[Value]:
    """Head vectors of a row, of so many heads each; the first are made by an operation."""
    row, at, found = g.given(x), 0, []
    for n in counts:
        found.append(g.heads(row, at, n, size))
        at += n * size
    ones = g.heads(g.given(np.ones((g.rows, counts[0] * size))), 0, counts[0], size)
    return [g.one(None, Multiply(), found[0], ones), *found[1:]]


def spread(g: Writer, heads: int, kv_heads: int, size: int) -> Array:
    """Queries, keys and values of many lengths; most tokens look at several keys."""
    x = g.rng.standard_normal((g.rows, heads + 2 * kv_heads, size))
    decades = g.rng.uniform(-2, 0.5, x.shape[:2])
    decades[:, heads + kv_heads :] *= 3
    return (x * 10.0 ** decades[..., None]).reshape(g.rows, -1).astype(np.float32)


def attention_of_normed(g: Writer, size: int, heads: int, kv_heads: int) -> Value:
    """Behind norm and RoPE of q and k; a product reads it."""
    x = g.given(values(g.rng, g.rows, (heads + 2 * kv_heads) * size))
    at, rotated = 0, []
    for n in (heads, kv_heads):
        y = g.one(None, RmsNorm(1e-6), g.heads(x, at, n, size), weights=[g.vector(size)])
        rotated.append(g.one(None, Rope(RopeTable(size, 1e4)), y, g.positions))
        at += n * size
    y = attend(g, *rotated, g.heads(x, at, kv_heads, size), Attention())
    if heads * size % 32 == 0:
        y = g.one("out", MatMul(), y, weights=[one_hot(g.rng, 40, heads * size)])
    return y


def attention(g: Writer, size: int, heads: int, kv_heads: int, scale: float | None = None) -> Value:
    x = spread(g, heads, kv_heads, size)
    x[2, : heads * size] = 0
    x[3, -size:] = 0  # a value vector of zeros
    q, k, v = vectors(g, heads, kv_heads, kv_heads, size=size, x=x)
    return attend(g, q, k, v, Attention(None, scale))


def window_and_sinks(g: Writer, window: int | None, sinks: bool, normed: bool = False) -> Value:
    """Of four query heads, whose sinks weigh nothing, little, as much, and nearly all."""
    q, k, v = vectors(g, 4, 2, 2, size=20, x=spread(g, 4, 2, 20))
    return attend(g, q, k, v, Attention(window), [-300, 0.3, 3, 99] if sinks else None)


def largest_integers(g: Writer, size: int) -> Value:
    """q, k, v and the probabilities at their limits: every integer sum still fits."""
    x = np.empty((g.rows, 6, size), np.float32)
    x[:, :2] = 2.5
    x[::3, 0] *= -1
    full = edge_rows(g.rng, size)
    kinds = np.stack([full[9], full[10], full[11], full[12]])  # 1, -1, the largest low planes
    x[:, 2:] = kinds[None] * np.float32(1e-6)
    q, k, v = vectors(g, 2, 2, 2, size=size, x=x.reshape(g.rows, -1))
    return attend(g, q, k, v, Attention())


def zero_scales(g: Writer, zero: str) -> Value:
    x = g.rng.standard_normal((g.rows, 3 * 64)).astype(np.float32)
    at = {"keys": 64, "values": 128}[zero]
    x[:, at : at + 64] = 0
    return attend(g, *vectors(g, 1, 1, 1, size=64, x=x), Attention())


SHAPES = ((128, 4, 2), (80, 3, 1), (10, 4, 4), (258, 2, 1), (512, 2, 1))
LONG = "wgpu", "emulated"
CUTS = ((), (1, 64))
CASES = (
    *(
        Case(
            attention_of_normed,
            {"size": size, "heads": h, "kv_heads": kv},
            (70, 5),
            CUTS,
            1 + i % 2,
            also=("unfused",),
        )
        for i, (size, h, kv) in enumerate(SHAPES)
    ),
    *(
        Case(attention, {"size": size, "heads": 2, "kv_heads": 1}, (200, 5), CUTS, not_on=LONG)
        for size in (2, 6, 64, 100, 128, 256, 512)
    ),
    *(
        Case(attention, {"size": size, "heads": 2, "kv_heads": 1, "scale": scale}, (70, 5), CUTS)
        for size, scale in ((64, 0.7), (6, None), (96, 0.01))
    ),
    *(
        Case(window_and_sinks, {"window": window, "sinks": sinks}, (140, 66), ((), (66,)))
        for window in (None, 1, 33, 64, 100, 300)
        for sinks in (False, True)
    ),
    *(
        Case(largest_integers, {"size": size}, (128,), ((),), not_on=LONG if size > 128 else ())
        for size in (128, 512)
    ),
    *(Case(zero_scales, {"zero": zero}, (70,), ((),)) for zero in ("keys", "values")),
)
