"""What is wanted of logits, made where they lie (docs/numerics.md, section 11); how fast a device
reads."""

import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np

from isobit.backends.base import I32
from isobit.backends.base.row_results import DIGEST, MAX_WORDS, RowRequest
from isobit.backends.wgpu.device.gpu import Device, OutOfDeviceMemory, Step
from isobit.numerics.digest import PIECE

_PIECE = PIECE // 4  # words that a leaf of the tree of digests has
_PIECES = 64  # of a workgroup of digest.wgsl
_BANDWIDTH_BYTES, _BANDWIDTH_SECONDS = 1 << 30, 1.0


def read_bandwidth(device: Device) -> float | None:
    """Bytes a second that a device reads from its memory: the best of up to six times four passes.

    None where no buffer may be, or too little memory is free for one, that is far beyond a cache.
    """
    memory, groups, passes = device.memory(), 4096, 4
    nbytes = min(device.binding_bytes, _BANDWIDTH_BYTES)
    if memory is not None:
        nbytes = min(nbytes, memory.free // 2)
    if nbytes < _BANDWIDTH_BYTES // 4:
        return None
    buffer: Any = None
    try:
        with device.guarded():
            buffer = device.empty(nbytes // 16 * 16)
            out = device.empty(16)
            kernel = device.kernel(("scalar", "bandwidth"), "bandwidth")
            step = Step(kernel, (buffer, out), (nbytes // 16, 256 * groups), (groups,))
            return passes * nbytes / _best(device, [step] * passes, out)
    except OutOfDeviceMemory:
        return None
    finally:
        device.forget()
        if buffer is not None:
            buffer.destroy()


def _best(device: Device, steps: list[Step], out: Any) -> float:
    """Seconds for some steps: the least of up to six times."""
    begun, best = time.perf_counter(), float("inf")
    for _ in range(6):  # the first compiles
        device.read(out, np.int32)
        start = time.perf_counter()
        if start > begun + _BANDWIDTH_SECONDS:
            break
        device.run(steps)
        device.read(out, np.int32)
        best = min(best, time.perf_counter() - start)
    return best


class DeviceSampler:
    """Buffers for so many rows of logits at once."""

    def __init__(self, device: Device, rows: int, vocabulary: int) -> None:
        self._device, self._vocabulary = device, vocabulary
        pieces = -(-vocabulary // _PIECE)
        self._levels = [
            device.empty(4 * DIGEST * rows * n) for n in (pieces, -(-DIGEST * pieces // _PIECE))
        ]
        """Of the tree of digests, in turn."""
        self._ids = device.empty(4 * rows * MAX_WORDS)
        self.found = device.empty(4 * rows * MAX_WORDS)
        """A row after the other."""

    def give(self, ids: I32) -> None:
        """The ids of the rows that come next."""
        if ids.size:
            self._device.write(self._ids, ids)

    def steps(self, logits: Any, rows: int, asked: RowRequest) -> Iterator[Step]:
        """Measure rows of logits in a buffer."""
        kernel = self._device.kernel(("scalar", "reduce", "sampling/logprobs"), "measure")
        parameters = self._vocabulary, asked.given, asked.top, asked.words
        yield Step(kernel, (logits, self._ids, self.found), parameters, (rows,))
        if asked.digest:
            yield from self._digests(logits, rows, asked)

    def _digests(self, of: Any, rows: int, asked: RowRequest) -> Iterator[Step]:
        """Level by level, of ever fewer words of a row, into the last words of what is found."""
        kernel = self._device.kernel(("scalar", "sampling/digest"), "digest")
        words, levels = self._vocabulary, cycle(self._levels)
        while (pieces := -(-words // _PIECE)) > 1:
            to, groups = next(levels), (-(-pieces // _PIECES), rows)
            yield Step(kernel, (of, to), (words, words, 0, DIGEST * pieces), groups)
            of, words = to, DIGEST * pieces
        parameters = words, words, asked.words - DIGEST, asked.words
        yield Step(kernel, (of, self.found), parameters, (1, rows))
