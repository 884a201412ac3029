"""From .cu files to kernels: compiled by NVRTC, kept on disk, each parameter's C type known.

A compiled file (cubin) is kept under the user's cache directory, named by everything it depends on:
the sources, the compiler with its version and options, the architecture. It is written beside its
place and then renamed, so that processes may compile the same file at once; one that is not whole
is compiled again.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import isobit.gguf
import isobit.numerics
from isobit import machine
from isobit.errors import BackendUnavailable

SOURCES = Path(__file__).parent.parent
"""Where the .cu files lie, each compiled on its own."""

INCLUDE = (
    SOURCES / "kernels",
    SOURCES / "sampling",
    SOURCES / "fusions" / "decode",
    Path(isobit.numerics.__file__).parent,
    Path(isobit.gguf.__file__).parent,
)
"""Where their headers lie."""

_KERNEL = re.compile(r"^KERNEL\((\w+)\)\s+(\w+)\(([^)]*)\)", re.MULTILINE)
_SCALARS: dict[str, type[ctypes._SimpleCData]] = {  # type: ignore[type-arg]
    "int": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "float": ctypes.c_float,
}


@dataclass(frozen=True)
class Signature:
    """What a launch must know of a kernel; a pointer parameter is a 64-bit integer."""

    block: str
    """Threads of a block: a number, THREADS, or a name that the definitions give."""
    parameters: tuple[type[ctypes._SimpleCData], ...]  # type: ignore[type-arg]

    def threads(self, defines: Mapping[str, str]) -> int:
        """Threads of a block."""
        return int({"THREADS": "256", **defines}.get(self.block, self.block))


@cache
def signatures(stem: str) -> dict[str, Signature]:
    """The kernels of a file by name, as their declarations say."""
    source = (SOURCES / f"{stem}.cu").read_text()
    kernels = {}
    for block, name, parameters in _KERNEL.findall(source):
        words = [p.strip().rsplit(maxsplit=1)[0] for p in parameters.split(",")]
        types = tuple(ctypes.c_uint64 if "*" in w else _SCALARS[w] for w in words)
        kernels[name] = Signature(block, types)
    return kernels


Kernel = tuple[str, tuple[tuple[str, str], ...]]
"""A file and its definitions, in order: see :func:`cubin`."""


def compile_all(kernels: Collection[Kernel], arch: str, step: Callable[[int, int], None]) -> int:
    """Have these on disk, compiled by all processors; how many were not there.

    NVRTC's threads wait for one another, so processes do it. What they could not compile or keep
    is compiled when it is asked for, which says why not. ``step``: done, of so many.
    """
    import subprocess  # noqa: PLC0415 - with the next 8 ms that a start does not need
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    missing = [
        each for each in sorted(kernels) if _whole(_place(each[0], arch, dict(each[1]))) is None
    ]
    turns, done = iter(missing), list[Kernel]()

    def work() -> None:
        command = [sys.executable, "-m", __name__, arch]
        pipe = subprocess.PIPE
        with (
            contextlib.suppress(OSError),  # it has ended, or cannot begin
            subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
            ) as process,
        ):
            assert process.stdin
            assert process.stdout
            for kernel in turns:
                process.stdin.write(json.dumps(kernel).encode() + b"\n")
                process.stdin.flush()
                if not process.stdout.readline():
                    return
                done.append(kernel)
                step(len(done), len(missing))

    processes = min(len(missing), machine.cores())
    with ThreadPoolExecutor(max(processes, 1)) as pool:
        for each in [pool.submit(work) for _ in range(processes)]:
            each.result()
    return len(missing)


def _compile_lines(arch: str) -> None:
    """Compile the kernels that standard input names, a line each, and answer each by one."""
    for line in sys.stdin:
        stem, defines = json.loads(line)
        cubin(stem, arch, dict(defines))
        print(flush=True)


def cubin(stem: str, arch: str, defines: Mapping[str, str]) -> bytes:
    """Machine code of ``stem``.cu for ``arch`` ("sm_90"), from the disk if it is there.

    A stem is a file of SOURCES without its ending ("ops/add"), or an absolute path likewise.

    Raises BackendUnavailable when the compiler is missing or refuses the source.
    """
    place = _place(stem, arch, defines)
    code = _whole(place)
    if code is None:
        code = _compile(stem, arch, defines)
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            _write(place, hashlib.sha256(code).digest() + code)
    return code


def _place(stem: str, arch: str, defines: Mapping[str, str]) -> Path:
    """Where it is kept."""
    try:
        from cuda.bindings import nvrtc  # noqa: PLC0415

        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the libraries raise many kinds for "not installed"
        raise BackendUnavailable(
            f"cuda: NVRTC is needed to compile kernels and could not be loaded ({error}); "
            "pip install '.[cuda]'"
        ) from None
    key = _key(stem, arch, defines, f"{major}.{minor}")
    return _cache_directory() / f"{Path(stem).name}-{key}.cubin"


def _options(stem: str, arch: str, defines: Mapping[str, str]) -> list[str]:
    """What the compiler is asked for, besides where headers lie."""
    # Warpgroups and what is sent to a whole cluster are for Hopper's own variant (PTX ISA).
    own = "CLUSTER" in defines or stem.endswith("wgmma")
    return [
        f"-arch={arch + 'a' if arch == 'sm_90' and own else arch}",
        "--ftz=false",
        "--prec-sqrt=true",
        "--prec-div=true",
        "--fmad=false",
        *(f"--define-macro={name}={value}" for name, value in sorted(defines.items())),
        "--std=c++17",
    ]


def _compile(stem: str, arch: str, defines: Mapping[str, str]) -> bytes:
    from cuda.bindings import nvrtc  # noqa: PLC0415

    def asked(result: Any, *values: Any) -> Any:
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BackendUnavailable(f"cuda: compiling {stem}.cu for {arch} failed: {result.name}")
        return values[0] if values else None

    source = (SOURCES / f"{stem}.cu").read_bytes()
    options = [*_options(stem, arch, defines), *(f"--include-path={folder}" for folder in INCLUDE)]
    program = asked(*nvrtc.nvrtcCreateProgram(source, f"{stem}.cu".encode(), 0, [], []))
    try:
        done = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if done[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(asked(*nvrtc.nvrtcGetProgramLogSize(program)))
            asked(*nvrtc.nvrtcGetProgramLog(program, log))
            errors = [line for line in log.decode().splitlines() if "error" in line]
            raise BackendUnavailable(
                f"cuda: compiling {stem}.cu for {arch} failed: {errors[0] if errors else done[0]}"
            )
        code = bytes(asked(*nvrtc.nvrtcGetCUBINSize(program)))
        asked(*nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _key(stem: str, arch: str, defines: Mapping[str, str], compiler: str) -> str:
    """What a compiled file depends on: sources, options and the compiler."""
    digest = hashlib.sha256(repr((compiler, _headers(), _options(stem, arch, defines))).encode())
    digest.update((SOURCES / f"{stem}.cu").read_bytes())
    return digest.hexdigest()[:32]


@cache
def _headers() -> str:
    """The digest of all headers: those of a process's first kernel are those of its last."""
    digest = hashlib.sha256()
    for path in (f for d in INCLUDE for f in sorted(d.glob("*.*h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _whole(place: Path) -> bytes | None:
    """A compiled file's code, if it is there and whole: its SHA-256 stands before it."""
    try:
        kept = place.read_bytes()
    except OSError:
        return None
    digest, code = kept[:32], kept[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "isobit" / "cuda"


def _write(place: Path, kept: bytes) -> None:
    import tempfile  # noqa: PLC0415

    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
        file.write(kept)
    Path(file.name).replace(place)


if __name__ == "__main__":
    _compile_lines(sys.argv[1])
