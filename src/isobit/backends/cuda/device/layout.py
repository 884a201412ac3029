"""How a weight matrix lies in the GPU's memory.

Three kinds. ``floats`` (F32, F16, BF16) and ``blocks`` (every quantised format) are the file's
bytes. ``tiled`` is for matrices of Q4_K and Q6_K, the formats of nearly all Q4_K_M weights, and of
IQ4_NL, IQ4_XS and MXFP4, whose rows come in eights and hold whole superblocks: the file's bytes in
another order, not one more.

A tile is 8 rows by one superblock (256 values), and tiles of the same 8 rows follow one another.
Inside, chunk c (16 bytes) of row r stands at byte ``128 * c + 16 * r``; what a superblock has
beyond whole chunks (the d of Q6_K, 2 bytes) ends the tile, row by row:

    Q4_K  1,152 bytes   chunk 0: d, dmin, scales; chunks 1-8: codes
    Q6_K  1,680 bytes   chunks 0-7: low nibbles; 8-11: top bit pairs; 12: scales; then 8 d
    IQ4_NL          1,152 bytes   chunks 0-8: the eight blocks, as in the file
    IQ4_XS, MXFP4   1,088 bytes   chunks 0-7: as in the file; then the last 8 bytes of each row

So eight lanes, one a row, read whole 128-byte lines, and a lane's superblock needs no shuffles
(decode). A line is also, word for word, what the 32 lanes of a warp hold as the 8-column operand of
the int8 product m16n8k32: lane 4r + i gets word i of row r (prefill).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.gguf.formats import Format
from isobit.numerics import Weight

TILE_ROWS = 8
LINE = 128
"""Bytes of shared memory that bulk copies begin with: see copy.cuh."""
ACT_BYTES = 656
COLUMN_ACT_BYTES = 560
"""One superblock of quantised activations: ``ActivationBlock`` of common.cuh."""


def whole_lines(count: int) -> int:
    """So many bytes, and what is missing of the last line."""
    return -(-count // LINE) * LINE


_FUSED = ("Q4_K", "Q6_K")
_TILED = (*_FUSED, "IQ4_NL", "IQ4_XS", "MXFP4")


@dataclass(frozen=True)
class Layout:
    """How one tensor is stored: its kind, and the definitions its kernels are compiled with."""

    kind: str
    format: Format

    @classmethod
    def of(cls, weight: Weight) -> "Layout":
        """The layout for a matrix, or a stack of them."""
        if not weight.format.quantized:
            return cls("floats", weight.format)
        rows, columns = weight.shape[-2:]
        if weight.format.name in _TILED and rows % TILE_ROWS == 0 and columns % 256 == 0:
            return cls("tiled", weight.format)
        return cls("blocks", weight.format)

    @property
    def fused(self) -> bool:
        """Whether the tensor-core products and the fused kernels of decoding read it."""
        return self.kind == "tiled" and self.format.name in _FUSED

    @property
    def matmul(self) -> tuple[str, str, dict[str, str]]:
        """File, kernel and definitions of the product with such a matrix."""
        name = self.format.name
        if self.kind == "tiled":
            return "ops/matmul", "matmul_tiled", {"WEIGHT": f"Tiled{name}"}
        if self.kind == "blocks":
            return "ops/matmul_blocks", "matmul_blocks", {"WEIGHT": name}
        return "ops/matmul_floats", "matmul_floats", {"WEIGHT": f"KIND_{name}"}

    @property
    def embedding_defines(self) -> dict[str, str]:
        """Definitions for embedding.cu."""
        prefix = "KIND_" if self.kind == "floats" else ""
        return {self.kind.upper(): "1", "WEIGHT": prefix + self.format.name}


def repack(data: NDArray[np.uint8], supers: int, super_bytes: int) -> NDArray[np.uint8]:
    """The tiled order of a quantised matrix; what repack.cu does, for its test.

    data: uint8, rows in order, ``supers`` superblocks a row, a multiple of 8 rows.
    """
    blocks = data.reshape(-1, TILE_ROWS, supers, super_bytes).swapaxes(1, 2)
    chunked = super_bytes // 16 * 16
    chunks = blocks[..., :chunked].reshape(*blocks.shape[:3], -1, 16).swapaxes(2, 3)
    head, tail = (a.reshape(*blocks.shape[:2], -1) for a in (chunks, blocks[..., chunked:]))
    return np.concatenate([head, tail], axis=-1).reshape(-1)
