"""The weight formats of GGUF: how many bytes a block takes, and what integers lie in it.

Owns the block layouts. ``Format.unpack`` splits blocks into the integers that the exact dot
products work on; ``dequantize`` turns the same integers into float32 with the rounding order of
ggml, so that its results are those of the ``gguf`` package bit for bit.

A quantised block holds ``block_size`` values in natural order, in ``groups`` runs of equal length:

    value[k] = d * scale[g] * code[k] - dmin * min[g]        g = k // (block_size // groups)

Layouts after ggml's ``ggml-common.h`` (block_q4_0 ... block_q6_K).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from isobit.errors import UsageError

Bytes = NDArray[np.uint8]

_CHUNK = 4096  # blocks decoded at a time; bounds the memory for their integers


@dataclass(frozen=True)
class Unpacked:
    """The integers and float scales of ``n`` blocks; codes are signed, the zero point applied.

    Ranges, by format: Q8_0 codes -128..127; Q4_0 -8..7; Q4_1 0..15; Q5_0 -16..15; Q5_1 0..31;
    Q2_K codes 0..3, scales and mins 0..15; Q3_K -4..3, scales -32..31; Q4_K 0..15 and Q5_K 0..31,
    scales and mins 0..63; Q6_K -32..31, scales -128..127. Elsewhere scales (and mins) are 1.
    """

    codes: NDArray[np.int16]  # [n, block_size]
    scales: NDArray[np.int32]  # [n, groups]
    mins: NDArray[np.int32] | None  # [n, groups]; None where the format has no minimum
    d: NDArray[np.float32]  # [n]
    dmin: NDArray[np.float32] | None  # [n]; the negated ``m`` for Q4_1 and Q5_1


@dataclass(frozen=True)
class Format:
    """One tensor type of GGUF: its name and id in ggml, and its block layout."""

    name: str
    ggml_type: int
    block_size: int  # values per block
    block_bytes: int
    groups: int = 1  # sub-blocks with a scale of their own
    unpacker: Callable[[Bytes], Unpacked] | None = None  # None for F32, F16, BF16

    @property
    def quantized(self) -> bool:
        """Whether values are integer codes with scales, rather than plain floats."""
        return self.unpacker is not None

    def nbytes(self, n_values: int) -> int:
        """Bytes that ``n_values`` values take; ``n_values`` must fill whole blocks."""
        return n_values // self.block_size * self.block_bytes

    def unpack(self, blocks: Bytes) -> Unpacked:
        """Split ``blocks`` (uint8 [n, block_bytes]) of a quantised format into its integers."""
        if self.unpacker is None:
            raise UsageError(f"unpack: expected a quantised format, got {self.name}")
        if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != self.block_bytes:
            raise UsageError(
                f"unpack {self.name}: expected uint8 [n, {self.block_bytes}], "
                f"got {blocks.dtype} {list(blocks.shape)}"
            )
        return self.unpacker(blocks)


def dequantize(fmt: Format, data: Bytes, shape: Sequence[int]) -> NDArray[np.float32]:
    """Decode a tensor's bytes (uint8, 1-D) to a new float32 array of ``shape`` (slowest first).

    Rounds as ggml does: ``(d * scale) * code - dmin * min``, every operation to float32. Bits equal
    those of ``gguf.quants.dequantize``; where that gives NaN so does this, perhaps another NaN.
    """
    n_values = prod(shape)
    if n_values % fmt.block_size or data.size != fmt.nbytes(n_values):
        raise UsageError(
            f"dequantize {fmt.name}: expected {n_values / fmt.block_size:g} blocks of "
            f"{fmt.block_bytes} bytes for shape {list(shape)}, got {data.size} bytes"
        )
    with np.errstate(all="ignore"):  # hostile scales may be inf or NaN; the bits are still defined
        if fmt.unpacker is None:
            return _decode_floats(fmt, data).reshape(shape)
        blocks = data.reshape(-1, fmt.block_bytes)
        out = np.empty((len(blocks), fmt.groups, fmt.block_size // fmt.groups), np.float32)
        for i in range(0, len(blocks), _CHUNK):
            u = fmt.unpacker(blocks[i : i + _CHUNK])
            part = out[i : i + _CHUNK]
            scale = u.d[:, None] * u.scales.astype(np.float32)
            np.multiply(scale[:, :, None], u.codes.reshape(part.shape), out=part, dtype=np.float32)
            if u.mins is not None and u.dmin is not None:
                part -= (u.dmin[:, None] * u.mins.astype(np.float32))[:, :, None]
    return out.reshape(shape)


def _decode_floats(fmt: Format, data: Bytes) -> NDArray[np.float32]:
    data = np.ascontiguousarray(data)
    if fmt is BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view("<f4" if fmt is F32 else "<f2").astype(np.float32)


# Below, each ``_q…`` names a block's fields in the order in which they lie in the file.


def _half(field: Bytes) -> NDArray[np.float32]:
    """float16 stored in ``field`` [n, 2], as float32 [n]."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return np.ascontiguousarray(field).view("<f2").astype(np.float32)[:, 0]


