"""An emulated GPU: the CUDA kernels compiled as C++ and run thread by thread on the CPU.

It checks a kernel's logic and bits without a device. It says nothing about speed, nor about what
the device's own instructions do.
"""

import contextlib
import ctypes
import hashlib
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir

import numpy as np

from isobit.backends.cuda.device.compile import INCLUDE, SOURCES, signatures
from isobit.backends.cuda.device.layout import TILE_ROWS
from isobit.backends.cuda.device.load import Part

HERE = Path(__file__).parent
_FLAGS = [
    "-O2",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-w",
    "-fno-strict-aliasing",
]


_FOLDER = Path(gettempdir()) / "isobit-emulator"


def _compile(out: Path, *arguments: str, source: str = "") -> None:
    """Run the compiler unless its output is there; other processes may be at the same."""
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(f".{np.random.default_rng().integers(1 << 40)}{out.suffix}")
    command = ["g++", *_FLAGS, *arguments, "-o", str(part)]
    subprocess.run(command, input=source.encode(), check=True)
    part.replace(out)


@cache
def _header() -> Path:
    """A folder with cuda_emulator.h precompiled; reading it takes as long as most kernels."""
    text = str(_FLAGS).encode() + (HERE / "cuda_emulator.h").read_bytes()
    out = _FOLDER / hashlib.sha256(text).hexdigest()[:24] / "cuda_emulator.h.gch"
    _compile(out, "-x", "c++-header", str(HERE / "cuda_emulator.h"))
    return out.parent


@cache
def _library(
    stem: str, defines: tuple[tuple[str, str], ...], copy: int | None = None
) -> ctypes.CDLL:
    """copy: a library with a state of its own, for kernels that run beside one another."""
    kernels = signatures(stem)
    stubs = "".join(
        f'extern "C" void emu_{k}(void** a, const unsigned* g, unsigned t, size_t s, int c, '
        f"unsigned r) {{ emu::start({k}, a, g, t, s, c, r); }}\n"
        for k in kernels
    )
    source = '#include "cuda_emulator.h"\n'
    source += "".join(f"#define {name} {value}\n" for name, value in defines)
    source += f'#include "{stem}.cu"\n' + stubs
    files = [HERE / "cuda_emulator.h", *(f for d in INCLUDE for f in sorted(d.glob("*.*h")))]
    digest = hashlib.sha256(f"{_FLAGS}{source}".encode() + (SOURCES / f"{stem}.cu").read_bytes())
    for file in files:
        digest.update(file.read_bytes())
    out = _FOLDER / f"{Path(stem).name}-{digest.hexdigest()[:24]}.so"
    include = [f"-I{d}" for d in (_header(), HERE, SOURCES, *INCLUDE)]
    _compile(out, *include, "-x", "c++", "-", source=source)
    if copy is None:
        return ctypes.CDLL(str(out))
    with NamedTemporaryFile(dir=_FOLDER, suffix=".so") as file:  # one that was read may go
        file.write(out.read_bytes())
        file.flush()
        return ctypes.CDLL(file.name)


