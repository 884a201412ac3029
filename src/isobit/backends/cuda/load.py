"""Weights onto the GPU: each tensor through staging buffers to its place and layout."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32
from isobit.backends.cuda import memory
from isobit.backends.cuda.gpu import Gpu
from isobit.backends.cuda.layout import TILE_ROWS, Layout, require_readable
from isobit.errors import BackendUnavailable
from isobit.model.weights import Layer, Weights
from isobit.numerics import Weight

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class DeviceWeight:
    """A matrix, or a stack of them, in the GPU's memory."""

    address: int
    layout: Layout
    matrices: int
    rows: int
    columns: int

    def followed_by(self, other: "DeviceWeight") -> bool:
        """Whether ``other`` is a stack of equal matrices that begins where this one ends."""
        same = (self.layout, self.matrices, self.rows, self.columns)
        return same == (other.layout, other.matrices, other.rows, other.columns) and (
            self.address + self.matrices * self.matrix_bytes == other.address
        )

    def joined(self, other: "DeviceWeight") -> "DeviceWeight | None":
        """Both as one taller matrix, if they lie so."""
        if self.layout.kind != "tiled" or (self.layout, self.columns) != (
            other.layout,
            other.columns,
        ):
            return None
        if self.address + self.matrix_bytes != other.address:
            return None
        return replace(self, rows=self.rows + other.rows)

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one matrix of the stack."""
        return self.layout.format.nbytes(self.rows * self.columns)


@dataclass(frozen=True)
class DeviceLayer:
    """One layer's tensors; vectors are addresses of float32. See isobit.model.weights.Layer."""

    attn_norm: int
    q: DeviceWeight
    k: DeviceWeight
    v: DeviceWeight
    q_norm: int
    k_norm: int
    attn_output: DeviceWeight
    ffn_norm: int
    router: DeviceWeight | None
    gate: DeviceWeight
    up: DeviceWeight
    down: DeviceWeight


@dataclass(frozen=True)
class DeviceModel:
    """What a step of decoding reads, by address."""

    layers: Sequence[DeviceLayer]
    embedding: DeviceWeight
    output: DeviceWeight
    output_norm: int
    caches: Sequence[tuple[int, ...]]
    """Each layer's k, v, dk, dv."""
    rope: tuple[int, int]
    """The tables of cosines and sines."""
    context: int
    """Positions of a sequence."""


class _Slot:
    """A staging buffer on the host, page-locked, and its twin on the device."""

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self.host = gpu.page_locked(nbytes)
        self.device = gpu.allocate(nbytes)
        self.copied: Any = None  # the mark after the copy from host to device


_Use = Callable[[_Slot, Bytes], None]


