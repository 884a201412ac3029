"""Attention of one token of each sequence, from the product of q, k and v to the quantised input of
the product behind it: head vectors and tiles in one launch, all tiles merged by another. Where one
sequence may have any number of tokens, keys and values are stored by a launch before."""

from collections.abc import Mapping, Sequence
from functools import partial

from isobit.backends.base.workspace import TILES
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.fusions import head_vectors
from isobit.backends.cuda.fusions.head_vectors import (
    GATED_PATTERN,
    INNER,
    PATTERN,
    HeadVectors,
)
from isobit.backends.cuda.lowering import WARPS, Claimed, Lowering
from isobit.backends.cuda.ops.attention import MMA_ROWS, Way, ways
from isobit.backends.cuda.workspace import MIXED, NOT_EXCHANGED, STEPS, Pass, Slot
from isobit.model.graph import Op, Value
from isobit.numerics import KV_PAGE
from isobit.numerics.ops import TOKENS, Attention

FEW_TILES = 4  # FEW_TILES of merge.cuh
_MERGING = 2  # blocks of batch_merge.cu that a multiprocessor runs at once: AT_ONCE of step.cuh
PATTERN_OF_STEP = (*PATTERN, "y = attention q keys values positions")
GATED_PATTERN_OF_STEP = (*GATED_PATTERN, PATTERN_OF_STEP[-1], "gated = sigmoid_gate y gate")
INNER_OF_STEP = (*INNER, "q", "keys", "values")


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    v = g.match(ops, PATTERN_OF_STEP, INNER_OF_STEP)
    gated = g.match(ops, GATED_PATTERN_OF_STEP, (*INNER_OF_STEP, "gate", "y"))
    if (v := v or gated) is None or (h := HeadVectors.of(g, ops, v)) is None:
        return None
    count, gather = len(GATED_PATTERN_OF_STEP if gated else PATTERN_OF_STEP), None
    if not plain(next(op for op in ops if v["y"] in op.outputs)):
        return None
    y = v["gated"] if gated else v["y"]
    if not gated and count < len(ops) and ops[count].kind == "gather" and ops[count].inputs == (y,):
        gather, whole = ops[count], ops[count].outputs[0]
        if not g.ends(y, [gather]) or not g.exchanges_within(gather):
            return None
        count, y = count + 1, whole
    if not takes(g, h) or not g.only_multiplied(y) or y.shape.width % 256:
        return None
    if g.kind == STEPS and not gated and g.ends(v["qkv"], ops[:count]):
        g.added.add(v["qkv"])
    return count, partial(_lower, g, h, v, y, gather)


def plain(attention: Op) -> bool:
    """Whether attention sees all keys up to its own, and nothing else."""
    assert isinstance(attention.operation, Attention)
    return attention.operation.window is None and not attention.weights


def takes(g: Lowering, h: HeadVectors) -> bool:
    """Whether decode_attention.cu knows such heads, and has the memory."""
    known = h.head_dim % 64 == 0 and h.rotated % 64 == 0
    return known and _shared(h, 1, g.rows) <= g.gpu.shared_most


def defines(h: HeadVectors) -> dict[str, str | int]:
    """The definitions that merge.cuh asks for."""
    return {"HEADS": h.heads, "KV_HEADS": h.kv_heads, "HEAD_DIM": h.head_dim}


class TileResults:
    """Where each tile's maximum and sum, and its outputs, lie (TileResults of merge.cuh)."""

    def __init__(self, g: Lowering, h: HeadVectors) -> None:
        self.max_and_sum: Slot = g.slot("max_and_sum", 2 * h.heads, TILES)
        self.outputs: Slot = g.slot("tile_out", h.heads * h.head_dim, TILES)

    @property
    def addresses(self) -> tuple[int, int]:
        """Of both."""
        return self.max_and_sum.address, self.outputs.address


def attend(
    g: Lowering,
    h: HeadVectors,
    p: Pass,
    qkv: int,
    results: TileResults,
    most: int,
    buffers: int,
    acts: int | None = None,
    parts: int = 1,
) -> None:
    """Queue the kernel over tiles; ``most``: blocks that share the tiles of a head; ``buffers``:
    tiles a block holds. ``acts``: where it leaves them merged and quantised, one block having them
    all. ``parts``: of qkv."""
    at = p.inputs
    kin = {"KIN": g.rows} if g.rows > 1 else {}
    g.launch(
        "fusions/decode/decode_attention",
        (min(g.tiles, most), h.kv_heads, p.tokens),
        (qkv, h.q_norm(), h.k_norm(), h.eps, *h.rope.parts, at.positions, at.pages, h.scale)
        + (*h.cache.parts, g.tiles, at.of, *results.addresses, acts or 0),
        h.defines
        | {"BUFFERS": buffers}
        | kin
        | merged(acts)
        | ({"PARTS": parts} if parts > 1 else {}),
        shared=_shared(h, buffers, g.rows),
    )


def _attend_cached(
    g: Lowering,
    h: HeadVectors,
    p: Pass,
    q: tuple[Slot | None, ...],
    results: TileResults,
    most: int,
    acts: int | None,
    in_runs: int,
) -> None:
    buffers, at = tile_buffers(h, g.gpu), p.inputs
    integers, scales = q
    assert integers is not None
    assert scales is not None
    g.launch(
        "fusions/decode/cached_attention",
        (min(g.tiles, most), h.kv_heads, p.tokens),
        (integers.address, scales.address, at.positions, at.sequence, at.pages, at.each)
        + (*h.cache.parts, g.tiles, *results.addresses, acts or 0, in_runs),
        defines(h) | {"BUFFERS": buffers} | merged(acts),
        shared=_shared(h, buffers),
    )


