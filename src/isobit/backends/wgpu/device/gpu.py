"""The WebGPU device: finding an adapter, buffers, compiled kernels, recordings of dispatches.

Knows nothing of models. A kernel is an entry point of a ``.wgsl`` file of this backend; the files
it builds on are put in front of it. Its bindings are the opaque zero (0), the dispatch's parameters
(1) and its buffers in order (2, 3, …).
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import Memory, host_memory
from isobit.backends.wgpu.device import vulkan
from isobit.errors import BackendUnavailable

_NO_ADAPTER = (
    "no Vulkan, Metal or Direct3D 12 adapter: install the GPU's driver, or a software one "
    "(apt-get install mesa-vulkan-drivers libvulkan1)"
)

STORAGE_BUFFERS = 8
MAX_GROUPS = 65535
"""Workgroups in one dimension of a dispatch."""

_SOURCES = resources.files("isobit.backends.wgpu")
_PREFERRED = ("DiscreteGPU", "IntegratedGPU", "VirtualGPU", "CPU", "Unknown")
_BINDING = re.compile(r"@binding\((\d+)\) var<storage, (read|read_write)>")
_PARAMETER_BYTES = 64
_PARAMETER_STRIDE = 256  # the largest alignment that a device may ask for
_PARAMETER_SLOTS = 1 << 14
# WebGPU's defaults for what kernels use: more is never asked for, except of the sizes below.
_COUNTS = {
    "max-bind-groups": 4,
    "max-bindings-per-bind-group": 1000,
    "max-uniform-buffers-per-shader-stage": 12,
    "max-uniform-buffer-binding-size": 65536,
    "max-dynamic-uniform-buffers-per-pipeline-layout": 8,
    "max-storage-buffers-per-shader-stage": STORAGE_BUFFERS,
    "max-compute-invocations-per-workgroup": 256,
    "max-compute-workgroup-size-x": 256,
    "max-compute-workgroup-size-y": 256,
    "max-compute-workgroup-size-z": 64,
    "max-compute-workgroup-storage-size": 16384,
    "max-compute-workgroups-per-dimension": MAX_GROUPS,
}
_SIZES = ("max-storage-buffer-binding-size", "max-buffer-size")
DEFAULT_SIZES = (128 << 20, 256 << 20)
"""The largest storage binding and buffer that WebGPU promises, in bytes."""
_LARGEST_BINDING = 1 << 31


def adapters() -> list[Any]:
    """Adapters that can compute, fastest kind first; empty if there is none.

    Raises BackendUnavailable if the wgpu package is missing or broken.
    """
    # Mesa's layer that reorders devices looks for a display and complains; we have an order.
    os.environ.setdefault("NODEVICE_SELECT", "1")
    try:
        import wgpu  # noqa: PLC0415

        found = wgpu.gpu.enumerate_adapters_sync()
    except ImportError as error:
        raise BackendUnavailable(
            f"wgpu: the package is not installed ({error}): pip install '.[wgpu]'"
        ) from None
    except (OSError, RuntimeError) as error:
        raise BackendUnavailable(f"wgpu: the package cannot be loaded: {error}") from None
    # OpenGL shows the same devices again, with fewer abilities.
    found = [a for a in found if a.info["backend_type"] != "OpenGL"]
    return sorted(found, key=lambda a: _PREFERRED.index(a.info["adapter_type"]))


def available(*, software: bool = True) -> tuple[bool, str]:
    """Whether the wgpu backend can run here (``software``: on a processor too), or why not."""
    try:
        found = adapters()
    except BackendUnavailable as error:
        return False, str(error)
    if not found:
        return False, f"wgpu: {_NO_ADAPTER}"
    if not software and found[0].info["adapter_type"] == "CPU":
        return False, f"wgpu: no GPU, only a software device ({describe(found[0])})"
    return True, ""


def open_device() -> "Device":
    """The fastest adapter's device. Raises BackendUnavailable if there is none."""
    found = adapters()
    if not found:
        raise BackendUnavailable(f"wgpu: {_NO_ADAPTER}")
    return Device(found[0])


def describe(adapter: Any) -> str:
    """An adapter in words: its name, driver and interface."""
    info = adapter.info
    return f"{info['device']}, {info['description']} ({info['backend_type']})"


@dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled entry point and the layout of its buffers."""

    name: str
    pipeline: Any
    layout: Any


@dataclass(frozen=True)
class Step:
    """One dispatch: parameters are up to 16 words, groups up to 3 counts."""

    kernel: Kernel
    buffers: tuple[Any, ...]
    parameters: tuple[int, ...]
    groups: tuple[int, ...]


Recording = list[tuple[Any, Any, tuple[int], tuple[int, ...]]]
"""Dispatches as the device takes them: pipeline, bind group, offset of the parameters, groups."""


Copy = tuple[Any, int, Any, int, int]
"""From a buffer and byte to another, and how many."""


class OutOfDeviceMemory(BackendUnavailable):
    """The device has no room for a buffer."""


class Device:
    """An opened adapter with its compiled kernels."""

    def __init__(self, adapter: Any, sizes: tuple[int, int] | None = None) -> None:
        """Open an adapter with buffers as large as it has, or of ``sizes`` (as DEFAULT_SIZES).

        Raises BackendUnavailable if the adapter is below WebGPU's default limits.
        """
        import wgpu  # noqa: PLC0415

        self.name = describe(adapter)
        self.identity = (adapter.info["vendor_id"], adapter.info["device_id"])
        self._kind = adapter.info["adapter_type"]
        self._usage = wgpu.BufferUsage
        self._visible = wgpu.ShaderStage.COMPUTE
        self._errors: tuple[type[Exception], ...] = (wgpu.GPUError, RuntimeError)
        asked = sizes or [int(adapter.limits[name]) for name in _SIZES]
        with self.guarded():
            self._device = adapter.request_device_sync(
                required_limits=_COUNTS | dict(zip(_SIZES, asked, strict=True))
            )
        self.binding_bytes = min(*asked, _LARGEST_BINDING)
        """Bytes that one binding, and so one buffer, may have."""
        self._sources: dict[str, str] = {}
        self._modules: dict[tuple[str, ...], Any] = {}
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        self._groups: dict[tuple[object, ...], Any] = {}
        self._slots: dict[tuple[int, ...], int] = {}
        self.generation = 0
        """Recordings, and commands from them, hold until this changes."""
        u = self._usage
        self._zero = self._device.create_buffer(size=16, usage=u.UNIFORM)
        self._parameters = self._device.create_buffer(
            size=_PARAMETER_SLOTS * _PARAMETER_STRIDE, usage=u.UNIFORM | u.COPY_DST
        )
        self.dot = "dot_packed" if self._compiles("dot_packed") else "dot_plain"
        """The file with the integer dot product that this device compiles."""

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn the device's errors into BackendUnavailable."""
        try:
            yield
        except self._errors as error:
            text = " ".join(str(error).split())
            kind: type[BackendUnavailable] = BackendUnavailable
            if "lost" in text:
                text = f"the device was lost; load the model again ({text})"
            elif "memory" in text.lower():
                text, kind = f"out of device memory ({text})", OutOfDeviceMemory
            raise kind(f"wgpu: {self.name}: {text}") from None

    def memory(self) -> Memory | None:
        """What there is for buffers; None where nobody says: WebGPU does not, and what asks the
        driver beside it may have no answer."""
        known = [vulkan.memory_of(*self.identity)] if self._kind != "CPU" else []
        if self._kind in ("CPU", "IntegratedGPU"):
            known.append(host_memory())
        return min((m for m in known if m is not None), key=lambda m: m.free, default=None)

    def close(self) -> None:
        """Free everything; the device cannot be used afterwards."""
        self.forget()
        self._device.destroy()

    def forget(self) -> None:
        """Keep no buffer that nobody else does; recordings no longer hold."""
        self._groups.clear()
        self.generation += 1

    # Buffers

    def upload(self, data: NDArray[np.generic]) -> Any:
        """A storage buffer holding the bytes of ``data``."""
        u = self._usage
        return self._device.create_buffer_with_data(
            data=np.ascontiguousarray(data), usage=u.STORAGE | u.COPY_SRC | u.COPY_DST
        )

    def empty(self, nbytes: int) -> Any:
        """A zeroed storage buffer."""
        u = self._usage
        return self._device.create_buffer(
            size=max(nbytes, 16), usage=u.STORAGE | u.COPY_SRC | u.COPY_DST
        )

    def write(self, buffer: Any, data: NDArray[np.generic], offset: int = 0) -> None:
        """Write into a buffer before anything submitted later runs."""
        self._device.queue.write_buffer(buffer, offset, data)

    def read(
        self, buffer: Any, dtype: type[np.generic], count: int | None = None, offset: int = 0
    ) -> NDArray[Any]:
        """``count`` values at byte ``offset`` of a buffer, once everything submitted has run."""
        n = buffer.size - offset if count is None else count * np.dtype(dtype).itemsize
        staging = self.staging(n)
        self.submit(self.encode([], (buffer, offset, staging, 0, n)))
        with self.fetching(staging, n) as data:
            return data().copy().view(dtype)

    def staging(self, nbytes: int) -> Any:
        """A buffer that results are copied into for the host."""
        u = self._usage
        return self._device.create_buffer(size=nbytes, usage=u.MAP_READ | u.COPY_DST)

    @contextmanager
    def fetching(self, staging: Any, nbytes: int) -> Iterator[Callable[[], NDArray[np.uint8]]]:
        """A function that waits for everything submitted so far, then has the first bytes of a
        staging buffer, until the context ends.
        """
        mapping = staging.map_async("READ", 0, nbytes)

        def data() -> NDArray[np.uint8]:
            mapping.sync_wait()
            return np.frombuffer(staging.read_mapped(0, nbytes, copy=False), np.uint8)

        try:
            yield data
        finally:
            staging.unmap()

    def flush(self) -> None:
        """Let uploads go ahead, so that their staging memory is freed."""
        self._device.queue.submit([])

    # Kernels

    def kernel(self, files: Sequence[str], entry: str, **constants: int) -> Kernel:
        """Compile (once) an entry point of the last of ``files``, which build on each other.

        ``constants`` are values for the files' ``override`` declarations.
        """
        key = (*files, entry, *sorted(constants.items()))
        if key not in self._kernels:
            stage = {"visibility": self._visible}
            entries = [
                stage | {"binding": 0, "buffer": {"type": "uniform"}},
                stage | {"binding": 1, "buffer": {"type": "uniform", "has_dynamic_offset": True}},
            ]
            for number, access in _BINDING.findall("\n".join(map(self.source, files))):
                kind = "storage" if access == "read_write" else "read-only-storage"
                entries.append(stage | {"binding": int(number), "buffer": {"type": kind}})
            layout = self._device.create_bind_group_layout(entries=entries)
            pipeline = self._device.create_compute_pipeline(
                layout=self._device.create_pipeline_layout(bind_group_layouts=[layout]),
                compute={
                    "module": self._module(tuple(files)),
                    "entry_point": entry,
                    "constants": constants,
                },
            )
            self._kernels[key] = Kernel(f"{files[-1]}.{entry}", pipeline, layout)
        return self._kernels[key]

    def source(self, stem: str) -> str:
        """The text of ``stem.wgsl``, of ``kernels/`` where no folder is named."""
        if stem not in self._sources:
            path = _SOURCES.joinpath(f"{stem}.wgsl" if "/" in stem else f"kernels/{stem}.wgsl")
            self._sources[stem] = path.read_text("utf-8")
        return self._sources[stem]

    def _module(self, files: tuple[str, ...]) -> Any:
        if files not in self._modules:
            code = "\n".join(map(self.source, files))
            self._modules[files] = self._device.create_shader_module(code=code)
        return self._modules[files]

    def _compiles(self, stem: str) -> bool:
        try:
            self._module((stem,))
        except self._errors:
            return False
        return True

    # Dispatches

    def record(self, steps: Sequence[Step]) -> Recording:
        """Make steps ready to be encoded any number of times."""
        if len(self._slots) + len(steps) > _PARAMETER_SLOTS:
            self._slots.clear()
            self.generation += 1
        first = len(self._slots)
        offsets = [
            self._slots.setdefault(s.parameters, len(self._slots)) * _PARAMETER_STRIDE
            for s in steps
        ]
        fresh = list(self._slots)[first:]
        if fresh:
            words = np.zeros((len(fresh), _PARAMETER_STRIDE // 4), np.uint32)
            for row, parameters in zip(words, fresh, strict=True):
                row[: len(parameters)] = [p & 0xFFFFFFFF for p in parameters]
            self.write(self._parameters, words, first * _PARAMETER_STRIDE)
        return [
            (s.kernel.pipeline, self._bind(s), (at,), s.groups)
            for s, at in zip(steps, offsets, strict=True)
        ]

    def _bind(self, step: Step) -> Any:
        key = (step.kernel, *step.buffers)
        if key not in self._groups:
            buffers = [(self._zero, 16), (self._parameters, _PARAMETER_BYTES)]
            buffers += [(b, b.size) for b in step.buffers]
            self._groups[key] = self._device.create_bind_group(
                layout=step.kernel.layout,
                entries=[
                    {"binding": i, "resource": {"buffer": b, "offset": 0, "size": n}}
                    for i, (b, n) in enumerate(buffers)
                ],
            )
        return self._groups[key]

    def encode(self, recording: Recording, *copies: Copy) -> Any:
        """A command to run a recording once, then to copy."""
        encoder = self._device.create_command_encoder()
        if recording:
            compute = encoder.begin_compute_pass()
            for pipeline, group, offsets, groups in recording:
                compute.set_pipeline(pipeline)
                compute.set_bind_group(0, group, offsets)
                compute.dispatch_workgroups(*groups)
            compute.end()
        for copy in copies:
            encoder.copy_buffer_to_buffer(*copy)
        return encoder.finish()

    def submit(self, command: Any) -> None:
        """Run a command."""
        self._device.queue.submit([command])

    def run(self, steps: Sequence[Step]) -> None:
        """Run steps in order, in one submission."""
        self.submit(self.encode(self.record(steps)))
