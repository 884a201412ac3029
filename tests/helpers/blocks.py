"""Where the float scales of a quantised block lie, and how a wanted value is written there."""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

HALVES: dict[str, tuple[int, ...]] = {
    **{"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82)},
    **{"Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)},
    **{"IQ4_XS": (0,)},
}
"""Byte positions of the binary16 fields: d, then dmin (m of Q4_1 and Q5_1)."""
FIELDS = {*HALVES, "MXFP4"}
"""The formats that are known here."""


def set_d(fmt: str, blocks: Bytes, d: float | NDArray[np.floating]) -> None:
    """Write d of each block [n, block_bytes], as near as the format has it."""
    values = np.broadcast_to(np.asarray(d, np.float64), len(blocks))
    if fmt == "MXFP4":  # d = 2^(e - 128)
        with np.errstate(divide="ignore"):
            e = np.rint(np.log2(np.abs(values))) + 128
        blocks[:, 0] = np.clip(e, 0, 254)
    else:
        _set_half(blocks, HALVES[fmt][0], values)


def set_dmin(fmt: str, blocks: Bytes, dmin: float | NDArray[np.floating]) -> None:
    """Write the other float of each block, where the format has one."""
    for at in HALVES.get(fmt, ())[1:]:
        _set_half(blocks, at, np.broadcast_to(np.asarray(dmin, np.float64), len(blocks)))


def _set_half(blocks: Bytes, at: int, values: NDArray[np.float64]) -> None:
    halves = np.clip(values, -65504, 65504).astype("<f2")
    blocks[:, at : at + 2] = halves[:, None].view(np.uint8)
