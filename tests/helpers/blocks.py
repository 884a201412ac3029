"""Where the float scales of a quantised block lie, and how a wanted value is written there."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

HALVES: dict[str, tuple[int, ...]] = {
    **{"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82)},
    **{"Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)},
    **{"IQ4_XS": (0,), "Q1_0": (0,), "Q2_0": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "IQ1_S": (0,)},
    **{"IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,)},
}
"""Byte positions of the binary16 fields: d, then dmin (m of Q4_1 and Q5_1)."""
FIELDS = {*HALVES, "MXFP4", "NVFP4", "IQ1_M"}
"""The formats that are known here."""


UNIT = {"Q1_0": 1.0, "Q2_0": 1.25**0.5}
"""The standard deviation of random codes, of formats that the ``gguf`` package cannot decode."""


def _teach_the_package_q2_0() -> None:
    """Q2_0 is younger than gguf 0.19, which shall write it nevertheless."""
    member = int.__new__(Type, 42)
    member._name_, member._value_ = "Q2_0", 42
    Type._member_map_["Q2_0"] = Type._value2member_map_[42] = member
    Type._member_names_.append("Q2_0")
    gguf.GGML_QUANT_SIZES[member] = (64, 2 + 16)


if not hasattr(Type, "Q2_0"):
    _teach_the_package_q2_0()


def set_d(fmt: str, blocks: Bytes, d: float | NDArray[np.floating]) -> None:
    """Write d of each block [n, block_bytes], as near as the format has it."""
    values = np.broadcast_to(np.asarray(d, np.float64), len(blocks))
    if fmt == "MXFP4":  # d = 2^(e - 128)
        with np.errstate(divide="ignore"):
            e = np.rint(np.log2(np.abs(values))) + 128
        blocks[:, 0] = np.clip(e, 0, 254)
    elif fmt == "NVFP4":  # four, each half of an E4M3 number without a sign
        e, m = np.divmod(np.arange(127), 8)
        known = np.where(e == 0, m / 1024, (1 + m / 8) * 2.0 ** (e - 8))
        blocks[:, :4] = np.abs(known - np.abs(values)[:, None]).argmin(axis=1)[:, None]
    elif fmt == "IQ1_M":  # a nibble at the end of each of the four 16-bit fields
        bits = np.clip(values, -65504, 65504).astype("<f2").view("<u2")
        nibbles = bits[:, None] >> np.arange(0, 16, 4) & 15
        blocks[:, 49:57:2] = blocks[:, 49:57:2] & 15 | nibbles << 4
    else:
        _set_half(blocks, HALVES[fmt][0], values)


def set_dmin(fmt: str, blocks: Bytes, dmin: float | NDArray[np.floating]) -> None:
    """Write the other float of each block, where the format has one."""
    for at in HALVES.get(fmt, ())[1:]:
        _set_half(blocks, at, np.broadcast_to(np.asarray(dmin, np.float64), len(blocks)))


def _set_half(blocks: Bytes, at: int, values: NDArray[np.float64]) -> None:
    halves = np.clip(values, -65504, 65504).astype("<f2")
    blocks[:, at : at + 2] = halves[:, None].view(np.uint8)
