"""How products whose weights are read once for a group of pairs fit a multiprocessor, and what they
bring into the device's cache for those behind them."""

from collections.abc import Sequence
from dataclasses import dataclass

from isobit.backends.cuda.device.layout import COLUMN_ACT_BYTES, LINE, TILE_ROWS, whole_lines
from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import Ahead, Lowering
from isobit.backends.cuda.ops.groups import GROUPS

FEWEST = 16
"""Tokens up to which blocks share the activations of dense products, and have ten warps for
experts."""
FEW = 64
"""Tokens up to which steps also quantise late, fetch groups together, and make products of two
formats by one launch."""
SPARE = 20 << 10  # bytes of shared memory
_SHAPES = (2, 8, 2), (1, 16, 2), (1, 8, 1)
"""Blocks of a multiprocessor, their warps, and superblocks on their way to each at least: the first
that fits; in a step, of groups of more than 8 pairs, the second before the first."""
_CHUNK = 4
"""Superblocks of activations of a prompt's product that are held, where not all fit."""
BESIDE = 96
"""Threads of the kernel behind that find registers beside a block of 16 warps."""
AHEAD = {GROUPS[0]: (36, 36), FEW: (18, 9)}
"""Of up to so many tokens, of a layer's experts each so many row blocks are fetched ahead by the
dense product before, and each so many others by gate and up while experts are chosen, beginning
with the fifth, so that none of multiples of these is both."""


@dataclass(frozen=True)
class LaunchShape:
    """How batch_matmul.cu fits a multiprocessor."""

    blocks: int
    warps: int
    """Of a block."""
    depth: int
    """Superblocks on their way to a warp."""
    columns: int
    chunk: int = 0
    """Superblocks of activations that are held, and as many on their way; 0: all are held."""

    def shared(self, w: DeviceWeight, *, split: bool = False) -> int:
        """Bytes of shared memory: activations, each warp's superblocks on their way, and, where a
        row block is split, the parts of two."""
        slot = whole_lines(2 * TILE_ROWS * w.layout.format.block_bytes)
        parts = 2 * 4 * 2 * TILE_ROWS * self.columns if split else 0
        held = 2 * self.chunk or supers(w.columns)
        of_columns = held * self.columns * COLUMN_ACT_BYTES + supers(w.columns) * parts
        return of_columns + self.warps * (LINE + self.depth * slot)

    def shared_most(self, g: Lowering) -> int:
        """Shared memory of each block. In a captured step some is left to the kernel behind, so
        that it can start early."""
        spare = SPARE if g.captured else 0
        return (g.gpu.shared_most - spare) // self.blocks - 1024

    def shallow(self, w: DeviceWeight) -> bool:
        """Whether activations leave half of the memory to weights."""
        return 2 * supers(w.columns) * self.columns * COLUMN_ACT_BYTES <= self.shared(w)


def launch_shape(
    g: Lowering,
    w: DeviceWeight,
    columns: int,
    up: DeviceWeight | None = None,
    *,
    first: Sequence[tuple[int, int, int]] = (),
    ordering: int = 0,
) -> LaunchShape | None:
    """How batch_matmul.cu takes a matrix, or ``up`` beside it, with groups of so many pairs; None
    if it does not. first: shapes that go before; ordering: bytes of shared memory besides."""
    alike = up is None or (w.layout, w.rows, w.columns) == (up.layout, up.rows, up.columns)
    if not w.layout.fused or w.rows % (2 * TILE_ROWS) or not alike:
        return None
    two, one, last = _SHAPES
    wide = g.captured and columns > GROUPS[0]
    for blocks, warps, least in (*first, *((one, two, last) if wide else _SHAPES)):
        for depth in (4, 3, 2, 1)[: 5 - least]:
            how = LaunchShape(blocks, warps, depth, columns)
            if how.shared(w) + ordering <= how.shared_most(g):
                return how
    return None


def chunked_shape(g: Lowering, w: DeviceWeight, columns: int) -> LaunchShape | None:
    """How it takes a matrix with more activations than fit, a chunk of them at a time; None if it
    does not."""
    how = LaunchShape(1, 16, 2, columns, _CHUNK)
    fits = columns == GROUPS[-1] and how.shared(w) <= how.shared_most(g)
    whole = w.rows % (2 * TILE_ROWS) == supers(w.columns) % _CHUNK == 0
    return how if w.layout.fused and whole and fits else None


def fits_all(
    g: Lowering, w: DeviceWeight, up: DeviceWeight | None = None, *, ordering: int = 0
) -> bool:
    """Whether it takes groups of every size."""
    return all(launch_shape(g, w, columns, up, ordering=ordering) for columns in GROUPS)


def _each(tokens: int) -> tuple[int, int]:
    return next((each for most, each in AHEAD.items() if tokens <= most), (0, 0))


def bring(ahead: Ahead, tokens: int) -> tuple[tuple[int, int, int, int], dict[str, int]]:
    """Arguments and definitions of what brings experts' weights into the device's cache; 0s if
    nothing does."""
    if not ahead.weights or not (every := _each(tokens)[0]):
        return (0, 0, 0, 0), {}
    gate, up = ahead.weights
    each = gate.layout.format.nbytes(TILE_ROWS * gate.columns)
    row_blocks = gate.matrices * gate.rows // TILE_ROWS
    return (gate.address, up.address, each, row_blocks), {"AHEAD": every}


def bring_own(tokens: int) -> dict[str, int]:
    """Definitions of gate and up that bring some of their weights before they know the experts."""
    every = _each(tokens)[1]
    return {"EARLY": every} if every else {}
