"""Weights onto the device: each tensor in the layout of its kernel, divided by the limit."""

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from isobit.backends.base import F32
from isobit.backends.wgpu.device import Device
from isobit.backends.wgpu.layout import Stack, joined, readable
from isobit.errors import BackendUnavailable
from isobit.gguf.formats import Format
from isobit.model.weights import Weights
from isobit.numerics import Weight

_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Part:
    """Units ``first`` … ``last - 1`` of a stack (see layout.Stack) in one buffer."""

    buffer: Any
    first: int
    last: int


@dataclass(frozen=True)
class Segment:
    """Joined matrices of one format, and where their rows stand in the output."""

    format: Format
    matrices: int
    rows: int
    units: int
    column: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class DeviceMatrix:
    """Matrices joined along their rows (a stack of them, with experts) in the device's memory."""

    rows: int
    columns: int
    segments: tuple[Segment, ...]

    @property
    def floats(self) -> bool:
        """Whether some of it multiplies activations that are not quantised."""
        return any(not s.format.quantized for s in self.segments)


@dataclass(frozen=True)
class DeviceLayer:
    """One layer's tensors; norms are offsets into the vectors. See isobit.model.weights.Layer."""

    attn_norm: int
    qkv: DeviceMatrix
    q_norm: int
    k_norm: int
    attn_output: DeviceMatrix
    ffn_norm: int
    router: DeviceMatrix | None
    gate_up: DeviceMatrix
    down: DeviceMatrix


class DeviceWeights:
    """All tensors of a model but the embedding, whose rows the host decodes."""

    def __init__(self, device: Device, weights: Weights) -> None:
        self._device = device
        self._vectors: list[F32] = []
        self.layers = [
            DeviceLayer(
                attn_norm=self._vector(layer.attn_norm),
                qkv=self.matrix(layer.q, layer.k, layer.v),
                q_norm=self._vector(layer.q_norm),
                k_norm=self._vector(layer.k_norm),
                attn_output=self.matrix(layer.attn_output),
                ffn_norm=self._vector(layer.ffn_norm),
                router=None if layer.router is None else self.matrix(layer.router),
                gate_up=self.matrix(layer.gate, layer.up),
                down=self.matrix(layer.down),
            )
            for layer in weights.layers
        ]
        self.output_norm = self._vector(weights.output_norm)
        self.output = self.matrix(weights.output)
        self.vectors = device.upload(np.concatenate(self._vectors))

    def matrix(self, *weights: Weight) -> DeviceMatrix:
        """Load matrices that share their input, joined along their rows."""
        return load_matrix(self._device, weights)

    def _vector(self, values: F32) -> int:
        at = sum(map(len, self._vectors))
        self._vectors.append(values)
        return at


def load_matrix(device: Device, weights: Sequence[Weight]) -> DeviceMatrix:
    """Load matrices (or stacks of them) that share their input, joined along their rows."""
    for w in weights:
        if not readable(w.format):
            raise BackendUnavailable(
                f"wgpu: {w.name}: expected a format with shaders, got {w.format.name}; "
                "the cpu backend reads it"
            )
    segments = []
    column = 0
    with ThreadPoolExecutor() as threads:  # NumPy copies without holding the interpreter
        for stack in joined(weights):
            segments.append(_segment(device, threads, stack, column))
            column += stack.rows
    return DeviceMatrix(column, weights[0].shape[-1], tuple(segments))


def _segment(device: Device, threads: Executor, stack: Stack, column: int) -> Segment:
    total = stack.matrices * stack.units
    in_one = device.binding_bytes // stack.unit_bytes
    if in_one == 0:
        raise BackendUnavailable(
            f"wgpu: {stack.weights[0].name}: one row of {stack.columns} values takes "
            f"{stack.unit_bytes:,} bytes, more than the device's maxStorageBufferBindingSize of "
            f"{device.binding_bytes:,}"
        )
    parts = []
    for first in range(0, total, in_one):
        last = min(first + in_one, total)
        parts.append(Part(_upload(device, threads, stack, first, last), first, last))
    return Segment(stack.format, stack.matrices, stack.rows, stack.units, column, tuple(parts))


def _upload(device: Device, threads: Executor, stack: Stack, first: int, last: int) -> Any:
    """Units first … last - 1 of a stack in a buffer of their own."""
    buffer = device.empty(-(-(last - first) * stack.unit_bytes // 16) * 16)
    step = -(-_PIECE_BYTES // stack.unit_bytes // 8) * 8  # eight units are whole words
    starts = range(first, last, step)
    pieces = threads.map(lambda at: stack.packed(at, min(at + step, last)), starts)
    for at, piece in zip(starts, pieces, strict=True):
        device.write(buffer, piece, (at - first) * stack.unit_bytes)
        device.flush()
    return buffer