class _Runs:
    """Runs of tokens of one sequence in a mixed batch, which warpgroups attend to together; what
    tells of them lies in memory, so that one graph takes any."""

    def __init__(self, g: Lowering, h: HeadVectors, way: Way, results: TileResults) -> None:
        if way.span not in g.spans:
            g.spans[way.span] = g.fixed("run_first", 1, TOKENS), g.fixed("run_count", 1, TOKENS)
            g.in_runs = g.fixed("in_runs", 1, TOKENS)
        self._g, self._h, self._way, self._results = g, h, way, results
        self._spans = g.spans[way.span]

    def attend(self, p: Pass, q: tuple[Slot | None, ...]) -> None:
        """Queue the kernel over their tiles."""
        g, h, at, (integers, scales) = self._g, self._h, p.inputs, q
        assert integers is not None
        assert scales is not None
        spans = most_spans(p.tokens)
        together = max(1, 2 * g.gpu.multiprocessors // (h.kv_heads * spans))
        g.launch(
            "ops/attention_wgmma",
            (h.kv_heads, spans, min(g.tiles, together)),
            (integers.address, scales.address, at.positions, at.sequence, at.pages, at.each)
            + (*(slot.address for slot in self._spans), h.heads, *h.cache.arguments)
            + (self._results.outputs.address, 0, self._results.max_and_sum.address, g.tiles),
            {"APART": 1},
            shared=self._way.shared,
        )


def most_spans(tokens: int) -> int:
    """Spans of runs in a mixed batch of so many tokens; other runs are attended to row by row."""
    return tokens // MMA_ROWS + 4


def _runs(g: Lowering, h: HeadVectors, results: TileResults, gather: Op | None) -> _Runs | None:
    """If this program may have any, and the device has such products."""
    way = next(ways(h.heads, h.kv_heads, h.head_dim, g.gpu), None)
    known = way is not None and way.kernel == "attention_wgmma" and way.span >= MMA_ROWS
    if g.kind != MIXED or gather or not known:
        return None
    assert way is not None
    return _Runs(g, h, way, results)


def _lower(
    g: Lowering, h: HeadVectors, v: Mapping[str, Value], y: Value, gather: Op | None
) -> None:
    """Up to y, which is what attention gives, or of a split model what all parts' give."""
    if g.kind == MIXED:
        head_vectors.lower(g, h, v)
    qkv, results, width = g.dense(v["qkv"]), TileResults(g, h), y.shape.width
    in_parts = g.parts.get(v["qkv"])
    acts = g.acts_of(y, width)
    exchange = g.exchange_of(gather) if gather else NOT_EXCHANGED
    merge = {**defines(h), **exchange.defines} | ({"GATED": 1} if h.gated else {})
    gates = qkv.stride if h.gated else 0
    of_q = g.formed(v["q"], "q_int"), g.formed(v["q"], "dq")
    runs = _runs(g, h, results, gather)

    def make(p: Pass) -> None:
        most = min(g.tiles, tiles_at_once(h, g.gpu, p.tokens))
        # Where attention gives other parts nothing: those have other heads of the rows.
        alone = most == 1 and merges(h) and not h.gated and gather is None
        whole = acts.address if alone else None
        in_runs = 0
        if runs and p.tokens >= MMA_ROWS:
            runs.attend(p, of_q)
            in_runs = g.in_runs.address
        if g.kind == MIXED:
            _attend_cached(g, h, p, of_q, results, most, whole, in_runs)
        else:
            parts = in_parts.count(p) if in_parts else 1
            at = in_parts.slot if in_parts and parts > 1 else qkv
            attend(g, h, p, at.address, results, most, tile_buffers(h, g.gpu), whole, parts)
        if whole is not None and not in_runs:
            return
        only = in_runs if whole is not None else 0
        count = p.tokens * supers(width)
        # Blocks that wait for other parts are no more at a time than run at once.
        at_once = _MERGING * g.gpu.multiprocessors if gather else p.tokens
        for first in range(0, p.tokens, at_once):
            rows = min(p.tokens - first, at_once)
            g.launch(
                "fusions/decode/batch_merge",
                (rows if gather else -(-count // WARPS),),
                (p.inputs.positions, *results.addresses, g.tiles, first, count, acts.address)
                + (qkv.address + 4 * h.head_dim, gates, only, *exchange.arguments),
                merge,
            )

    g.emit(make)


def merged(acts: int | None) -> dict[str, int]:
    """The definition that has attention merge its tiles itself."""
    return {} if acts is None else {"MERGED": 1}


def merges(h: HeadVectors) -> bool:
    """Whether the outputs of a key-value head are whole superblocks."""
    return h.heads // h.kv_heads * h.head_dim % 256 == 0


def _shared(h: HeadVectors, buffers: int, rows: int = 1) -> int:
    """Bytes of AttentionShared of decode_attention.cu."""
    columns = -(-h.heads // h.kv_heads // 8) * 8
    tiles = buffers * (4 * KV_PAGE * h.head_dim + 8 * KV_PAGE + 16)
    return (
        tiles + columns * (2 * h.head_dim + 8 * KV_PAGE + 16 + 8 + 16) + rows * (4 * h.head_dim + 8)
    )


def tiles_at_once(h: HeadVectors, gpu: Gpu, sequences: int = 1) -> int:
    """Tiles of a key-value head that blocks take at once: three blocks of a multiprocessor, of
    which one computes while others wait for their tiles."""
    return max(1, 3 * gpu.multiprocessors // (h.kv_heads * sequences))


def tile_buffers(h: HeadVectors, gpu: Gpu) -> int:
    """Tiles a block of the attention kernel holds: the next one is fetched if there is room."""
    return 2 if _shared(h, 2) <= gpu.shared_most // 3 else 1
