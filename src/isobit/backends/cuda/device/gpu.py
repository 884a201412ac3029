"""One CUDA device: memory, copies, kernels and launches. Nothing here knows about models.

Everything is queued on one stream, in order. Errors of the driver become BackendUnavailable.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.cpu._cpu import Loading
from isobit.backends.cuda.device.compile import (
    Kernel,
    Signature,
    compile_all,
    cubin,
    signatures,
)
from isobit.backends.cuda.device.launch import launch_config
from isobit.backends.cuda.device.load import Part, begin
from isobit.backends.cuda.device.pinned import PinnedBuffers
from isobit.backends.cuda.device.protocol import Array, Gpu
from isobit.errors import BackendUnavailable

OLDEST = (8, 0)
"""Ampere: the oldest architecture with the integer instructions the kernels use."""

_FORKED = (
    "this process was forked from one that had opened the GPU, which cannot be shared so: load the "
    "model after the fork, or start the process anew (multiprocessing: spawn)"
)


def available() -> tuple[bool, str]:  # noqa: PLR0911  # a reason each
    """Whether the CUDA backend can run here, and the reason if not. Cheap; touches no memory."""
    try:
        from cuda.bindings import driver  # noqa: PLC0415
    except ImportError:
        return False, "cuda-bindings is not installed (pip install '.[cuda]')"
    except Exception as error:  # a broken installation raises many kinds
        return False, f"cuda-bindings could not be loaded ({error})"
    try:
        result = driver.cuInit(0)[0]
        if result == driver.CUresult.CUDA_ERROR_NOT_INITIALIZED:  # asked again, in a child
            return False, _FORKED
        if result != driver.CUresult.CUDA_SUCCESS:
            return False, f"no usable NVIDIA driver or device ({_words(driver, result)})"
        result, count = driver.cuDeviceGetCount()
        if result != driver.CUresult.CUDA_SUCCESS or count == 0:
            return False, "no CUDA device"
        major, minor = _capability(driver, 0)
    except Exception as error:  # the bindings raise RuntimeError when libcuda is missing
        words = str(error).split(". ")[0] or type(error).__name__
        return False, f"no usable NVIDIA driver ({words})"
    if (major, minor) < OLDEST:
        return False, (
            f"compute capability {OLDEST[0]}.{OLDEST[1]} or newer is needed, the device has "
            f"{major}.{minor}"
        )
    return True, ""


def _attribute(driver: Any, device: Any, name: str) -> int:
    kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(driver.cuDeviceGetAttribute(kind, device)[1])


def _capability(driver: Any, device: Any) -> tuple[int, int]:
    major, minor = (
        _attribute(driver, device, f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR")
    )
    return major, minor


def _words(driver: Any, result: Any) -> str:
    error, text = driver.cuGetErrorString(result)
    return text.decode() if error == driver.CUresult.CUDA_SUCCESS else str(result)


class CudaGpu:
    """A CUDA device, by its number."""

    def __init__(self, number: int = 0) -> None:
        usable, reason = available()
        if not usable:
            raise BackendUnavailable(f"cuda: {reason}")
        from cuda.bindings import driver  # noqa: PLC0415

        self._driver = driver
        self._process = os.getpid()
        self._last = "nothing"
        result, count = driver.cuDeviceGetCount()
        if number >= count:
            raise BackendUnavailable(f"cuda: expected {number + 1} devices, found {count}")
        device = self._device = int(self._check(driver.cuDeviceGet(number)))
        result, self._context = driver.cuDevicePrimaryCtxRetain(device)
        if result != driver.CUresult.CUDA_SUCCESS:
            raise BackendUnavailable(
                f"cuda: {_words(driver, result)}; after a kernel has failed, the driver refuses "
                "all further work of the process: start it anew, or use another backend"
            )
        self.activate()
        kind = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = self._check(driver.cuStreamCreate(kind))
        self.name = self._check(driver.cuDeviceGetName(256, device)).split(b"\0")[0].decode()
        self.multiprocessors = _attribute(driver, device, "MULTIPROCESSOR_COUNT")
        self.cache_bytes = _attribute(driver, device, "L2_CACHE_SIZE")
        self.shared_most = _attribute(driver, device, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self.arch = "sm_{}{}".format(*_capability(driver, device))
        self.warpgroups = self.arch == "sm_90"
        self._allocated: dict[int, int] = {}
        self._kernels: dict[tuple[object, ...], tuple[Any, Signature]] = {}
        self._config = lru_cache(4096)(partial(launch_config, driver, self._stream))
        self._modules: dict[tuple[object, ...], Any] = {}
        self._shared: dict[tuple[object, ...], int] = {}  # the most a kernel was launched with
        self._page_locked: set[int] = set()
        self._pinned = PinnedBuffers(self._lock_pages, self._unlock_pages)
        self._graphs: list[Any] = []
        self._loading: list[Loading] = []
        self._queues = True  # else a kernel is only loaded
        self._asked: set[Kernel] | None = None  # not even that: which are launched
        self._part = False  # of a model on several devices
        self._overlaps = True
        self._closed = False

    def activate(self) -> None:
        """Make the context that everything here belongs to the calling thread's.

        Raises BackendUnavailable in a process that was forked since: the driver gave it nothing.
        """
        if os.getpid() != self._process:
            raise BackendUnavailable(f"cuda: {_FORKED}")
        self._check(self._driver.cuCtxSetCurrent(self._context))

    def reach(self, others: Sequence[Gpu]) -> None:
        """Let kernels of this device write to the others' memory, and wait for theirs.

        Where another part runs on the same device, kernels that wait for the one before them would
        take the room of those that it waits for: none starts early.
        """
        self.activate()
        self._part, driver = True, self._driver
        for other in others:
            assert isinstance(other, CudaGpu)
            if other._device == self._device:
                self._overlaps = False
                continue
            able = self._check(driver.cuDeviceCanAccessPeer(self._device, other._device))
            if not able:
                raise BackendUnavailable(
                    f"cuda: device {self._device} cannot write to the memory of device "
                    f"{other._device}; a model can be split over devices that can"
                )
            (result,) = driver.cuCtxEnablePeerAccess(other._context, 0)
            if result != driver.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
                self._check((result,))

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Load kernels and capture graphs of what is queued meanwhile, and run nothing."""
        self._queues = False
        try:
            yield
        finally:
            self._queues = True

    def compile(self, queue: Callable[[], None], step: Callable[[int, int], None]) -> int:
        """Have the kernels on disk that ``queue`` launches; how many were not."""
        asked = self._asked = set[Kernel]()
        try:
            queue()
        finally:
            self._asked = None
        return compile_all(asked, self.arch, step)

    @property
    def may_wait(self) -> bool:
        """Not in a pass of a part of a model."""
        return not (self._part and self._queues)

    @property
    def alone(self) -> bool:
        """Whether no other part of a model is on this device, so that kernels may overlap."""
        return self._overlaps

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
            self._driver.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, self._stream)
        )

    def bring(self, parts: Sequence[Part]) -> Callable[[], None]:
        """Begin to bring parts of tensors to their places, by threads without Python's lock."""
        repack, _ = self._kernel("device/repack", "repack", {}, 0, False)
        loading = begin(int(self._context), int(self._stream), int(repack), parts)
        self._loading.append(loading)

        def wait() -> None:
            while (result := loading.wait(0.1)) is None:  # so that Ctrl-C is heard
                pass
            self._loading.remove(loading)
            self._check((self._driver.CUresult(result),))

        return wait

    def page_locked(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that the device reads by itself; uint8 [nbytes]."""
        address = int(self._check(self._driver.cuMemHostAlloc(nbytes, 0)))
        self._page_locked.add(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def free_page_locked(self, values: NDArray[np.uint8]) -> None:
        """Give it back."""
        self._check(self._driver.cuMemFreeHost(values.ctypes.data))
        self._page_locked.remove(values.ctypes.data)

    def results(self, count: int) -> NDArray[np.float32]:
        """Page-locked memory that is used again once nothing refers to it; some buffers only."""
        return self._pinned(count, more=self.may_wait)

    def _lock_pages(self, buffer: NDArray[np.float32]) -> None:
        self._check(self._driver.cuMemHostRegister(buffer.ctypes.data, buffer.nbytes, 0))

    def _unlock_pages(self, buffer: NDArray[np.float32]) -> None:
        self._check(self._driver.cuMemHostUnregister(buffer.ctypes.data))

    def mark(self) -> object:
        """A point in the queue: an event."""
        driver = self._driver
        event = self._check(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        self._check(driver.cuEventRecord(event, self._stream))
        return event

    def wait(self, mark: object) -> None:
        """Wait until the device has passed a point."""
        self._check(self._driver.cuEventSynchronize(mark))
        self._check(self._driver.cuEventDestroy(mark))

    def fetch(self, address: int, out: Array) -> None:
        """Queue a copy from the device."""
        if not self._queues:
            out.fill(0)
            return
        self._check(
            self._driver.cuMemcpyDtoHAsync(out.ctypes.data, address, out.nbytes, self._stream)
        )

    def download(self, address: int, out: Array) -> None:
        """Copy from the device after all that is queued."""
        self.fetch(address, out)
        self.synchronise()

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """Queue a copy on the device."""
        self._check(self._driver.cuMemcpyDtoDAsync(target, source, nbytes, self._stream))

    def synchronise(self) -> None:
        """Wait for all that is queued."""
        self._check(self._driver.cuStreamSynchronize(self._stream))

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
        if self._asked is not None:
            self._asked.add((stem, tuple(sorted(defines.items()))))
            return
        code, signature = self._kernel(stem, kernel, defines, shared, overlap)
        if not self._queues:
            return
        self._last = kernel
        threads = signature.threads(defines)
        overlap = overlap and self._overlaps
        config = self._config(tuple(grid), threads, shared, cooperative, overlap)
        values = tuple(arguments), signature.parameters
        try:
            (result,) = self._driver.cuLaunchKernelEx(config, code, values, 0)
        except Exception as error:  # the library's own kinds, of what it cannot pack
            raise self._not_queued(kernel, str(error)) from None
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise self._not_queued(kernel, _words(self._driver, result))

    @staticmethod
    def _not_queued(kernel: str, why: str) -> BackendUnavailable:
        return BackendUnavailable(
            f"cuda: {why} (when {kernel} was queued; the kernel that failed may be one before it)"
        )

    def capture(self, queue: Callable[[], None]) -> object:
        """Record what ``queue`` launches; its kernels are compiled and loaded first."""
        queues = self._queues
        driver, stream = self._driver, self._stream
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        try:
            self._queues = False
            queue()
            self._queues = True
            self._check(driver.cuStreamBeginCapture(stream, mode))
            try:
                queue()
            except BaseException:
                driver.cuStreamEndCapture(stream)
                raise
        finally:
            self._queues = queues
        graph = self._check(driver.cuStreamEndCapture(stream))
        self._graphs.append(self._check(driver.cuGraphInstantiate(graph, 0)))
        self._check(driver.cuGraphDestroy(graph))
        self._check(driver.cuGraphUpload(self._graphs[-1], stream))
        if self._part:  # nothing of it may be left to its first launch
            self.synchronise()
        return self._graphs[-1]

    def replay(self, graph: object) -> None:
        """Queue a graph."""
        if not self._queues:
            return
        self._last = "a decode step"
        self._check(self._driver.cuGraphLaunch(graph, self._stream))

    def _kernel(
        self, stem: str, name: str, defines: Mapping[str, str], shared: int, overlap: bool
    ) -> tuple[Any, Signature]:
        module_key = (stem, *sorted(defines.items()))
        key = (name, shared, overlap, *module_key)
        if key not in self._kernels:
            if module_key not in self._modules:
                code = cubin(stem, self.arch, defines)
                loaded = self._driver.cuLibraryLoadData(code, [], [], 0, [], [], 0)
                self._modules[module_key] = self._check(loaded)
            made = self._driver.cuLibraryGetKernel(self._modules[module_key], name.encode())
            kernel = self._check(made)
            attribute = self._driver.CUfunction_attribute
            if shared > self._shared.get((name, *module_key), 48 << 10):
                most = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._set_attribute(kernel, most, shared)
                self._shared[name, *module_key] = shared
            if self._part:  # else at its first launch
                function = self._check(self._driver.cuKernelGetFunction(kernel))
                self._check(self._driver.cuFuncLoad(function))
            if overlap:  # kernels run side by side only where they split a multiprocessor alike
                split = attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                self._set_attribute(kernel, split, 100)
            self._kernels[key] = self._driver.CUfunction(int(kernel)), signatures(stem)[name]
        return self._kernels[key]

    def _set_attribute(self, kernel: Any, attribute: Any, value: int) -> None:
        self._check(self._driver.cuKernelSetAttribute(attribute, value, kernel, self._device))

    def _check(self, results: tuple[Any, ...]) -> Any:
        result, *values = results
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendUnavailable(
                f"cuda: {_words(self._driver, result)} (last kernel queued: {self._last})"
            )
        return values[0] if len(values) == 1 else values

    def close(self) -> None:
        """Free everything; in a process that was forked since, nothing is its own."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        for loading in self._loading:
            loading.stop()
        self.activate()
        for loading in self._loading:
            loading.wait(0)
        self._kernels.clear()
        with contextlib.suppress(BackendUnavailable):  # a kernel has failed: nothing can be freed
            for graph in self._graphs:
                self._check(self._driver.cuGraphExecDestroy(graph))
            for address in list(self._allocated):
                self.free(address)
            for buffer in self._pinned.registered.values():
                self._unlock_pages(buffer)
            for address in self._page_locked:
                self._check(self._driver.cuMemFreeHost(address))
            for module in self._modules.values():
                self._check(self._driver.cuLibraryUnload(module))
            self._check(self._driver.cuStreamDestroy(self._stream))
            self._check(self._driver.cuDevicePrimaryCtxRelease(self._device))
