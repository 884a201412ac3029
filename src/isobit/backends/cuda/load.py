"""Weights onto the GPU: each tensor through staging buffers to its place and layout."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32
from isobit.backends.cuda import memory
from isobit.backends.cuda.gpu import Gpu
from isobit.backends.cuda.layout import TILE_ROWS, Layout
from isobit.errors import BackendUnavailable
from isobit.model.weights import Layer, Weights
from isobit.numerics import Weight


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


class Loader:
    """Places tensors one after another in one allocation of the planned size.

    While the device copies one part of a tensor, threads bring the next from the file.
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
        self._threads = min(os.cpu_count() or 1, 8)
        self._pool = ThreadPoolExecutor(self._threads)
        self._done: dict[str, DeviceWeight] = {}

    def finish(self) -> None:
        """Free the staging buffers once all is queued."""
        self._pool.shutdown()
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
        self._gpu.upload(address, values)
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
                self._gpu.upload(stored.address, weight.data)
            self._done[weight.name] = stored
        return self._done[weight.name]

    def _repack(self, weight: Weight, address: int) -> None:
        group = TILE_ROWS * weight.row_bytes
        room = self._slots[0].host.size
        part = max(room // group, 1) * group
        if part > room:
            raise BackendUnavailable(
                f"cuda: {weight.name}: 8 rows take {group} bytes, expected at most {room}"
            )
        supers = weight.shape[-1] // 256
        tile = TILE_ROWS * weight.format.block_bytes
        for start in range(0, weight.data.nbytes, part):
            slot, data = self._staged(weight.data[start : start + part])
            tiles = data.nbytes // tile
            self._gpu.upload(slot.device, data)
            slot.copied = self._gpu.mark()
            self._gpu.launch(
                "repack",
                "repack",
                (min(tiles, 1 << 16),),
                (slot.device, tiles, supers, weight.format.block_bytes, address + start),
            )

    def _staged(self, data: NDArray[np.uint8]) -> tuple[_Slot, NDArray[np.uint8]]:
        """Bytes of the file in the next slot that the device has read."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        if slot.copied is not None:
            self._gpu.wait(slot.copied)
        host = slot.host[: data.size]
        share = -(-data.size // self._threads)
        parts = [slice(i, i + share) for i in range(0, data.size, share)]
        list(self._pool.map(lambda p: np.copyto(host[p], data[p]), parts))
        return slot, host

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


def load_layers(loader: Loader, weights: Weights) -> Sequence[DeviceLayer]:
    """All layers in order."""
    return [loader.layer(layer) for layer in weights.layers]