class Loader:
    """Places tensors one after another in one allocation of the planned size.

    Threads bring parts of the file, each into a staging buffer of its own; the device takes them in
    order, while later ones are on their way. On leaving its context, all is queued.
    """

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self._gpu = gpu
        self._next = gpu.allocate(nbytes)
        self._end = self._next + nbytes
        self._slots = [
            _Slot(gpu, memory.STAGING_BYTES // memory.STAGING_SLOTS)
            for _ in range(memory.STAGING_SLOTS)
        ]
        self._turn = 0
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 8))
        self._coming: deque[tuple[_Slot, Bytes, Future[None], _Use]] = deque()
        self._done: dict[str, DeviceWeight] = {}

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Queue what is still coming and free the staging buffers; after an error, only stop."""
        try:
            while self._coming and kind is None:
                self._take_next()
        finally:  # nobody writes to the buffers any more
            self._pool.shutdown(cancel_futures=True)
        if kind is not None:
            return
        for slot in self._slots:
            if slot.copied is not None:
                self._gpu.wait(slot.copied)
            self._gpu.free(slot.device)
            self._gpu.free_page_locked(slot.host)

    def layer(self, layer: Layer) -> DeviceLayer:
        """Load one layer."""
        return DeviceLayer(
            attn_norm=self.vector(layer.attn_norm),
            q=self.matrix(layer.q),
            k=self.matrix(layer.k),
            v=self.matrix(layer.v),
            q_norm=self.vector(layer.q_norm),
            k_norm=self.vector(layer.k_norm),
            attn_output=self.matrix(layer.attn_output),
            ffn_norm=self.vector(layer.ffn_norm),
            router=None if layer.router is None else self.matrix(layer.router),
            gate=self.matrix(layer.gate),
            up=self.matrix(layer.up),
            down=self.matrix(layer.down),
        )

    def vector(self, values: F32) -> int:
        """Load a float32 vector; its address."""
        address = self._take(values.nbytes)
        self._copy(values.view(np.uint8), address)
        return address

    def matrix(self, weight: Weight) -> DeviceWeight:
        """Load a matrix or a stack, unless it is there already."""
        if weight.name not in self._done:
            *stack, rows, columns = weight.shape
            stored = DeviceWeight(
                self._take(weight.data.nbytes),
                Layout.of(weight),
                int(np.prod(stack, dtype=np.int64)),
                rows,
                columns,
            )
            if stored.layout.kind == "tiled":
                self._repack(weight, stored.address)
            else:
                self._copy(weight.data, stored.address)
            self._done[weight.name] = stored
        return self._done[weight.name]

    def _copy(self, data: Bytes, address: int) -> None:
        def upload(_: _Slot, host: Bytes, to: int) -> None:
            self._gpu.upload(to, host)

        part = self._slots[0].host.size
        for start in range(0, data.size, part):
            self._bring(data[start : start + part], partial(upload, to=address + start))

    def _repack(self, weight: Weight, address: int) -> None:
        group = TILE_ROWS * weight.row_bytes
        room = self._slots[0].host.size
        part = max(room // group, 1) * group
        if part > room:
            raise BackendUnavailable(
                f"cuda: {weight.name}: 8 rows take {group} bytes, expected at most {room}"
            )
        super_bytes = weight.format.nbytes(256)

        def tile(slot: _Slot, host: Bytes, to: int) -> None:
            tiles = host.size // (TILE_ROWS * super_bytes)
            self._gpu.upload(slot.device, host)
            self._gpu.launch(
                "repack",
                "repack",
                (min(tiles, 1 << 16),),
                (slot.device, tiles, weight.shape[-1] // 256, super_bytes, to),
            )

        for start in range(0, weight.data.size, part):
            self._bring(weight.data[start : start + part], partial(tile, to=address + start))

    def _bring(self, data: Bytes, use: _Use) -> None:
        """Have a thread bring bytes of the file; ``use`` queues what the device does with them."""
        if len(self._coming) == len(self._slots) // 2:  # the device works on the other half
            self._take_next()
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        if slot.copied is not None:
            self._gpu.wait(slot.copied)
        host = slot.host[: data.size]
        self._coming.append((slot, host, self._pool.submit(np.copyto, host, data), use))

    def _take_next(self) -> None:
        slot, host, brought, use = self._coming.popleft()
        brought.result()
        use(slot, host)
        slot.copied = self._gpu.mark()

    def _take(self, nbytes: int) -> int:
        address = self._next
        self._next += memory.aligned(nbytes)
        assert self._next <= self._end, "the memory plan is short"
        return address


def tall(weights: Sequence[DeviceWeight]) -> list[DeviceWeight]:
    """Matrices of the same input, as few as they can be multiplied as, in the same order."""
    out: list[DeviceWeight] = []
    for w in weights:
        joined = out[-1].joined(w) if out else None
        if joined is None:
            out.append(w)
        else:
            out[-1] = joined
    return out


def lacks(weights: Weights) -> str | None:
    """What there is no kernel for in a model; None if there are all."""
    try:
        for weight in memory.matrices(weights).values():
            require_readable(weight)
        _ = weights.layers
    except BackendUnavailable as error:
        return str(error)
    return None


def load_layers(loader: Loader, weights: Weights) -> Sequence[DeviceLayer]:
    """All layers in order. Refuses formats without kernels before it loads the first."""
    for weight in memory.matrices(weights).values():
        require_readable(weight)
    return [loader.layer(layer) for layer in weights.layers]
