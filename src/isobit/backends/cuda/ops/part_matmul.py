"""A product of a step in parts: a block takes one superblock of columns, and what is behind adds
the parts up in order."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isobit.backends.cuda.device.layout import COLUMN_ACT_BYTES, TILE_ROWS
from isobit.backends.cuda.device.load import DeviceWeight, fuse_adjacent
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import Launch, Lowering, Parts
from isobit.backends.cuda.ops.groups import GROUPS
from isobit.backends.cuda.ops.launch_shapes import BESIDE, FEWEST, SPARE, bring
from isobit.backends.cuda.workspace import MIXED, STEPS, BufferView, Pass, Source, TracePoint
from isobit.model.graph import Value

_PART_TOKENS = 128
"""Up to which steps leave products in parts."""
_WHOLE = range(GROUPS[0] + 1, FEWEST + 1)
"""But for these, whose whole products by blocks that share activations are as fast."""
_PART_SHAPES = (2, 10), (1, 20)
"""Blocks of a multiprocessor, and their warps at most: the first that fits."""


def parts_of(g: Lowering, weights: Sequence[DeviceWeight], y: Value) -> Parts | None:
    """In which small passes leave a product, if they do."""
    fused = fuse_adjacent(weights)
    count = supers(weights[0].columns)
    streamed = all(w.layout.fused and w.rows % (2 * TILE_ROWS) == 0 for w in fused)
    if (
        g.kind not in (STEPS, MIXED)
        or not _PART_TOKENS
        or count == 1
        or len(fused) > 2
        or not streamed
    ):
        return None
    if count > g.gpu.multiprocessors or part_shape(g, fused, _PART_TOKENS) is None:
        return None
    slot = g.form(y, "parts", more=count * y.shape.width * _PART_TOKENS)
    return Parts(slot, count, _PART_TOKENS, _WHOLE)


def part_shape(
    g: Lowering, fused: Sequence[DeviceWeight], tokens: int
) -> tuple[int, int, int, int, int] | None:
    """How part_matmul.cu takes matrices: blocks of a multiprocessor, slices of the row blocks,
    warps of a block, row blocks of each, and bytes of shared memory; None if it does not."""
    row_blocks = sum(w.rows for w in fused) // (2 * TILE_ROWS)
    slot = 2 * TILE_ROWS * max(w.layout.format.block_bytes for w in fused)
    for blocks, most_warps in _PART_SHAPES:
        slices = min(blocks * g.gpu.multiprocessors // supers(fused[0].columns), row_blocks)
        each = -(-row_blocks // slices)
        rounds = -(-each // most_warps)
        warps = -(-each // rounds)
        shared = tokens * COLUMN_ACT_BYTES + warps * rounds * slot
        if shared <= (g.gpu.shared_most - SPARE) // blocks - 1024:
            return blocks, slices, warps, rounds, shared
    return None


def lower_parts(
    g: Lowering,
    weights: Sequence[DeviceWeight],
    x: Value,
    y: Value,
    parts: Parts,
    to: BufferView,
    whole: Launch,
) -> None:
    """In parts in small passes; in large ones ``whole`` makes it in ``to``."""
    width, acts = y.shape.width, g.acts(x, weights[0].columns)
    g.parts[y], ahead, (w, *more) = parts, g.ahead, fuse_adjacent(weights)

    def make(p: Pass) -> None:
        n = p.tokens
        shape = part_shape(g, [w, *more], n)
        if parts.count(p) == 1 or shape is None:
            whole(p)
            return
        blocks, slices, warps, rounds, shared = shape
        defines: dict[str, str | int] = {"WEIGHT": f"Tiled{w.layout.format.name}", "ROUNDS": rounds}
        defines |= {"BLOCK": 32 * warps, "AT_ONCE": blocks}
        defines |= {"MORE": f"Tiled{more[0].layout.format.name}"} if more else {}
        room = {1: (16, BESIDE), 2: (8, 64)}.get(blocks, (0, 0))
        defines |= {"BESIDE": room[1]} if warps <= room[0] else {}
        brought, how = bring(ahead, n)
        defines |= how
        second, more_rows = (more[0].address, more[0].rows) if more else (0, 0)
        rows = w.rows // (2 * TILE_ROWS), more_rows // (2 * TILE_ROWS)
        g.launch(
            "ops/part_matmul",
            (slices * parts.parts,),
            (w.address, second, *rows, parts.parts, slices, acts.address, n)
            + (parts.slot.address, width, *brought),
            defines,
            shared=shared,
        )

    def read(source: Source, p: Pass) -> NDArray[np.generic]:
        rows, n = p.rows(y.shape), parts.count(p)
        found = np.empty((n, rows, width), np.float32)
        source.download(parts.slot.address if n > 1 else to.address, found)
        total = found[0] if n == 1 else np.zeros_like(found[0])
        for part in found if n > 1 else ():
            total += part
        whole: NDArray[np.generic] = total.reshape(rows, *y.shape.row)
        return whole

    g.emit(make)
    if y.name is not None:
        g.made.append(TracePoint(y, read))
