"""Weights onto the device: each tensor in the layout of its kernel, divided by the limit."""

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from isobit.backends.wgpu.device.gpu import Device
from isobit.backends.wgpu.device.layout import Stack, joined
from isobit.errors import BackendUnavailable
from isobit.gguf.formats import Format
from isobit.gguf.grids import packed_grids
from isobit.numerics import Weight

_PIECE_BYTES = 16 << 20
GRIDS = {
    **{"IQ1_S": "IQ1", "IQ1_M": "IQ1", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS"},
    **{"IQ2_S": "IQ2_S", "IQ3_XXS": "IQ3_XXS", "IQ3_S": "IQ3_S"},
}
"""The grid of a format that has one."""


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
    row_blocks: int
    column: int
    parts: tuple[Part, ...]
    grid: Any = None
    """A buffer of the rows that its codes are looked up in."""


@dataclass(eq=False)
class Matrix:
    """Matrices (or stacks, with experts) that share their input, joined along their rows."""

    weights: tuple[Weight, ...]
    segments: tuple[Segment, ...] = ()
    """Where they are, once loaded."""

    @property
    def rows(self) -> int:
        """Rows of all."""
        return sum(w.shape[-2] for w in self.weights)

    @property
    def columns(self) -> int:
        """Values of a row."""
        return self.weights[0].shape[-1]

    @property
    def floats(self) -> bool:
        """Whether some of it multiplies activations that are not quantised."""
        return any(not w.format.quantized for w in self.weights)

    @property
    def quantised(self) -> bool:
        """Whether some of it multiplies quantised activations."""
        return any(w.format.quantized for w in self.weights)

    @property
    def nbytes(self) -> int:
        """What it takes on a device."""
        return sum(s.matrices * s.row_blocks * s.row_block_bytes for s in joined(self.weights))

    def load(self, device: Device) -> None:
        """Bring it onto the device."""
        segments = []
        column = 0
        with ThreadPoolExecutor() as threads:  # NumPy copies without holding the interpreter
            for stack in joined(self.weights):
                segments.append(_segment(device, threads, stack, column))
                column += stack.rows
        self.segments = tuple(segments)


def _segment(device: Device, threads: Executor, stack: Stack, column: int) -> Segment:
    total = stack.matrices * stack.row_blocks
    in_one = device.binding_bytes // stack.row_block_bytes
    if in_one == 0:
        raise BackendUnavailable(
            f"wgpu: {stack.weights[0].name}: one row of {stack.columns} values takes "
            f"{stack.row_block_bytes:,} bytes, more than the device's maxStorageBufferBindingSize "
            f"of {device.binding_bytes:,}"
        )
    parts = []
    for first in range(0, total, in_one):
        last = min(first + in_one, total)
        parts.append(Part(_upload(device, threads, stack, first, last), first, last))
    name = GRIDS.get(stack.format.name)
    grid = device.upload(packed_grids()[name].rows) if name else None
    sizes = stack.matrices, stack.rows, stack.row_blocks, column
    return Segment(stack.format, *sizes, tuple(parts), grid)


def _upload(device: Device, threads: Executor, stack: Stack, first: int, last: int) -> Any:
    """Units first … last - 1 of a stack in a buffer of their own."""
    buffer = device.empty(-(-(last - first) * stack.row_block_bytes // 16) * 16)
    step = -(-_PIECE_BYTES // stack.row_block_bytes // 8) * 8  # eight row blocks are whole words
    starts = range(first, last, step)
    pieces = threads.map(lambda at: stack.packed(at, min(at + step, last)), starts)
    for at, piece in zip(starts, pieces, strict=True):
        device.write(buffer, piece, (at - first) * stack.row_block_bytes)
        device.flush()
    return buffer