def _spread(packed: Bytes, bits: int, run: int) -> NDArray[np.int16]:
    """Unpack ``bits``-wide fields: of each ``run`` bytes first all the lowest, then the next."""
    n, width = packed.shape
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = packed.reshape(n, width // run, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return fields.reshape(n, width * 8 // bits).astype(np.int16)


def _plain(codes: NDArray[np.int16], d: Bytes, m: Bytes | None = None) -> Unpacked:
    """A block without sub-scales: value = d * code, or d * code + m."""
    ones = np.ones((len(codes), 1), np.int32)
    if m is None:
        return Unpacked(codes, ones, None, _half(d), None)
    return Unpacked(codes, ones, ones, _half(d), -_half(m))


def _q4_0(b: Bytes) -> Unpacked:
    d, qs = np.split(b, [2], axis=1)
    return _plain(_spread(qs, 4, 16) - np.int16(8), d)


def _q4_1(b: Bytes) -> Unpacked:
    d, m, qs = np.split(b, [2, 4], axis=1)
    return _plain(_spread(qs, 4, 16), d, m)


def _fifth_bit(qh: Bytes) -> NDArray[np.int16]:
    """Bit k of the four bytes ``qh``, as the value 16, for k = 0..31."""
    return np.unpackbits(qh, axis=1, bitorder="little").astype(np.int16) << 4


def _q5_0(b: Bytes) -> Unpacked:
    d, qh, qs = np.split(b, [2, 6], axis=1)
    return _plain((_spread(qs, 4, 16) | _fifth_bit(qh)) - np.int16(16), d)


def _q5_1(b: Bytes) -> Unpacked:
    d, m, qh, qs = np.split(b, [2, 4, 8], axis=1)
    return _plain(_spread(qs, 4, 16) | _fifth_bit(qh), d, m)


def _q8_0(b: Bytes) -> Unpacked:
    d, qs = np.split(b, [2], axis=1)
    return _plain(qs.view(np.int8).astype(np.int16), d)


def _q2_k(b: Bytes) -> Unpacked:
    scales, qs, d, dmin = np.split(b, [16, 80, 82], axis=1)
    sc, mins = (scales & 15).astype(np.int32), (scales >> 4).astype(np.int32)
    return Unpacked(_spread(qs, 2, 32), sc, mins, _half(d), _half(dmin))


def _q3_k(b: Bytes) -> Unpacked:
    hmask, qs, scales, d = np.split(b, [32, 96, 108], axis=1)
    sc = _spread(scales[:, :8], 4, 8) | _spread(scales[:, 8:], 2, 4) << 4
    codes = _spread(qs, 2, 32) | _spread(hmask, 1, 32) << 2
    return Unpacked(codes - np.int16(4), sc.astype(np.int32) - 32, None, _half(d), None)


def _six_bit_scales(packed: Bytes) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Eight 6-bit scales and eight 6-bit mins from the 12 bytes of Q4_K and Q5_K.

    The first four of each are the low 6 bits of bytes 0..3 and 4..7, whose top 2 bits are the top
    bits of the last four; bytes 8..11 hold the low nibbles of those, scale low and min high.
    """
    s, m, low = np.split(packed, [4, 8], axis=1)
    scales = np.concatenate([s & 63, low & 15 | s >> 2 & 48], axis=1)
    mins = np.concatenate([m & 63, low >> 4 | m >> 2 & 48], axis=1)
    return scales.astype(np.int32), mins.astype(np.int32)


def _q4_k(b: Bytes) -> Unpacked:
    d, dmin, scales, qs = np.split(b, [2, 4, 16], axis=1)
    return Unpacked(_spread(qs, 4, 32), *_six_bit_scales(scales), _half(d), _half(dmin))


def _q5_k(b: Bytes) -> Unpacked:
    d, dmin, scales, qh, qs = np.split(b, [2, 4, 16, 48], axis=1)
    codes = _spread(qs, 4, 32) | _spread(qh, 1, 32) << 4
    return Unpacked(codes, *_six_bit_scales(scales), _half(d), _half(dmin))


def _q6_k(b: Bytes) -> Unpacked:
    ql, qh, scales, d = np.split(b, [128, 192, 208], axis=1)
    codes = (_spread(ql, 4, 64) | _spread(qh, 2, 32) << 4) - np.int16(32)
    return Unpacked(codes, scales.view(np.int8).astype(np.int32), None, _half(d), None)


F32 = Format("F32", 0, 1, 4)
F16 = Format("F16", 1, 1, 2)
BF16 = Format("BF16", 30, 1, 2)
Q8_0 = Format("Q8_0", 8, 32, 34, 1, _q8_0)
Q4_0 = Format("Q4_0", 2, 32, 18, 1, _q4_0)
Q4_1 = Format("Q4_1", 3, 32, 20, 1, _q4_1)
Q5_0 = Format("Q5_0", 6, 32, 22, 1, _q5_0)
Q5_1 = Format("Q5_1", 7, 32, 24, 1, _q5_1)
Q2_K = Format("Q2_K", 10, 256, 84, 16, _q2_k)
Q3_K = Format("Q3_K", 11, 256, 110, 16, _q3_k)
Q4_K = Format("Q4_K", 12, 256, 144, 8, _q4_k)
Q5_K = Format("Q5_K", 13, 256, 176, 8, _q5_k)
Q6_K = Format("Q6_K", 14, 256, 210, 16, _q6_k)

FORMATS: dict[int, Format] = {  # by ggml type id
    f.ggml_type: f
    for f in (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
}

# fmt: off
UNSUPPORTED_NAMES: dict[int, str] = {  # types of ggml that isobit refuses, to name them in errors
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}
# fmt: on


def type_name(ggml_type: int) -> str:
    """ggml's name of a tensor type, supported or not; ``"type 99"`` for an id it never had."""
    if ggml_type in FORMATS:
        return FORMATS[ggml_type].name
    return UNSUPPORTED_NAMES.get(ggml_type, f"type {ggml_type}")
