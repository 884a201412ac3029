"""Attention: a query head of a token a block, or many tokens on tensor cores; in a step, tiles."""

from collections.abc import Callable

from isobit.backends.base.workspace import TILES
from isobit.backends.cuda.lowering import WARPS, Lowering
from isobit.backends.cuda.ops.append import padded_head, queries
from isobit.backends.cuda.workspace import Pass, Slot
from isobit.model.graph import Op
from isobit.numerics import KV_PAGE
from isobit.numerics.ops import TOKENS, Attention

_TILE_BLOCKS = 4  # of a multiprocessor
MMA_ROWS = 16
"""Tokens of one query head in one tensor-core product of attention_mma.cu."""


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.cuda.ops`."""
    q, k, v = (x.shape.row for x in op.inputs[:3])
    return None if q[1] == k[1] == v[1] else f"expected head vectors of one size, got {q}, {k}, {v}"


def span_length(heads: int, kv_heads: int, head_dim: int) -> int:
    """Tokens that a block of attention_mma.cu takes; 0 if it does not know this head_dim."""
    return MMA_ROWS * (WARPS // min(heads // kv_heads, WARPS)) if head_dim in (64, 96, 128) else 0


def lower(g: Lowering, op: Op) -> None:
    """Which of the two, each pass says (``Pass.spans``)."""
    (y,), (q, keys, _, _) = op.outputs, op.inputs
    assert isinstance(op.operation, Attention)
    heads, size = q.shape.row
    cache = g.cache(keys)
    integers, scales = queries(g, q, cache, op.operation.scale)
    if g.captured:
        _lower_step(g, op, integers, scales)
        return
    (to, exchange), length = g.target(y), span_length(heads, cache.heads, size)
    mirrored = {"OUT_HEADS": to.stride // size} if to.stride != y.shape.width else {}
    window, sinks = _limits(g, op)
    if op.weights or window:  # attention_mma.cu knows neither
        length = 0
    if length and length not in g.spans:
        g.spans[length] = g.fixed("span_first", 1, TOKENS), g.fixed("span_count", 1, TOKENS)

    def make(p: Pass) -> None:
        at = p.inputs
        asked = (integers.address, scales.address, at.positions, at.sequence, at.pages, at.each)
        if not p.spans.get(length):
            g.launch(
                "ops/attention",
                (heads, p.tokens),
                (size, *asked, heads, *cache.arguments, window, sinks())
                + (to.address, exchange.arguments[0]),
                {"PADDED_HEAD": padded_head(size), **exchange.defines, **mirrored},
            )
            return
        group = heads // cache.heads
        tile_bytes = 2 * KV_PAGE * (size + 16) + 2 * size * (KV_PAGE + 16) + 8 * KV_PAGE
        stage = 2 if 4 * tile_bytes <= g.gpu.shared_most else 1  # tiles; two stages are held
        spans = (slot.address for slot in g.spans[length])
        g.launch(
            "ops/attention_mma",
            (cache.heads, p.spans[length], -(-group // WARPS)),
            (*asked, *spans, heads, *cache.arguments, to.address, exchange.arguments[0]),
            {"HEAD": size, "STAGE": stage, **exchange.defines, **mirrored},
            shared=2 * stage * tile_bytes,
        )

    g.emit(make, y)


def _limits(g: Lowering, op: Op) -> tuple[int, Callable[[], int]]:
    """The window, 0 for none, and the sinks, null for none."""
    assert isinstance(op.operation, Attention)
    return op.operation.window or 0, g.vector(op.weights[0]) if op.weights else int


def _lower_step(g: Lowering, op: Op, integers: Slot, scales: Slot) -> None:
    """A step's tiles of keys side by side, as many as multiprocessors take; then merged."""
    (y,), (q, keys, _, _) = op.outputs, op.inputs
    heads, size = q.shape.row
    cache, to = g.cache(keys), g.new(y)
    window, sinks = _limits(g, op)
    maxima, outputs = (
        g.slot("max_and_sum", 2 * heads, TILES),
        g.slot("tile_out", y.shape.width, TILES),
    )

    def make(p: Pass) -> None:
        at, defines = p.inputs, {"PADDED_HEAD": padded_head(size)}
        blocks = max(1, _TILE_BLOCKS * g.gpu.multiprocessors // (heads * p.tokens))
        g.launch(
            "ops/attention.attention_tiles",
            (heads, p.tokens, min(g.tiles, blocks)),
            (size, integers.address, scales.address, at.positions, at.sequence, at.pages, at.each)
            + (heads, *cache.arguments, window, g.tiles, maxima.address, outputs.address),
            defines,
        )
        g.launch(
            "ops/attention.attention_merge",
            (heads, p.tokens),
            (size, at.positions, heads, window, sinks(), g.tiles, maxima.address)
            + (outputs.address, to.address),
            defines,
        )

    g.emit(make, y)
