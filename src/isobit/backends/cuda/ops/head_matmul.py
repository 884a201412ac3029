"""The product of several rows with an output matrix, by Hopper's products of warpgroups."""

from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import Lowering

_FROM = 9
"""Rows from which it is faster than batch_matmul.cu."""
_SHAPES = (16, 1, 3), (32, 1, 3), (32, 2, 3)
"""Of head_wgmma.cu: columns, parts of as many, warpgroups; the first that has room for all rows."""
_TILE, _HELD, _DEPTH = 64, 128 << 10, 3
"""Rows of the matrix that a warpgroup takes; bytes of activations in shared memory; superblocks on
their way to a warp at most."""


def fits(g: Lowering, w: DeviceWeight, rows: int) -> bool:
    """Whether head_wgmma.cu takes it."""
    known = w.layout.fused and w.layout.format.name == "Q6_K" and w.rows % _TILE == 0
    return known and g.gpu.warpgroups and _FROM <= rows <= _SHAPES[-1][0] * _SHAPES[-1][1]


def launch(g: Lowering, w: DeviceWeight, acts: int, rows: int, y: int, stride: int) -> None:
    """Queue ``y = W x``."""
    columns, parts, groups = next(s for s in _SHAPES if s[0] * s[1] >= rows)
    s, slot, of_super = supers(w.columns), 16 * w.layout.format.block_bytes, 256 * g.planes
    held = min(s, _HELD // (of_super * columns * parts))
    of_held = held * columns * parts * (of_super + 4 + 4 * g.planes)
    of_slots = 4 * groups * (slot + 8)
    depth = min(_DEPTH, (g.gpu.shared_most - of_held - 1024) // of_slots)
    g.launch(
        "ops/head_wgmma",
        (g.gpu.multiprocessors,),
        (w.address, w.rows // _TILE, s, acts, rows, y, stride),
        {
            "COLUMNS": columns,
            "PARTS": parts,
            "BLOCK": 128 * groups,
            "HELD": held,
            "DEPTH": depth,
        },
        shared=-(-(of_held + depth * of_slots) // 16) * 16,
    )
