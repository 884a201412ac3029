"""Keys and values into the cache, and queries: head vectors quantised as attention reads them."""

from isobit import numerics
from isobit.backends.cuda.lowering import WARPS, Lowering
from isobit.backends.cuda.resident import KvCache
from isobit.backends.cuda.workspace import Pass, Slot
from isobit.model.graph import Op, Value

QUERY, KEY, VALUE = range(3)
_WIDEST = 512  # values of a head vector
_PADDED_TO = 128


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.cuda.ops`."""
    k, v = (x.shape.row for x in op.inputs)
    if k != v or k[1] > _WIDEST:
        return f"expected keys and values alike, of at most {_WIDEST} values; got {k} and {v}"
    return None


def lower(g: Lowering, op: Op) -> None:
    """The keys, then the values."""
    for kind, value in ((KEY, op.inputs[0]), (VALUE, op.inputs[1])):
        _store(g, kind, value, g.cache(op.outputs[0]), None)


def padded_head(head_dim: int) -> int:
    """Places for the values of a head vector: PADDED_HEAD of the kernels."""
    return -(-head_dim // _PADDED_TO) * _PADDED_TO


def queries(g: Lowering, q: Value, cache: KvCache, scale: float | None) -> tuple[Slot, Slot]:
    """Query heads as attention reads them: integers, and scales, times that of the scores."""
    integers, scales = g.formed(q, "q_int"), g.formed(q, "dq")
    if integers is None or scales is None:
        integers, scales = queries_of(g, q)
        _store(g, QUERY, q, cache, (integers, scales), scale)
    return integers, scales


def queries_of(g: Lowering, q: Value) -> tuple[Slot, Slot]:
    """Where a launch leaves query heads as attention reads them."""
    heads, size = q.shape.row
    return g.form(q, "q_int", heads * (-(-size // 16) * 8)), g.form(q, "dq", heads)


def _store(
    g: Lowering,
    kind: int,
    x: Value,
    cache: KvCache,
    queries: tuple[Slot, Slot] | None,
    factor: float | None = None,
) -> None:
    heads, size = x.shape.row
    view, scale = g.view(x, size), float(numerics.attention_scale(size, factor))

    def make(p: Pass) -> None:
        at, count = p.inputs, p.tokens * heads
        to = (s.address for s in queries) if queries else (0, 0)
        g.launch(
            "ops/append",
            (-(-count // WARPS),),
            (kind, *view(), heads, size, count, at.positions, at.sequence, at.pages, at.each)
            + (scale, *to, *cache.arguments),
            {"PADDED_HEAD": padded_head(size)},
        )

    g.emit(make)
