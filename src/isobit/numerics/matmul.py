"""Matrix products with quantised weights (docs/numerics.md, section 4)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32
from isobit.gguf.formats import Format, dequantize
from isobit.numerics.fixed import planes_of, quantise_rows
from isobit.numerics.pointwise import sum256

_ROWS_AT_ONCE = 4096
_256 = np.float32(256)


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor of a model file: its format, shape (rows, columns; experts first) and bytes; of some
    rows of every expert, which lie apart in the file, [experts, bytes]."""

    name: str
    format: Format
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the last axis."""
        return self.shape[-1] // self.format.block_size * self.format.block_bytes

    def rows(self, start: int, stop: int) -> "Weight":
        """Rows start … stop of a matrix, as a view."""
        data = self.data[start * self.row_bytes : stop * self.row_bytes]
        shape = (stop - start, self.shape[-1])
        return Weight(f"{self.name}[{start}:{stop}]", self.format, shape, data)

    def row_order(self, order: NDArray[np.integer]) -> "Weight":
        """Some rows of a matrix in that order, as a copy."""
        data = self.data.reshape(self.shape[0], -1)[order].reshape(-1)
        name = f"{self.name}[{', '.join(map(str, order))}]"
        return Weight(name, self.format, (len(order), self.shape[-1]), data)

    def columns(self, first: int, count: int) -> "Weight":
        """Columns first … first + count - 1 of a matrix, both whole blocks, as a copy."""
        size, width = self.format.block_size, self.format.block_bytes
        blocks = self.data.reshape(self.shape[0], -1, width)
        data = blocks[:, first // size : (first + count) // size].reshape(-1)
        name = f"{self.name}[:, {first}:{first + count}]"
        return Weight(name, self.format, (self.shape[0], count), data)

    def expert(self, index: int) -> "Weight":
        """Matrix number ``index`` of a stack [experts, rows, columns], as a view."""
        data = self.data.reshape(self.shape[0], -1)[index]
        return Weight(f"{self.name}[{index}]", self.format, self.shape[1:], data)

    def as_row(self) -> "Weight":
        """A vector as a matrix of one row."""
        return Weight(self.name, self.format, (1, *self.shape), self.data)

    def float32(self) -> F32:
        """All values, dequantised."""
        return dequantize(self.format, self.data, self.shape)


@dataclass(frozen=True)
class IntegerWeight:
    """Blocks of a matrix of N rows and B blocks a row, block index first.

    ``codes`` float64 [B, N, block]: sub-scale times code (integers; float64 holds every sum of
    their products with 8-bit planes exactly, so BLAS may add them in any order). ``mins`` float64
    [B, N, groups] or None; ``d`` and ``dmin`` float32 [B, N].
    """

    codes: NDArray[np.float64]
    mins: NDArray[np.float64] | None
    d: F32
    dmin: F32 | None

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        arrays = (self.codes, self.mins, self.d, self.dmin)
        return sum(a.nbytes for a in arrays if a is not None)

    @classmethod
    def of(cls, w: Weight) -> "IntegerWeight":
        """Unpack a weight matrix."""
        rows, columns = w.shape
        u = w.format.unpack(w.data.reshape(-1, w.format.block_bytes))
        blocks = columns // u.codes.shape[1]
        groups = u.scales.shape[1]
        scaled = u.codes.reshape(rows * blocks, groups, -1) * u.scales[:, :, None]

        def by_block(a: NDArray[np.generic]) -> NDArray[np.generic]:
            return a.reshape(rows, blocks, *a.shape[1:]).swapaxes(0, 1)

        return cls(
            codes=by_block(scaled.reshape(rows * blocks, -1)).astype(np.float64),
            mins=None if u.mins is None else by_block(u.mins).astype(np.float64),
            d=np.ascontiguousarray(by_block(u.d)),
            dmin=None if u.dmin is None else np.ascontiguousarray(by_block(u.dmin)),
        )


def matmul(
    w: Weight, x: F32, planes: int, unpack: Callable[[Weight], IntegerWeight] = IntegerWeight.of
) -> F32:
    """``x @ w.T``: x float32 [T, K], w [N, K] in any format; returns float32 [T, N].

    Float weights multiply x as it is; quantised ones x in fixed point with ``planes`` bytes.
    ``unpack`` lets a caller keep unpacked weights between calls.
    """
    if w.shape[0] > _ROWS_AT_ONCE:
        starts = range(0, w.shape[0], _ROWS_AT_ONCE)
        parts = [w.rows(i, min(i + _ROWS_AT_ONCE, w.shape[0])) for i in starts]
        return np.concatenate([matmul(part, x, planes, unpack) for part in parts], axis=1)
    if not w.format.quantized:
        values = w.float32()
        y = [sum256(values * row) for row in x]
        return np.array(y, np.float32).reshape(len(x), w.shape[0])
    return _integer_matmul(unpack(w), *quantise_rows(x, planes), planes)


def _integer_matmul(w: IntegerWeight, q: NDArray[np.int32], dx: F32, planes: int) -> F32:
    blocks, rows, size = w.codes.shape
    tokens = q.shape[0]
    per_superblock = 256 // size
    y = np.zeros((rows, tokens), np.float32)
    for s in range(dx.shape[1]):
        t = np.zeros((rows, tokens), np.float32)
        for b in range(s * per_superblock, min((s + 1) * per_superblock, blocks)):
            qb = q[:, b * size : (b + 1) * size]
            sums = [w.codes[b] @ p.T.astype(np.float64) for p in planes_of(qb, planes)]
            total = sums[0].astype(np.float32)
            if planes == 2:
                total = total * _256 + sums[1].astype(np.float32)
            u = w.d[b][:, None] * total
            if w.mins is not None and w.dmin is not None:
                groups = w.mins.shape[2]
                group_sums = qb.reshape(tokens, groups, size // groups).sum(axis=2)
                m = (w.mins[b] @ group_sums.T.astype(np.float64)).astype(np.float32)
                u = u - w.dmin[b][:, None] * m
            t = t + u
        y = y + dx[:, s] * t
    return np.ascontiguousarray(y.T)
