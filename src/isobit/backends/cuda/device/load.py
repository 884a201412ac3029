"""Weights onto the GPU: where each tensor lies there, and the parts in which it is brought."""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isobit.backends.cpu._cpu import Loading
from isobit.backends.cuda.device.layout import TILE_ROWS, Layout
from isobit.backends.cuda.device.memory import SLOT_BYTES, STAGING_SLOTS, Region
from isobit.errors import BackendUnavailable
from isobit.numerics import Weight

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class DeviceWeight:
    """A matrix, or a stack of them, in a region of the GPU's memory."""

    region: Region
    offset: int
    layout: Layout
    matrices: int
    rows: int
    columns: int

    @classmethod
    def of(cls, weight: Weight, region: Region) -> "DeviceWeight":
        """Its place, next in the region. Raises BackendUnavailable for a format without kernels."""
        *stack, rows, columns = weight.shape
        layout = Layout.of(weight)
        return cls(region, region.take(nbytes(weight)), layout, prod(stack), rows, columns)

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.region.address + self.offset

    def followed_by(self, other: "DeviceWeight") -> bool:
        """Whether ``other`` is a stack of equal matrices that begins where this one ends."""
        end = self.offset + self.matrices * self.matrix_bytes
        return self == replace(other, offset=self.offset) and end == other.offset

    def joined(self, other: "DeviceWeight") -> "DeviceWeight | None":
        """Both as one taller matrix, if they lie so."""
        alike = other == replace(self, offset=other.offset, rows=other.rows)
        if self.layout.kind != "tiled" or not alike:
            return None
        if self.offset + self.matrix_bytes != other.offset:
            return None
        return replace(self, rows=self.rows + other.rows)

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one matrix of the stack."""
        return self.layout.format.nbytes(self.rows * self.columns)


def nbytes(weight: Weight) -> int:
    """Bytes of a tensor."""
    return weight.format.nbytes(prod(weight.shape))


class Part(NamedTuple):
    """Bytes of a tensor on their way to the device: at most a staging buffer's."""

    rows: Bytes
    """[R, n]; the rows may lie apart, and get there one behind the other."""
    to: int
    """Their address."""
    supers: int = 0
    """Superblocks of a row, if the bytes are repacked to tiles on the way."""
    super_bytes: int = 0


def vector_parts(weight: Weight, address: int) -> Iterator[Part]:
    """Of a vector, as float32."""
    data = weight.float32().reshape(-1).view(np.uint8)
    return (Part(rows, address + start) for start, rows in _pieces(data, SLOT_BYTES))


def matrix_parts(weight: Weight, to: DeviceWeight) -> Iterator[Part]:
    """Of a matrix or a stack."""
    if to.layout.kind != "tiled":
        return (Part(r, to.address + start) for start, r in _pieces(weight.data, SLOT_BYTES))
    group = TILE_ROWS * weight.row_bytes
    most = max(SLOT_BYTES // group, 1) * group
    if most > SLOT_BYTES:
        raise BackendUnavailable(
            f"cuda: {weight.name}: 8 rows take {group} bytes, expected at most {SLOT_BYTES}"
        )
    tiles = weight.shape[-1] // 256, weight.format.nbytes(256)
    return (Part(r, to.address + start, *tiles) for start, r in _pieces(weight.data, most))


def _pieces(data: Bytes, most: int) -> Iterator[tuple[int, Bytes]]:
    """A tensor's bytes in pieces of at most so many, and where each begins; whole experts, if their
    rows lie apart in the file."""
    experts = np.atleast_2d(data)
    each = experts.shape[1]
    together = max(most // each, 1)
    for first in range(0, len(experts), together):
        for start in range(0, each, most):
            yield first * each + start, experts[first : first + together, start : start + most]


_FUNCTIONS = (
    *("cuCtxSetCurrent", "cuMemHostAlloc", "cuMemFreeHost", "cuMemAlloc_v2", "cuMemFree_v2"),
    *("cuEventCreate", "cuEventRecord", "cuEventSynchronize", "cuEventDestroy_v2"),
    *("cuMemcpyHtoDAsync_v2", "cuLaunchKernel"),
)
"""What threads ask of the driver, in the order of loading.cpp."""


def begin(context: int, stream: int, repack: int, parts: Sequence[Part]) -> Loading:
    """Begin to bring parts to their places; ``repack``: the kernel of repack.cu."""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    functions = [ctypes.cast(driver[name], ctypes.c_void_p).value or 0 for name in _FUNCTIONS]
    return Loading(functions, context, stream, repack, STAGING_SLOTS, SLOT_BYTES, parts)


def fuse_adjacent(weights: Sequence[DeviceWeight]) -> list[DeviceWeight]:
    """Matrices of the same input, as few as they can be multiplied as, in the same order."""
    out: list[DeviceWeight] = []
    for w in weights:
        joined = out[-1].joined(w) if out else None
        if joined is None:
            out.append(w)
        else:
            out[-1] = joined
    return out
