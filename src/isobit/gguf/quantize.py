"""Float32 weights into the formats of GGUF, with the rounding of the ``gguf`` package bit for bit.

Owns the rounding; ``gguf.formats`` owns the layouts. What only ``llama-quantize`` writes (K-quants)
is not here.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from isobit.gguf.formats import BF16, F16, F32, Q4_0, Q8_0, Format

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_CHUNK = 1 << 13  # blocks of 32 at a time: what they need stays in the cache


def quantize(fmt: Format, values: Floats) -> Bytes:
    """The bytes of ``values`` (float32, whole blocks in a row): uint8, 1-D.

    ``fmt`` is F32, F16, BF16, Q8_0 or Q4_0.
    """
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if fmt is F32:
        return flat.view(np.uint8)
    if fmt is F16:
        with np.errstate(over="ignore"):  # infinity
            return flat.astype("<f2").view(np.uint8)
    if fmt is BF16:
        return _bf16(flat).view(np.uint8)
    blocks = flat.reshape(-1, fmt.block_size)
    out = np.empty((len(blocks), fmt.block_bytes), np.uint8)
    for i in range(0, len(blocks), _CHUNK):
        QUANTIZERS[fmt](blocks[i : i + _CHUNK], out[i : i + _CHUNK])
    return out.reshape(-1)


def _bf16(flat: Floats) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; a NaN stays one, quiet."""
    n = flat.view(np.uint32)
    nan = (n & 0x7FFFFFFF) > 0x7F800000
    rounded = (n.astype(np.uint64) + (0x7FFF + (n >> 16 & 1))) >> 16
    return np.where(nan, n >> 16 | 64, rounded).astype(np.uint16)


def _inverse(d: Floats) -> Floats:
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(d == 0, np.float32(0), 1 / d).astype(np.float32)


def _q8_0(blocks: Floats, out: Bytes) -> None:
    """d = max|x| / 127; codes round half away from zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        x = blocks * _inverse(d)
        size = np.abs(x)
        whole = np.floor(size)
        codes = np.copysign(whole + np.floor(2 * (size - whole)), x)
        out[:, :2] = d.astype("<f2").view(np.uint8)
        out[:, 2:] = codes.astype(np.int8).view(np.uint8)


def _q4_0(blocks: Floats, out: Bytes) -> None:
    """d = x / -8, x the value of largest magnitude, the first of equals; codes x / d + 8.5 cut."""
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(blocks).argmax(axis=1, keepdims=True)
        d = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
        shifted = np.trunc(blocks * _inverse(d) + np.float32(8.5))
        codes = shifted.astype(np.uint8).clip(0, 15)
        out[:, :2] = d.astype("<f2").view(np.uint8)
        out[:, 2:] = codes[:, :16] | codes[:, 16:] << 4


QUANTIZERS: dict[Format, Callable[[Floats, Bytes], None]] = {Q8_0: _q8_0, Q4_0: _q4_0}
