"""One CUDA device: memory, copies, kernels and launches. Nothing here knows about models.

Everything is queued on one stream, in order. Errors of the driver become BackendUnavailable.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isobit.backends.cuda.compile import Signature, cubin, signatures
from isobit.errors import BackendUnavailable

OLDEST = (8, 0)
"""Ampere: the oldest architecture with the integer instructions the kernels use."""

Array = NDArray[np.generic]


class Gpu(Protocol):
    """What the backend asks of a device (a protocol so that tests can emulate one)."""

    name: str
    multiprocessors: int
    shared_most: int
    """Shared memory that a block can have, in bytes."""

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""

    def allocate(self, nbytes: int) -> int:
        """Address of new memory, aligned to 256 bytes."""

    def free(self, address: int) -> None:
        """Give memory back."""

    def upload(self, address: int, values: Array) -> None:
        """Queue a copy to the device; ``values`` may be changed when this returns."""

    def download(self, address: int, out: Array) -> None:
        """Copy from the device after all that is queued; done when this returns."""

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
        overlap: bool = False,
    ) -> None:
        """Queue a kernel of ``stem``.cu compiled with ``defines``; ``shared``: dynamic bytes.

        cooperative: all blocks run at once. overlap: it may start before the kernel ahead of it has
        ended, and waits for it by itself.
        """

    def capture(self, queue: Callable[[], None]) -> object:
        """Record what ``queue`` launches as a graph, without running it."""

    def replay(self, graph: object) -> None:
        """Queue a graph."""

    def close(self) -> None:
        """Free everything that was allocated."""


def available() -> tuple[bool, str]:  # noqa: PLR0911  # a reason each
    """Whether the CUDA backend can run here, and the reason if not. Cheap; touches no memory."""
    try:
        from cuda.bindings import driver  # noqa: PLC0415
        from cuda.core import Device  # noqa: F401, PLC0415
    except ImportError:
        return False, "cuda-core is not installed (pip install 'isobit[cuda]')"
    except Exception as error:  # a broken installation raises many kinds
        return False, f"cuda-core could not be loaded ({error})"
    try:
        result = driver.cuInit(0)[0]
        if result != driver.CUresult.CUDA_SUCCESS:
            return False, f"no usable NVIDIA driver or device ({_words(driver, result)})"
        result, count = driver.cuDeviceGetCount()
        if result != driver.CUresult.CUDA_SUCCESS or count == 0:
            return False, "no CUDA device"
        major, minor = _capability(driver)
    except Exception as error:  # the bindings raise RuntimeError when libcuda is missing
        return False, f"no usable NVIDIA driver ({str(error).splitlines()[0]})"
    if (major, minor) < OLDEST:
        return False, (
            f"compute capability {OLDEST[0]}.{OLDEST[1]} or newer is needed, the device has "
            f"{major}.{minor}"
        )
    return True, ""


def _capability(driver: Any) -> tuple[int, int]:
    kinds = driver.CUdevice_attribute
    major, minor = (
        driver.cuDeviceGetAttribute(kind, 0)[1]
        for kind in (
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return int(major), int(minor)


def _words(driver: Any, result: Any) -> str:
    error, text = driver.cuGetErrorString(result)
    return text.decode() if error == driver.CUresult.CUDA_SUCCESS else str(result)


class CudaGpu:
    """The first CUDA device."""

    def __init__(self) -> None:
        usable, reason = available()
        if not usable:
            raise BackendUnavailable(f"cuda: {reason}")
        from cuda import core  # noqa: PLC0415
        from cuda.bindings import driver  # noqa: PLC0415

        self._core, self._driver = core, driver
        self._device = core.Device(0)
        self._device.set_current()
        self._stream = self._device.create_stream()
        self.name = str(self._device.name)
        self.multiprocessors = int(self._device.properties.multiprocessor_count)
        self.shared_most = int(self._device.properties.max_shared_memory_per_block_optin)
        self.arch = f"sm_{self._device.arch}"
        self._allocated: dict[int, int] = {}
        self._kernels: dict[tuple[object, ...], tuple[Any, Signature]] = {}
        self._modules: dict[tuple[object, ...], Any] = {}
        self._last = "nothing"
        self._only_load = False

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = self._check(self._driver.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """Address of new memory."""
        result, address = self._driver.cuMemAlloc(max(nbytes, 1))
        if result == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = self.memory()
            raise BackendUnavailable(
                f"cuda: {nbytes / 1e9:.2f} GB more are needed, {free / 1e9:.2f} of "
                f"{total / 1e9:.2f} GB are free"
            )
        self._check((result,))
        self._allocated[int(address)] = nbytes
        return int(address)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._check(self._driver.cuMemFree(address))
        del self._allocated[address]

    def upload(self, address: int, values: Array) -> None:
        """Queue a copy to the device. Pageable memory is staged before the driver returns."""
        values = np.ascontiguousarray(values)
        self._check(
            self._driver.cuMemcpyHtoDAsync(
                address, values.ctypes.data, values.nbytes, self._stream.handle
            )
        )

    def download(self, address: int, out: Array) -> None:
        """Copy from the device after all that is queued."""
        self._check(
            self._driver.cuMemcpyDtoHAsync(
                out.ctypes.data, address, out.nbytes, self._stream.handle
            )
        )
        self.synchronise()

    def synchronise(self) -> None:
        """Wait for all that is queued."""
        self._check(self._driver.cuStreamSynchronize(self._stream.handle))

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
        overlap: bool = False,
    ) -> None:
        """Queue a kernel."""
        defines = defines or {}
        code, signature = self._kernel(stem, kernel, defines, shared)
        if self._only_load:
            return
        self._last = kernel
        config = self._core.LaunchConfig(
            grid=tuple(grid),
            block=signature.threads(defines),
            shmem_size=shared,
            is_cooperative=cooperative,
            programmatic_stream_serialization=overlap,
        )
        values = [t(a) for t, a in zip(signature.parameters, arguments, strict=True)]
        self._core.launch(self._stream, config, code, *values)

    def capture(self, queue: Callable[[], None]) -> object:
        """Record what ``queue`` launches; its kernels are compiled and loaded first."""
        self._only_load = True
        try:
            queue()
        finally:
            self._only_load = False
        driver, stream = self._driver, self._stream.handle
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._check(driver.cuStreamBeginCapture(stream, mode))
        try:
            queue()
        finally:
            graph = self._check(driver.cuStreamEndCapture(stream))
        return self._check(driver.cuGraphInstantiate(graph, 0))

    def replay(self, graph: object) -> None:
        """Queue a graph."""
        self._last = "a decode step"
        self._check(self._driver.cuGraphLaunch(graph, self._stream.handle))

    def _kernel(
        self, stem: str, name: str, defines: Mapping[str, str], shared: int
    ) -> tuple[Any, Signature]:
        module_key = (stem, *sorted(defines.items()))
        key = (name, shared, *module_key)
        if key not in self._kernels:
            if module_key not in self._modules:
                code = cubin(stem, self.arch, defines)
                self._modules[module_key] = self._core.ObjectCode.from_cubin(code)
            kernel = self._modules[module_key].get_kernel(name)
            if shared > 48 << 10:
                self._allow_shared(kernel, shared)
            self._kernels[key] = kernel, signatures(stem)[name]
        return self._kernels[key]

    def _allow_shared(self, kernel: Any, nbytes: int) -> None:
        attribute = self._driver.CUfunction_attribute
        self._check(
            self._driver.cuKernelSetAttribute(
                attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                nbytes,
                kernel.handle,
                self._device.device_id,
            )
        )

    def _check(self, results: tuple[Any, ...]) -> Any:
        result, *values = results
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendUnavailable(
                f"cuda: {_words(self._driver, result)} (last kernel queued: {self._last})"
            )
        return values[0] if len(values) == 1 else values

    def close(self) -> None:
        """Free everything that was allocated."""
        for address in list(self._allocated):
            self.free(address)
        self._kernels.clear()
        self._modules.clear()
