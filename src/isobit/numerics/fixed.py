"""Fixed point: one scale and integers for a block of values (docs/numerics.md, section 3)."""

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32

LIMIT = {1: 127, 2: 32639}
"""Largest integer magnitude for each number of 8-bit planes; 32639 = 127*256 + 127."""

_SCALE = {
    1: np.uint32(0x3C010204).view(np.float32),
    2: np.uint32(0x38008183).view(np.float32),
}
_SMALLEST = np.float32(2.0**-96)
_INFINITY = np.uint32(0x7F800000)


def quantise(x: F32, planes: int) -> tuple[NDArray[np.int32], F32]:
    """Quantise each block (the last axis of x) to integers of ``planes`` signed bytes.

    Returns (q int32, same shape as x; d float32, without the last axis), x ≈ d * q.
    """
    limit = np.float32(LIMIT[planes])
    amax_bits = (x.view(np.uint32) & np.uint32(0x7FFFFFFF)).max(axis=-1)
    amax = amax_bits.view(np.float32)
    finite = amax_bits < _INFINITY
    used = finite & (amax >= _SMALLEST)
    reciprocal = limit / np.where(used, amax, np.float32(1))
    q = np.rint(np.where(used[..., None], x, np.float32(0)) * reciprocal[..., None])
    d = np.where(used, np.where(used, amax, np.float32(0)) * _SCALE[planes], np.float32(0))
    return q.astype(np.int32), np.where(finite, d, np.float32(np.nan))


def quantise_rows(x: F32, planes: int) -> tuple[NDArray[np.int32], F32]:
    """Quantise rows x [T, K] in blocks of 256: (q int32 [T, K], d float32 [T, ceil(K / 256)])."""
    q = np.empty(x.shape, np.int32)
    d = np.empty((x.shape[0], -(-x.shape[1] // 256)), np.float32)
    for s in range(d.shape[1]):
        block = slice(256 * s, 256 * (s + 1))
        q[:, block], d[:, s] = quantise(np.ascontiguousarray(x[:, block]), planes)
    return q, d


def planes_of(q: NDArray[np.int32], planes: int) -> list[NDArray[np.int32]]:
    """Split integers into their signed bytes, highest first: [q] or [hi, lo], q = 256*hi + lo."""
    if planes == 1:
        return [q]
    lo = ((q + 128) & 255) - 128
    return [(q - lo) >> 8, lo]