class EmulatedGpu:
    """The Gpu protocol on the CPU. Memory ends at a guard page, so a stray access crashes."""

    name = "emulated GPU"
    multiprocessors = 4
    shared_most = 227 << 10
    cache_bytes = 50 << 20
    may_wait = True
    alone = True

    def __init__(self, seed: int = 1, *, bulk: bool = False) -> None:
        """bulk: with Hopper's bulk copies, else with Ampere's."""
        self._defines = {"BULK_COPIES": ""} if bulk else {}
        self.warpgroups = bulk
        self._copy: int | None = None
        self._rng = np.random.default_rng(seed)
        memory = _library("ops/add", ())
        memory.emu_alloc.restype = ctypes.c_void_p
        memory.emu_alloc.argtypes = [ctypes.c_size_t]
        memory.emu_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._allocate, self._free = memory.emu_alloc, memory.emu_free
        self._held: dict[int, int] = {}
        self._fetching: list[tuple[np.ndarray, bytes]] = []
        self._page_locked: dict[int, np.ndarray] = {}
        self._uploading: list[tuple[np.ndarray, bytes]] = []
        self._marks: deque[tuple[list[tuple[np.ndarray, bytes]], ...]] = deque()
        self._runs = True

    def activate(self) -> None:
        pass

    def reach(self, others: list) -> None:
        pass

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        self._runs = False
        try:
            yield
        finally:
            self._runs = True

    def compile(self, queue: Callable[[], None], step: Callable[[int, int], None]) -> int:  # noqa: ARG002
        with self.rehearsal():
            queue()
        return 0

    def memory(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def allocate(self, nbytes: int) -> int:
        address = int(self._allocate(max(nbytes, 1)))
        self._held[address] = max(nbytes, 1)
        ctypes.memset(address, 0xA5, min(nbytes, 1 << 20))  # what nobody wrote is not zero
        return address

    def free(self, address: int) -> None:
        self._free(address, self._held.pop(address))

    def upload(self, address: int, values: np.ndarray) -> None:
        """What lies in page-locked memory is read at any time until a later mark is waited for."""
        values = np.ascontiguousarray(values)
        ctypes.memmove(address, values.ctypes.data, values.nbytes)
        if values.ctypes.data in self._page_locked:
            self._uploading.append((values, values.tobytes()))

    def bring(self, parts: Sequence[Part]) -> Callable[[], None]:
        """When it is waited for, as late as can be."""

        def wait() -> None:
            for rows, to, supers, super_bytes in parts:
                data = np.ascontiguousarray(rows).reshape(-1)
                if not supers:
                    self.upload(to, data)
                    continue
                staged, tiles = self.allocate(data.size), data.size // (TILE_ROWS * super_bytes)
                self.upload(staged, data)
                arguments = (staged, tiles, supers, super_bytes, to)
                self.launch("device/repack", "repack", (tiles,), arguments)
                self.free(staged)

        return wait

    def page_locked(self, nbytes: int) -> np.ndarray:
        memory = np.empty(nbytes, np.uint8)
        self._page_locked[memory.ctypes.data] = memory
        return memory

    def free_page_locked(self, values: np.ndarray) -> None:
        del self._page_locked[values.ctypes.data]

    def results(self, count: int) -> np.ndarray:
        return np.empty(count, np.float32)

    def mark(self) -> object:
        fetching, self._fetching = self._fetching, []
        uploading, self._uploading = self._uploading, []
        self._marks.append((fetching, uploading))
        return self._marks[-1]

    def wait(self, mark: object) -> None:
        """What was queued before it has been done, and before all earlier marks."""
        while any(one is mark for one in self._marks):
            fetching, uploading = self._marks.popleft()
            for out, found in fetching:
                ctypes.memmove(out.ctypes.data, found, len(found))
            for values, then in uploading:
                assert values.tobytes() == then, "written again before the device had read it"

    def fetch(self, address: int, out: np.ndarray) -> None:
        """What is there now arrives when a later mark is waited for, not before."""
        self._fetching.append((out, ctypes.string_at(address, out.nbytes)))
        ctypes.memset(out.ctypes.data, 0x5B, out.nbytes)

    def copy(self, source: int, target: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def download(self, address: int, out: np.ndarray) -> None:
        if not self._runs:
            out.fill(0)
            return
        ctypes.memmove(out.ctypes.data, address, out.nbytes)

    def launch(
        self,
        stem: str,
        kernel: str,
        grid: Sequence[int],
        arguments: Sequence[int | float],
        *,
        shared: int = 0,
        defines: Mapping[str, str] | None = None,
        cooperative: bool = False,
        overlap: bool = False,  # noqa: ARG002  # blocks run one after another here
    ) -> None:
        signature = signatures(stem)[kernel]
        assert shared <= self.shared_most, f"{kernel}: {shared} bytes of shared memory"
        if not self._runs:
            return
        all_defines = tuple(sorted((dict(defines or {}) | self._defines).items()))
        function = getattr(_library(stem, all_defines, self._copy), f"emu_{kernel}")
        values = [t(a) for t, a in zip(signature.parameters, arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        size = (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid)))
        seed = int(self._rng.integers(1 << 31))
        function(
            pointers,
            size,
            ctypes.c_uint32(signature.threads(defines or {})),
            ctypes.c_size_t(shared),
            ctypes.c_int(prod(grid) if cooperative else self._together(defines or {})),
            ctypes.c_uint32(seed),
        )

    def _together(self, defines: Mapping[str, str]) -> int:
        """Blocks of a cluster, which Hopper's copies come with."""
        return int(defines.get("CLUSTER", "1")) if self._defines else 1

    def capture(self, queue):
        return queue

    def replay(self, graph) -> None:
        if self._runs:
            graph()

    def close(self) -> None:
        while self._held:
            self.free(next(iter(self._held)))

    def __del__(self) -> None:
        self.close()
