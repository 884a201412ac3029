"""Shared memory and definitions of kernels that stream tiles (Products of products.cuh)."""

from dataclasses import dataclass, replace

from isobit.backends.cuda.device.layout import LINE, TILE_ROWS, whole_lines
from isobit.backends.cuda.device.load import DeviceWeight
from isobit.backends.cuda.device.protocol import Gpu

WARPS = 16  # of a block of decode.cuh
_LANES = 4  # tiles of a step of a warp
_DEEPEST = 4


@dataclass(frozen=True)
class Streaming:
    """How such a kernel is compiled and launched."""

    shared: int
    """Dynamic shared memory."""
    defines: dict[str, str | int]

    def also(self, defines: dict[str, str | int]) -> "Streaming":
        """The same with more definitions."""
        return replace(self, defines=self.defines | defines)

    def with_at_least(self, shared: int) -> "Streaming":
        """The same with no less memory."""
        return replace(self, shared=max(self.shared, shared))


@dataclass(frozen=True)
class Part:
    """So many tiles a block of a matrix, whose definitions begin with ``role``."""

    matrix: DeviceWeight
    tiles: int
    role: str = ""
    products: int = 0
    """Of a tile and a token, if they are not as many as tiles."""


def tiles_of_block(blocks: int, rows: int, supers: int) -> int:
    """Tiles of a block, if the rows' groups of 8 are dealt to so many."""
    return -(-rows // TILE_ROWS // blocks) * supers


def streaming(gpu: Gpu, fixed: int, *parts: Part) -> Streaming:
    """A fixed part, slots for tiles on their way (as deep as fits), and a float for each row of
    a block's products."""
    fixed += 64 + LINE + sum(4 * TILE_ROWS * (p.products or p.tiles) for p in parts)
    shared_left = gpu.shared_most - 1024 - fixed
    used, defines = 0, dict[str, str | int]()
    for i, p in enumerate(parts):
        slot = whole_lines(_LANES * TILE_ROWS * p.matrix.layout.format.block_bytes)
        steps = -(-p.tiles // _LANES)
        room = (shared_left - used) // (len(parts) - i)
        depths = range(min(-(-steps // WARPS), _DEEPEST), 0, -1)
        taken = {depth: min(steps, depth * WARPS) * slot + 8 * depth * WARPS for depth in depths}
        depth = next((depth for depth in depths if taken[depth] <= room), 1)
        defines[f"{p.role}WEIGHT"] = f"Tiled{p.matrix.layout.format.name}"
        defines[f"{p.role}DEPTH"] = depth
        used += taken[depth]
    return Streaming(fixed + used, defines)
