"""The integers in a block of each quantised format.

A function for each format takes blocks (uint8 [n, block_bytes]) apart; :mod:`isobit.gguf.formats`
says what they mean. Layouts after ggml's ``ggml-common.h`` (block_q1_0 … block_nvfp4); the formats
whose codes are looked up in grids stand in :mod:`isobit.gguf.grids`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Unpacked:
    """The integers and float scales of ``n`` blocks; codes are signed, the zero point applied.

    NVFP4's blocks have four scales: it unpacks to four times as many blocks of 16 values.

    Ranges, by format: Q8_0 codes -128..127; Q4_0 -8..7; Q4_1 0..15; Q5_0 -16..15; Q5_1 0..31;
    Q2_K codes 0..3, scales and mins 0..15; Q3_K -4..3, scales -32..31; Q4_K 0..15 and Q5_K 0..31,
    scales and mins 0..63; Q6_K -32..31, scales -128..127; IQ4_NL -127..113; IQ4_XS the same,
    scales -32..31; MXFP4 and NVFP4 -12..12; Q1_0 -1 and 1; Q2_0 and TQ2_0 -1..2; TQ1_0 -1..1;
    IQ1 -9..9, scales 1..15; IQ2 -43..43, IQ3_XXS -62..62 and IQ3_S -15..15, scales 1..31.
    Elsewhere scales (and mins) are 1.
    """

    codes: NDArray[np.int16]  # [n, block_size]
    scales: NDArray[np.int32]  # [n, groups]
    mins: NDArray[np.int32] | None  # [n, groups]; None where the format has no minimum
    d: NDArray[np.float32]  # [n]
    dmin: NDArray[np.float32] | None  # [n]; the negated ``m`` for Q4_1 and Q5_1


# Below, each ``_q…`` names a block's fields in the order in which they lie in the file.


def half(field: Bytes) -> NDArray[np.float32]:
    """float16 stored in ``field`` [n, 2], as float32 [n]."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return np.ascontiguousarray(field).view("<f2").astype(np.float32)[:, 0]


def spread(packed: Bytes, bits: int, run: int) -> NDArray[np.int16]:
    """Unpack ``bits``-wide fields: of each ``run`` bytes first all the lowest, then the next."""
    n, width = packed.shape
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = packed.reshape(n, width // run, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return fields.reshape(n, width * 8 // bits).astype(np.int16)


def _plain(codes: NDArray[np.int16], d: Bytes, m: Bytes | None = None) -> Unpacked:
    """A block without sub-scales: value = d * code, or d * code + m."""
    ones = np.ones((len(codes), 1), np.int32)
    if m is None:
        return Unpacked(codes, ones, None, half(d), None)
    return Unpacked(codes, ones, ones, half(d), -half(m))


def _q4_0(b: Bytes) -> Unpacked:
    d, qs = np.split(b, [2], axis=1)
    return _plain(spread(qs, 4, 16) - np.int16(8), d)


def _q4_1(b: Bytes) -> Unpacked:
    d, m, qs = np.split(b, [2, 4], axis=1)
    return _plain(spread(qs, 4, 16), d, m)


def _fifth_bit(qh: Bytes) -> NDArray[np.int16]:
    """Bit k of the four bytes ``qh``, as the value 16, for k = 0..31."""
    return np.unpackbits(qh, axis=1, bitorder="little").astype(np.int16) << 4


def _q5_0(b: Bytes) -> Unpacked:
    d, qh, qs = np.split(b, [2, 6], axis=1)
    return _plain((spread(qs, 4, 16) | _fifth_bit(qh)) - np.int16(16), d)


def _q5_1(b: Bytes) -> Unpacked:
    d, m, qh, qs = np.split(b, [2, 4, 8], axis=1)
    return _plain(spread(qs, 4, 16) | _fifth_bit(qh), d, m)


def _q8_0(b: Bytes) -> Unpacked:
    d, qs = np.split(b, [2], axis=1)
    return _plain(qs.view(np.int8).astype(np.int16), d)


def _q2_k(b: Bytes) -> Unpacked:
    scales, qs, d, dmin = np.split(b, [16, 80, 82], axis=1)
    sc, mins = (scales & 15).astype(np.int32), (scales >> 4).astype(np.int32)
    return Unpacked(spread(qs, 2, 32), sc, mins, half(d), half(dmin))


def _q3_k(b: Bytes) -> Unpacked:
    hmask, qs, scales, d = np.split(b, [32, 96, 108], axis=1)
    sc = spread(scales[:, :8], 4, 8) | spread(scales[:, 8:], 2, 4) << 4
    codes = spread(qs, 2, 32) | spread(hmask, 1, 32) << 2
    return Unpacked(codes - np.int16(4), sc.astype(np.int32) - 32, None, half(d), None)


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
    return Unpacked(spread(qs, 4, 32), *_six_bit_scales(scales), half(d), half(dmin))


def _q5_k(b: Bytes) -> Unpacked:
    d, dmin, scales, qh, qs = np.split(b, [2, 4, 16, 48], axis=1)
    codes = spread(qs, 4, 32) | spread(qh, 1, 32) << 4
    return Unpacked(codes, *_six_bit_scales(scales), half(d), half(dmin))


def _q6_k(b: Bytes) -> Unpacked:
    ql, qh, scales, d = np.split(b, [128, 192, 208], axis=1)
    codes = (spread(ql, 4, 64) | spread(qh, 2, 32) << 4) - np.int16(32)
    return Unpacked(codes, scales.view(np.int8).astype(np.int32), None, half(d), None)


_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16
)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)  # doubled


