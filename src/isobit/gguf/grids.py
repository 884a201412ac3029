"""The formats IQ1 to IQ3: blocks whose codes are rows of a grid, looked up by index.

A function for each takes blocks apart, as in :mod:`isobit.gguf.blocks`. Layouts after ggml's
``ggml-common.h`` (block_iq1_s … block_iq3_s); the grids stand in ``grids.h``.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isobit.gguf.blocks import Bytes, Unpacked, half, spread

Codes = NDArray[np.int16]
_GRID = re.compile(r"^GRID\((\w+), (\d), \(([-\d, ]+)\),([^)]+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Grid:
    """A table of codes: what the fields of its rows stand for, and the rows, a word each."""

    width: int
    """Codes of a row."""
    values: tuple[int, ...]
    rows: NDArray[np.uint16]
    """Fields of 2 bits, or of 4 for eight values, the lowest first."""


@cache
def packed_grids() -> dict[str, Grid]:
    """The grids by name, as they stand in ``grids.h``."""
    text = Path(__file__).with_name("grids.h").read_text(encoding="ascii")
    found = {}
    for name, width, values, rows in _GRID.findall(text):
        words = np.array([int(row, 16) for row in rows.split(",")], np.uint16)
        found[name] = Grid(int(width), tuple(map(int, values.split(","))), words)
    return found


@cache
def grids() -> dict[str, Codes]:
    """The rows of each grid, int16 [rows, 8 or 4]."""
    found = {}
    for name, grid in packed_grids().items():
        fields = spread(grid.rows.view(np.uint8)[None], 16 // grid.width, 1)
        found[name] = np.array(grid.values, np.int16)[fields.reshape(-1, grid.width)]
    return found


def _signed(grid: str, rows: NDArray[np.integer], signs: Bytes) -> Codes:
    """Rows [n, k] of a grid, as [n, 256]; bit i of ``signs`` [n, 32] negates value i."""
    codes: Codes = grids()[grid][rows].reshape(len(rows), 256)
    sign = np.int16(1) - 2 * np.unpackbits(signs, axis=1, bitorder="little").astype(np.int16)
    return codes * sign


def _eighth_sign(seven: NDArray[np.integer]) -> Bytes:
    """Seven sign bits and the eighth that makes their number even."""
    sevens: Bytes = seven.astype(np.uint8)
    odd = np.bitwise_xor.reduce(np.unpackbits(sevens[..., None], axis=-1), axis=-1)
    eights: Bytes = sevens | odd << np.uint8(7)
    return eights


def _odd(scales: NDArray[np.integer]) -> NDArray[np.int32]:
    return 2 * scales.astype(np.int32) + 1


def _grid_block(
    codes: Codes, scales: NDArray[np.integer], d: NDArray[np.float32], parts: int
) -> Unpacked:
    """value = (d / parts) * (2 * scale + 1) * code; the division is exact."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        d = d / np.float32(parts)
    return Unpacked(codes, _odd(scales), None, d, None)


def _signs_and_scales(words: Bytes) -> tuple[Bytes, NDArray[np.integer]]:
    """Of each word [n, 8 * 4 bytes]: four times seven sign bits, and the scale above them."""
    w = np.ascontiguousarray(words).view("<u4")
    seven = w[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    return _eighth_sign(seven.reshape(len(w), 32)), w >> 28


def _iq2_xxs(b: Bytes) -> Unpacked:
    d, rest = np.split(b, [2], axis=1)
    pairs = rest.reshape(-1, 8, 8)  # of each 32 values the four rows, then signs and scale
    signs, scales = _signs_and_scales(pairs[:, :, 4:].reshape(-1, 32))
    codes = _signed("IQ2_XXS", pairs[:, :, :4].reshape(-1, 32), signs)
    return _grid_block(codes, scales, half(d), 8)


def _iq2_xs(b: Bytes) -> Unpacked:
    d, qs, scales = np.split(b, [2, 66], axis=1)
    q = np.ascontiguousarray(qs).view("<u2")
    codes = _signed("IQ2_XS", q & 511, _eighth_sign(q >> 9))
    return _grid_block(codes, spread(scales, 4, 1), half(d), 8)


def _iq2_s(b: Bytes) -> Unpacked:
    d, qs, signs, high, scales = np.split(b, [2, 34, 66, 74], axis=1)
    codes = _signed("IQ2_S", qs | spread(high, 2, 1) << 8, signs)
    return _grid_block(codes, spread(scales, 4, 1), half(d), 8)


def _iq3_xxs(b: Bytes) -> Unpacked:
    d, qs, words = np.split(b, [2, 66], axis=1)
    signs, scales = _signs_and_scales(words)
    return _grid_block(_signed("IQ3_XXS", qs, signs), scales, half(d), 4)


def _iq3_s(b: Bytes) -> Unpacked:
    d, qs, high, signs, scales = np.split(b, [2, 66, 74, 106], axis=1)
    codes = _signed("IQ3_S", qs | spread(high, 1, 1) << 8, signs)
    return _grid_block(codes, spread(scales, 4, 1), half(d), 1)


def _shifted(rows: NDArray[np.integer], down: NDArray[np.integer]) -> Codes:
    """Rows [n, 32] of IQ1's grid, each code one more, or one less where ``down`` [n, 32] is set."""
    delta = np.int16(1) - 2 * down.astype(np.int16)
    codes: Codes = grids()["IQ1"][rows] + delta[:, :, None]
    return codes.reshape(len(rows), 256)


def _iq1_s(b: Bytes) -> Unpacked:
    d, qs, high = np.split(b, [2, 34], axis=1)
    h = np.ascontiguousarray(high).view("<u2").astype(np.int32)
    rows = qs | (h[:, :, None] >> np.arange(0, 12, 3) & 7).reshape(-1, 32) << 8
    codes = _shifted(rows, np.repeat(h >> 15, 4, axis=1))
    return _grid_block(codes, h >> 12 & 7, half(d), 8)


def _iq1_m(b: Bytes) -> Unpacked:
    qs, high, scales = np.split(b, [32, 48], axis=1)
    h = spread(high, 4, 1)
    s = np.ascontiguousarray(scales).view("<u2").astype(np.uint16)
    bits = (s >> 12 << np.arange(0, 16, 4, dtype=np.uint16)).sum(axis=1, dtype=np.uint16)
    d = half(bits[:, None].view(np.uint8))
    codes = _shifted(qs | (h & 7) << 8, h >> 3)
    return _grid_block(codes, (s[:, :, None] >> np.arange(0, 12, 3) & 7).reshape(-1, 16), d, 8)


GRID_UNPACKERS = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
