"""Attention: a query head of a token a block, or many tokens on tensor cores; in a step, tiles."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from isobit.backends.base.workspace import TILES
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.lowering import WARPS, Lowering
from isobit.backends.cuda.ops.append import padded_head, queries
from isobit.backends.cuda.workspace import Pass, Slot
from isobit.model.graph import Op
from isobit.numerics import KV_PAGE
from isobit.numerics.ops import TOKENS, Attention

_TILE_BLOCKS = 4  # of a multiprocessor
MMA_ROWS = 16
"""Tokens of one query head in one tensor-core product of attention_mma.cu."""
_WARPGROUP_ROWS = 128  # tokens of each query head that a block of attention_wgmma.cu takes
_TILE_BYTES = 4 * KV_PAGE * 128 + 8 * KV_PAGE + 16  # a tile of its Shared


def supports(op: Op) -> str | None:
    """See :mod:`isobit.backends.cuda.ops`."""
    q, k, v = (x.shape.row for x in op.inputs[:3])
    return None if q[1] == k[1] == v[1] else f"expected head vectors of one size, got {q}, {k}, {v}"


@dataclass(frozen=True)
class Way:
    """A kernel of many tokens on tensor cores, for heads of some number and size."""

    kernel: str
    span: int
    """Tokens that a block takes of one sequence."""
    blocks: int
    """Blocks that share the heads of a span."""
    shared: int
    defines: Mapping[str, int]
    apart: tuple[int, ...] = ()
    """What it is told of tiles apart, where there are none."""


def ways(heads: int, kv_heads: int, head_dim: int, gpu: Gpu) -> Iterator[Way]:
    """Those that this device has, the fastest first."""
    group = heads // kv_heads
    if gpu.warpgroups and head_dim == 128 and group <= _WARPGROUP_ROWS:
        shared = 4 * _TILE_BYTES + _WARPGROUP_ROWS * 2 * 128
        yield Way("attention_wgmma", _WARPGROUP_ROWS // group, 1, shared, {}, (0, 0))
    if head_dim in (64, 96, 128):
        tile = 2 * KV_PAGE * (head_dim + 16) + 2 * head_dim * (KV_PAGE + 16) + 8 * KV_PAGE
        stage = 2 if 4 * tile <= gpu.shared_most else 1  # tiles; two stages are held
        span, blocks = MMA_ROWS * (WARPS // min(group, WARPS)), -(-group // WARPS)
        defines = {"HEAD": head_dim, "STAGE": stage}
        yield Way("attention_mma", span, blocks, 2 * stage * tile, defines)


def in_turns(many: Way) -> Way | None:
    """The same in blocks of half as many tokens, whose warpgroups take tiles in turn: for so few
    spans that each multiprocessor would have one, and the last ones, with the most tiles, last."""
    if many.kernel != "attention_wgmma" or many.span < 2:
        return None
    rows = _WARPGROUP_ROWS // 2
    shared = 4 * _TILE_BYTES + rows * 2 * 128 + rows * 4 * 128 + 128 * 16 + 4 * 8
    return replace(many, span=many.span // 2, shared=shared, defines={"TURNS": 1})


def lower(g: Lowering, op: Op) -> None:
    """Which kernel, each pass says (``Pass.spans``)."""
    (y,), (q, keys, _, _) = op.outputs, op.inputs
    assert isinstance(op.operation, Attention)
    heads, size = q.shape.row
    cache = g.cache(keys)
    integers, scales = queries(g, q, cache, op.operation.scale)
    if g.captured:
        _lower_step(g, op, integers, scales)
        return
    to, exchange = g.target(y)
    mirrored = {"OUT_HEADS": to.stride // size} if to.stride != y.shape.width else {}
    window, sinks = _limits(g, op)
    many = next(ways(heads, cache.heads, size, g.gpu), None)
    if op.weights or window:  # no kernel of many tokens knows these
        many = None
    turns = in_turns(many) if many else None
    for way in (many, turns):
        if way and way.span not in g.spans:
            g.spans[way.span] = g.fixed("span_first", 1, TOKENS), g.fixed("span_count", 1, TOKENS)

    def make(p: Pass) -> None:
        at = p.inputs
        asked = (integers.address, scales.address, at.positions, at.sequence, at.pages, at.each)
        if many is None or not (spans := p.spans.get(many.span)):
            g.launch(
                "ops/attention",
                (heads, p.tokens),
                (size, *asked, heads, *cache.arguments, window, sinks())
                + (to.address, exchange.arguments[0]),
                {"PADDED_HEAD": padded_head(size), **exchange.defines, **mirrored},
            )
            return
        way = turns if turns and spans * cache.heads <= g.gpu.multiprocessors else many
        at_spans = (slot.address for slot in g.spans[way.span])
        g.launch(
            f"ops/{way.kernel}",
            (cache.heads, p.spans[way.span], way.blocks),
            (*asked, *at_spans, heads, *cache.arguments, to.address, exchange.arguments[0])
            + way.apart,
            {**way.defines, **exchange.defines, **mirrored},
            shared=way.shared,
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