def _iq4_nl(b: Bytes) -> Unpacked:
    d, qs = np.split(b, [2], axis=1)
    return _plain(_IQ4[spread(qs, 4, 16)], d)


def _iq4_xs(b: Bytes) -> Unpacked:
    d, high, low, qs = np.split(b, [2, 4, 8], axis=1)
    scales = spread(low, 4, 1) | spread(high, 2, 1) << 4
    return Unpacked(_IQ4[spread(qs, 4, 16)], scales.astype(np.int32) - 32, None, half(d), None)


def _mxfp4(b: Bytes) -> Unpacked:
    e, qs = np.split(b, [1], axis=1)
    exponents = e[:, 0].astype(np.uint32)  # d = 2^(e - 128), for e < 2 a subnormal
    bits = np.where(exponents < 2, np.uint32(1 << 21) << exponents, exponents - 1 << 23)
    codes = _FP4[spread(qs, 4, 16)]
    return Unpacked(codes, np.ones((len(b), 1), np.int32), None, bits.view(np.float32), None)


def _nvfp4(b: Bytes) -> Unpacked:
    scales, qs = np.split(b, [4], axis=1)
    codes = _FP4[spread(qs, 4, 8).reshape(-1, 16)]
    return Unpacked(codes, np.ones((len(codes), 1), np.int32), None, _UE4M3[scales].ravel(), None)


def _ue4m3() -> NDArray[np.float32]:
    """Half of what a byte of four exponent and three mantissa bits stands for; the eighth bit is
    not looked at. 0x7F is no number and taken for 0, as ggml takes it."""
    e, m = np.divmod(np.arange(256, dtype=np.int32) & 127, 8)
    powers = np.float32(2) ** (np.maximum(e, 1) - 11).astype(np.float32)
    values: NDArray[np.float32] = np.where(e == 0, m, m + 8).astype(np.float32) * powers
    values[0x7F] = 0
    return values


_UE4M3 = _ue4m3()


def _q1_0(b: Bytes) -> Unpacked:
    d, qs = np.split(b, [2], axis=1)
    return _plain(spread(qs, 1, 1) * np.int16(2) - np.int16(1), d)


def _q2_0(b: Bytes) -> Unpacked:
    d, qs = np.split(b, [2], axis=1)
    return _plain(spread(qs, 2, 1) - np.int16(1), d)


_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)


def _tq1_0(b: Bytes) -> Unpacked:
    """Five codes of three values in a byte, as the digits of 256 * n / 243, highest first."""
    qs, four, d = np.split(b, [48, 52], axis=1)

    def digits(part: Bytes, n: int) -> NDArray[np.int16]:
        left = part[:, None, :] * _POWERS_OF_3[:n, None]  # mod 256
        found = left.astype(np.int16) * 3 >> 8
        return found.reshape(len(part), n * part.shape[1])

    codes = np.concatenate([digits(qs[:, :32], 5), digits(qs[:, 32:], 5), digits(four, 4)], axis=1)
    return _plain(codes - np.int16(1), d)


def _tq2_0(b: Bytes) -> Unpacked:
    qs, d = np.split(b, [64], axis=1)
    return _plain(spread(qs, 2, 32) - np.int16(1), d)


UNPACKERS: dict[str, Callable[[Bytes], Unpacked]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}
