"""Attention: tiles of keys, then the tiles of a query head merged, with the quantisation."""

from collections.abc import Iterable

from isobit.backends.base.workspace import TILES
from isobit.backends.wgpu.device.gpu import Step
from isobit.backends.wgpu.device.layout import superblocks
from isobit.backends.wgpu.lowering import Lowering, Pass
from isobit.backends.wgpu.ops.append import queries
from isobit.model.graph import Op
from isobit.numerics.ops import Attention


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.wgpu.ops`."""
    q, k, v = (x.shape.row for x in op.inputs[:3])
    return None if q[1] == k[1] == v[1] else f"expected head vectors of one size, got {q}, {k}, {v}"


def lower(g: Lowering, op: Op) -> None:
    """As many tokens at a time as their tiles have room."""
    assert isinstance(op.operation, Attention)
    (y,), (q, keys, _, _) = op.outputs, op.inputs
    window = op.operation.window or 0
    sinks_at = g.vector(op.weights[0]) + 1 if op.weights else 0
    n_heads, size = q.shape.row
    cache = g.caches[keys]
    asked = queries(g, q, op.operation.scale)
    partial = g.scratch("attention", n_heads * (size + 2), TILES)  # o, m, l of every head
    result, acts = g.new(y), g.acts_of(y, y.shape.width)
    each = n_heads // cache.kv_heads

    def steps(p: Pass) -> Iterable[Step]:
        at, at_once = g.at(p), partial.capacity // p.tiles
        for first in range(0, p.tokens, at_once):
            some = min(at_once, p.tokens - first)
            for part in cache.parts:
                yield g.step(
                    "ops/attention",
                    (asked, g.batch, part.buffer, partial),
                    (
                        *(n_heads, cache.kv_heads, size, part.first, part.heads),
                        *(first, p.tiles, at.tables, at.pages, window),
                    ),
                    (part.heads * each, p.tiles, some),
                    (g.device.dot, "reduce", "cache"),
                )
            yield g.step(
                "ops/attention_merge",
                (partial, g.batch, g.vectors, result, acts),
                (n_heads, size, first, p.tiles, window, sinks_at),
                (superblocks(n_heads * size), some),
                ("reduce", "cache", "quantise"),
                PLANES=g.planes,
            )

    g.emit(steps)
