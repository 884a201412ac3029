"""Keys and values into the cache, and queries: head vectors quantised as attention reads them."""

from collections.abc import Iterable

from isobit import numerics
from isobit.backends.wgpu.device.gpu import Step
from isobit.backends.wgpu.lowering import (
    CachePart,
    KvCache,
    Lowering,
    Pass,
    Slot,
    bits,
    words_of,
)
from isobit.model.graph import Op, Value

QUERY, KEY, VALUE = range(3)
_WIDEST = 512  # values of a head vector


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.wgpu.ops`."""
    k, v = (x.shape.row for x in op.inputs)
    if k != v or k[1] > _WIDEST:
        return f"expected keys and values alike, of at most {_WIDEST} values; got {k} and {v}"
    return None


def lower(g: Lowering, op: Op) -> None:
    """The keys, then the values."""
    cache = cache_of(g, op)
    for kind, value in ((KEY, op.inputs[0]), (VALUE, op.inputs[1])):
        _store(g, kind, value, cache, g.nothing)


def cache_of(g: Lowering, op: Op) -> KvCache:
    """The cache that the operation appends to."""
    heads, size = op.inputs[0].shape.row
    cache = KvCache(heads, size)
    for value in op.outputs:
        g.caches[value] = cache
    return cache


def queries(g: Lowering, q: Value, scale: float | None) -> Slot:
    """Query heads as attention reads them, their scores to be multiplied by ``scale``."""
    if found := g.formed("queries", q):
        return found
    made = queries_of(g, q)
    _store(g, QUERY, q, None, made, scale)
    return made


def queries_of(g: Lowering, q: Value) -> Slot:
    """Where a launch leaves query heads as attention reads them."""
    heads, size = q.shape.row
    return g.form("queries", q, heads * (2 * words_of(size) + 1))


def _store(
    g: Lowering,
    kind: int,
    x: Value,
    cache: KvCache | None,
    queries: Slot,
    factor: float | None = None,
) -> None:
    heads, size = x.shape.row
    vectors, scale = g.rows(x, x.shape.width), bits(numerics.attention_scale(size, factor))

    def steps(p: Pass) -> Iterable[Step]:
        parts = cache.parts if cache else (CachePart(g.nothing.buffer, 0, heads),)
        for part in parts:
            yield g.step(
                "ops/append",
                (vectors.slot, g.batch, queries, part.buffer),
                (
                    *(kind, heads, size, part.first, part.heads, scale, g.at(p).slots),
                    *(vectors.first, vectors.stride),
                ),
                (part.heads, p.tokens),
                ("reduce", "cache", "head_store"),
            )

    g.emit(steps)
