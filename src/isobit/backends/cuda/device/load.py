"""Weights onto the GPU: each tensor through staging buffers to its place and layout."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit import machine
from isobit.backends.cpu._cpu import Copier
from isobit.backends.cuda.device import memory
from isobit.backends.cuda.device.layout import TILE_ROWS, Layout
from isobit.backends.cuda.device.memory import Region
from isobit.backends.cuda.device.protocol import Gpu
from isobit.errors import BackendUnavailable
from isobit.numerics import Weight

Bytes = NDArray[np.uint8]
_MOST_THREADS = 16


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


class _Slot:
    """A staging buffer on the host, page-locked, and its twin on the device."""

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self.host = gpu.page_locked(nbytes)
        self.device = gpu.allocate(nbytes)
        self.copied: Any = None  # the mark after the copy from host to device


_Use = Callable[[_Slot, Bytes], None]


class Loader:
    """Brings tensors to their places.

    Threads bring parts of the file, each into a staging buffer of its own; the device takes them in
    order, while later ones are on their way. On leaving its context, all is queued.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._slots = [
            _Slot(gpu, memory.STAGING_BYTES // memory.STAGING_SLOTS)
            for _ in range(memory.STAGING_SLOTS)
        ]
        self._turn = 0
        self._copier = Copier(min(machine.cores(), _MOST_THREADS))
        self._coming: deque[tuple[_Slot, Bytes, Bytes, int, _Use]] = deque()
        """Staging buffers, what is copied there, and which copy that is."""

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Queue what is still coming and free the staging buffers; after an error, only stop."""
        try:
            while self._coming and kind is None:
                self._take_next()
        finally:  # nobody writes to the buffers any more
            self._copier.close()
        if kind is not None:
            return
        for slot in self._slots:
            if slot.copied is not None:
                self._gpu.wait(slot.copied)
            self._gpu.free(slot.device)
            self._gpu.free_page_locked(slot.host)

    def vector(self, weight: Weight, address: int) -> None:
        """Load a vector as float32."""
        self._copy(weight.float32().reshape(-1).view(np.uint8), address)

    def matrix(self, weight: Weight, to: DeviceWeight) -> None:
        """Load a matrix or a stack."""
        if to.layout.kind == "tiled":
            self._repack(weight, to.address)
        else:
            self._copy(weight.data, to.address)

    def _copy(self, data: Bytes, address: int) -> None:
        def upload(_: _Slot, host: Bytes, to: int) -> None:
            self._gpu.upload(to, host)

        for start, part in _pieces(data, self._slots[0].host.size):
            self._bring(part, partial(upload, to=address + start))

    def _repack(self, weight: Weight, address: int) -> None:
        group = TILE_ROWS * weight.row_bytes
        staging_bytes = self._slots[0].host.size
        part = max(staging_bytes // group, 1) * group
        if part > staging_bytes:
            raise BackendUnavailable(
                f"cuda: {weight.name}: 8 rows take {group} bytes, expected at most {staging_bytes}"
            )
        super_bytes = weight.format.nbytes(256)

        def tile(slot: _Slot, host: Bytes, to: int) -> None:
            tiles = host.size // (TILE_ROWS * super_bytes)
            self._gpu.upload(slot.device, host)
            self._gpu.launch(
                "device/repack",
                "repack",
                (min(tiles, 1 << 16),),
                (slot.device, tiles, weight.shape[-1] // 256, super_bytes, to),
            )

        for start, piece in _pieces(weight.data, part):
            self._bring(piece, partial(tile, to=address + start))

    def _bring(self, data: Bytes, use: _Use) -> None:
        """Have a thread bring bytes of the file; ``use`` queues what the device does with them."""
        if len(self._coming) == 3 * len(self._slots) // 4:  # the device works on the others
            self._take_next()
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        if slot.copied is not None:
            self._gpu.wait(slot.copied)
        host = slot.host[: data.size]
        self._coming.append((slot, host, data, self._copier.begin(host, data), use))

    def _take_next(self) -> None:
        slot, host, _, brought, use = self._coming.popleft()
        self._copier.wait(brought)
        use(slot, host)
        slot.copied = self._gpu.mark()


def _pieces(data: Bytes, most: int) -> Iterator[tuple[int, Bytes]]:
    """A tensor's bytes in pieces of at most so many, and where each begins; whole experts, if their
    rows lie apart in the file."""
    experts = np.atleast_2d(data)
    each = experts.shape[1]
    together = max(most // each, 1)
    for first in range(0, len(experts), together):
        for start in range(0, each, most):
            yield first * each + start, experts[first : first + together, start : start + most]


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
