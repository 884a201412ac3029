"""The extension module, module.cpp. Arrays are C-contiguous; outputs, last, written in place."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.generic]
_Tap = Callable[[str, int | None, _Array], None]

def simd_levels() -> list[str]: ...
def refused_unit() -> bool:
    """Whether this processor has a matrix unit that the system does not let this process use."""

def formats() -> list[tuple[str, int, int, int]]:
    """Name, ggml type, values and bytes of a block of every quantised format."""

def check_batch(
    tokens: _Array,
    positions: _Array,
    sequence: _Array,
    pages: _Array,
    logit_rows: _Array,
    states: _Array | None,
    limits: tuple[int, int, int, int],
) -> None:
    """Raises UsageError unless a batch is what isobit.backends.base.Batch says, within the limits:
    ids, positions, pages, states (0: the model has none)."""

def name_mapping(data: NDArray[np.uint8], line: str, /) -> None:
    """What the process says in the end if mapped memory can no longer be read."""

def forget_mapping(data: NDArray[np.uint8], /) -> None:
    """It is unmapped soon."""

def exit_on_bus_error() -> None:
    """For a process of our own: say that line and end with the exit code of a refused model."""

class Loading:
    """Parts of a file on their way into a GPU's memory, without Python's lock (loading.cpp)."""

    def __init__(
        self,
        driver: Sequence[int],
        context: int,
        stream: int,
        repack: int,
        threads: int,
        staging: int,
        parts: Sequence[tuple[NDArray[np.uint8], int, int, int]],
        /,
    ) -> None:
        """The addresses of the driver's functions; parts: rows, their address on the device, and
        the superblocks of a row and the bytes of one if they are repacked, else 0."""

    def wait(self, seconds: float, /) -> int | None:
        """0 once all is there, or the driver's first error; None if that takes longer."""

    def stop(self) -> None:
        """What has not begun is not brought any more."""

class TeamSize:
    """How many threads to run with (threads.h); times in nanoseconds."""

    def __init__(self, most: int, /) -> None: ...
    def members(self) -> int: ...
    def ran(self, took: int, busy: int, work: float, /) -> None: ...

class Matrix:
    def __init__(
        self,
        data: NDArray[np.uint8],
        ggml_type: int,
        stack: int,
        rows: int,
        columns: int,
        row_bytes: int,
        /,
    ) -> None: ...

class Engine:
    def __init__(
        self,
        program: dict[str, object],
        simd: str,
        threads: int,
        exchange: tuple[_Array, int, int] | None = None,
    ) -> None: ...
    def copy_state(self, source: int, target: int) -> None: ...
    def fence(self) -> None:
        """For tests, before the first pass: known bytes behind what passes may write …"""

    def lanes(self) -> int:
        """Into how many parts a batch was cut at most (lanes.cpp); 0: none was."""

    def intact(self) -> bool:
        """… and whether they are as they were."""

    def spent(self) -> list[tuple[float, float]]:
        """For benchmarks: seconds that each phase of the program took since this was first asked,
        and those that threads stood at barriers in it, all of them together."""

    def forward(
        self,
        tokens: _Array,
        positions: _Array,
        sequence: _Array,
        pages: _Array,
        logit_rows: _Array,
        states: _Array | None,
        received: _Array | None,
        logits: _Array | None,
        places: _Array | None,
        argmax: _Array,
        finite: _Array,
        ids: _Array | None,
        values: _Array | None,
        top_ids: _Array | None,
        top: _Array | None,
        digests: _Array | None,
        routes: _Array | None,
        hidden: _Array | None,
        only_hidden: bool,
        tap: _Tap | None,
        stages: Sequence[str],
    ) -> int: ...
    def set_rope(self, tables: Sequence[tuple[_Array, _Array]], /) -> None: ...

class Sampler:
    def __init__(self, simd: str, threads: int, /) -> None: ...
    def choose(
        self,
        logits: _Array,
        temperature: _Array,
        top_k: _Array,
        top_p: _Array,
        min_p: _Array,
        seed: _Array,
        index: _Array,
        edit_ends: _Array,
        edit_ids: _Array,
        edit_logits: _Array,
        allowed: _Array | None,
        tokens: _Array,
    ) -> None: ...
    def measure(
        self,
        logits: _Array,
        ids: _Array,
        argmax: _Array,
        values: _Array,
        top_ids: _Array,
        top_values: _Array,
        /,
    ) -> None: ...
    def digest(self, rows: _Array, digests: _Array, /) -> None: ...
