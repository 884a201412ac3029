"""How a weight matrix lies in the device's memory.

Float formats are the file's values. Quantised ones are tiles: 8 rows by one superblock (256
values), the tiles of the same 8 rows one behind another. Inside, chunk c (16 bytes) of row r stands
at byte ``128 * c + 16 * r``; what a superblock has beyond whole chunks (2 bytes for Q6_K, its d; 8
for IQ4_XS and MXFP4) ends the tile, row by row. So eight lanes, one a row, read whole lines of 128
bytes. Rows are filled up with zeros to a multiple of 8, columns to whole superblocks; neither
changes a result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.gguf.formats import Format
from isobit.numerics import Weight

TILE_ROWS = 8


def superblocks(columns: int) -> int:
    """Superblocks of a row."""
    return -(-columns // 256)


def superblock_bytes(fmt: Format) -> int:
    """Bytes of 256 values."""
    return fmt.nbytes(256)


@dataclass(frozen=True)
class Stack:
    """Matrices of one format and width, joined along their rows: q, k and v, or gate and up.

    Each weight is [rows, columns] or, with experts, [matrices, rows, columns]. A row block is never
    divided between buffers: 8 rows of one matrix (quantised), or one row (floats).
    """

    weights: tuple[Weight, ...]

    @property
    def format(self) -> Format:
        """The format of all."""
        return self.weights[0].format

    @property
    def matrices(self) -> int:
        """1, or the number of experts."""
        shape = self.weights[0].shape
        return shape[0] if len(shape) == 3 else 1

    @property
    def rows(self) -> int:
        """Rows of one joined matrix."""
        return sum(w.shape[-2] for w in self.weights)

    @property
    def columns(self) -> int:
        """Values of a row."""
        return self.weights[0].shape[-1]

    @property
    def row_blocks(self) -> int:
        """Row blocks of one joined matrix."""
        return -(-self.rows // TILE_ROWS) if self.format.quantized else self.rows

    @property
    def row_block_bytes(self) -> int:
        """Bytes of one row block."""
        if self.format.quantized:
            return TILE_ROWS * superblocks(self.columns) * superblock_bytes(self.format)
        return self.format.nbytes(self.columns)

    def packed(self, first: int, last: int) -> NDArray[np.uint8]:
        """Units first … last - 1, counted through all matrices, as the device has them."""
        out = np.zeros(-(-(last - first) * self.row_block_bytes // 16) * 16, np.uint8)
        matrix, at = divmod(first, self.row_blocks)
        position = 0
        while first < last:
            n = min(self.row_blocks - at, last - first)
            part = self._row_blocks(matrix, at, at + n)
            out[position : position + part.size] = part
            position += part.size
            first, matrix, at = first + n, matrix + 1, 0
        return out

    def _row_blocks(self, matrix: int, first: int, last: int) -> NDArray[np.uint8]:
        """Row blocks of one matrix."""
        rows = TILE_ROWS if self.format.quantized else 1
        parts = []
        start = 0
        for w in self.weights:
            a, b = max(first * rows - start, 0), min(last * rows - start, w.shape[-2])
            if a < b:
                one = w.expert(matrix) if len(w.shape) == 3 else w
                parts.append(one.rows(a, b).data)
            start += w.shape[-2]
        data = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return tiles(data, self.format, self.columns) if self.format.quantized else data


def tiles(data: NDArray[np.uint8], fmt: Format, columns: int) -> NDArray[np.uint8]:
    """Rows of a quantised format (their bytes, one after another) as tiles: uint8, 1-D."""
    row_bytes, size = fmt.nbytes(columns), superblock_bytes(fmt)
    supers = superblocks(columns)
    rows = data.reshape(-1, row_bytes)
    missing = -len(rows) % TILE_ROWS, supers * size - row_bytes
    if any(missing):
        rows = np.pad(rows, ((0, missing[0]), (0, missing[1])))
    blocks = rows.reshape(-1, TILE_ROWS, supers, size)
    whole = size // 16 * 16
    # Chunks move as complex128, NumPy's type of 16 bytes.
    chunks = np.ascontiguousarray(blocks[..., :whole]).view(np.complex128)
    head = np.ascontiguousarray(chunks.transpose(0, 2, 3, 1)).view(np.uint8)
    if size == whole:
        return head.reshape(-1)
    shape = (len(blocks), supers, -1)
    tail = blocks[..., whole:].swapaxes(1, 2)
    return np.concatenate([head.reshape(shape), tail.reshape(shape)], axis=2).reshape(-1)


def joined(weights: Sequence[Weight]) -> list[Stack]:
    """Neighbours of one format as stacks."""
    stacks: list[list[Weight]] = []
    for w in weights:
        if stacks and stacks[-1][0].format is w.format:
            stacks[-1].append(w)
        else:
            stacks.append([w])
    return [Stack(tuple(s)) for s in stacks]
