"""The weight formats of GGUF: how many bytes a block takes, and what integers lie in it.

``Format.unpack`` splits blocks into the integers that the exact dot products work on;
``dequantize`` turns the same integers into float32 with the rounding order of ggml, so that its
results are those of the ``gguf`` package bit for bit.

A quantised block holds ``block_size`` values in natural order, in ``groups`` runs of equal length:

    value[k] = d * scale[g] * code[k] - dmin * min[g]        g = k // (block_size // groups)

A format stands here with its sizes, in :mod:`isobit.gguf.blocks` or :mod:`isobit.gguf.grids` with
its fields, and in the kernels of the backends that read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from isobit.errors import UsageError
from isobit.gguf.blocks import UNPACKERS, Bytes, Unpacked
from isobit.gguf.grids import GRID_UNPACKERS

_UNPACKERS = UNPACKERS | GRID_UNPACKERS
_CHUNK = 4096  # blocks decoded at a time; bounds the memory for their integers


@dataclass(frozen=True)
class Format:
    """One tensor type of GGUF: its name and id in ggml, and its block layout."""

    name: str
    ggml_type: int
    block_size: int  # values per block
    block_bytes: int
    groups: int = 1  # sub-blocks with a scale of their own
    parts: int = 1  # blocks that unpack() makes of one

    @property
    def quantized(self) -> bool:
        """Whether values are integer codes with scales, rather than plain floats."""
        return self.name in _UNPACKERS

    @property
    def alignment(self) -> int:
        """The power of two at whose multiples every block of a tensor lies."""
        return self.block_bytes & -self.block_bytes

    def nbytes(self, n_values: int) -> int:
        """Bytes that ``n_values`` values take; ``n_values`` must fill whole blocks."""
        return n_values // self.block_size * self.block_bytes

    def unpack(self, blocks: Bytes) -> Unpacked:
        """Split ``blocks`` (uint8 [n, block_bytes]) of a quantised format into its integers."""
        if not self.quantized:
            raise UsageError(f"unpack: expected a quantised format, got {self.name}")
        if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != self.block_bytes:
            raise UsageError(
                f"unpack {self.name}: expected uint8 [n, {self.block_bytes}], "
                f"got {blocks.dtype} {list(blocks.shape)}"
            )
        return _UNPACKERS[self.name](blocks)


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
        if not fmt.quantized:
            return _decode_floats(fmt, data).reshape(shape)
        unpack, blocks, parts = _UNPACKERS[fmt.name], data.reshape(-1, fmt.block_bytes), fmt.parts
        groups = fmt.parts * fmt.groups
        out = np.empty((len(blocks) * parts, fmt.groups, fmt.block_size // groups), np.float32)
        for i in range(0, len(blocks), _CHUNK):
            u = unpack(blocks[i : i + _CHUNK])
            part = out[i * parts : (i + _CHUNK) * parts]
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


F32 = Format("F32", 0, 1, 4)
F16 = Format("F16", 1, 1, 2)
BF16 = Format("BF16", 30, 1, 2)
Q8_0 = Format("Q8_0", 8, 32, 34)
Q4_0 = Format("Q4_0", 2, 32, 18)
Q4_1 = Format("Q4_1", 3, 32, 20)
Q5_0 = Format("Q5_0", 6, 32, 22)
Q5_1 = Format("Q5_1", 7, 32, 24)
Q2_K = Format("Q2_K", 10, 256, 84, 16)
Q3_K = Format("Q3_K", 11, 256, 110, 16)
Q4_K = Format("Q4_K", 12, 256, 144, 8)
Q5_K = Format("Q5_K", 13, 256, 176, 8)
Q6_K = Format("Q6_K", 14, 256, 210, 16)
IQ4_NL = Format("IQ4_NL", 20, 32, 18)
IQ4_XS = Format("IQ4_XS", 23, 256, 136, 8)
MXFP4 = Format("MXFP4", 39, 32, 17)
NVFP4 = Format("NVFP4", 40, 64, 36, parts=4)
Q1_0 = Format("Q1_0", 41, 128, 18)
Q2_0 = Format("Q2_0", 42, 64, 18)
TQ1_0 = Format("TQ1_0", 34, 256, 54)
TQ2_0 = Format("TQ2_0", 35, 256, 66)
IQ1_S = Format("IQ1_S", 19, 256, 50, 8)
IQ1_M = Format("IQ1_M", 29, 256, 56, 16)
IQ2_XXS = Format("IQ2_XXS", 16, 256, 66, 8)
IQ2_XS = Format("IQ2_XS", 17, 256, 74, 16)
IQ2_S = Format("IQ2_S", 22, 256, 82, 16)
IQ3_XXS = Format("IQ3_XXS", 18, 256, 98, 8)
IQ3_S = Format("IQ3_S", 21, 256, 110, 8)

FORMATS: dict[int, Format] = {  # by ggml type id
    f.ggml_type: f
    for f in (
        *(F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K),
        *(IQ4_NL, IQ4_XS, MXFP4, NVFP4, Q1_0, Q2_0, TQ1_0, TQ2_0),
        *(IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S),
    )
}

# fmt: off
UNSUPPORTED_NAMES: dict[int, str] = {  # types of ggml that isobit refuses, to name them in errors
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}
# fmt: on

FILE_TYPES: dict[int, str] = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K"},
    **{11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S"},
    **{17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS"},
    **{23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S"},
    **{29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0"},
    **{38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0"},
}
"""What ``general.file_type`` says a file holds (llama.cpp's ``llama_ftype``): a type, or a mix."""


def type_name(ggml_type: int) -> str:
    """ggml's name of a tensor type, supported or not; ``"type 99"`` for an id it never had."""
    if ggml_type in FORMATS:
        return FORMATS[ggml_type].name
    return UNSUPPORTED_NAMES.get(ggml_type, f"type {ggml_type}")
