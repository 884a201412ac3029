"""Backends by name."""

import ctypes
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from isobit.backend_names import BACKENDS, VARIANTS
from isobit.backends.base import Backend
from isobit.backends.hardware import gpus, may_have_gpu
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, UsageError, did_you_mean
from isobit.model.weights import Weights

Note = Callable[[str], None]


class FallbackNote(str):
    """A note that another backend, or a device that is not exact, stands in for what was asked."""

    __slots__ = ()


class NoGpuNote(FallbackNote):
    """A note that ``auto`` takes the CPU."""

    __slots__ = ()


class SettledNote(str):
    """A note that there is room for less than was asked."""

    __slots__ = ()


def warn(note: str) -> None:
    """Tell a caller who has given no ``note``, by a warning: what stands in for what was asked.

    That there is no GPU to use is no news on a machine without one.
    """
    if isinstance(note, NoGpuNote) and not gpus():
        return
    if isinstance(note, SettledNote | FallbackNote):
        warnings.warn(note, stacklevel=2)


@contextmanager
def driver_held(name: str, engine: EngineConfig) -> Iterator[None]:
    """Have NVIDIA's driver and a context opened by a thread, if a backend may ask for them within.

    That takes 0.2 to 1.1 s, in which Python's lock is free for what is done meanwhile. What goes
    wrong is said when the backend asks; a context that no backend took is given back at the end.
    """
    done = threading.Event()
    asks = name in ("cuda", *VARIANTS) or (name == "auto" and engine.parts == 1)
    if asks and not engine.stages and may_have_gpu():
        with suppress(RuntimeError):  # no thread
            threading.Thread(target=_hold_driver, args=(done,)).start()
    try:
        yield
    finally:
        done.set()


def _hold_driver(done: threading.Event) -> None:
    try:
        driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    except OSError:
        return
    if driver.cuInit(0) == 0 and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0:
        done.wait()
        driver.cuDevicePrimaryCtxRelease_v2(0)


def open_backend(
    name: str,
    weights: Weights,
    engine: EngineConfig,
    note: Note = warn,
    beside: Callable[[], None] = lambda: None,
) -> Backend:
    """Make a model ready on a backend.

    ``auto`` tries CUDA, then wgpu on a GPU whose driver is exact, then the CPU. What a user should
    know goes to ``note`` as one line: what ``auto`` passed over and why, that the device is not
    exact, that there is room for less than was asked, or what a GPU holds. ``beside`` begins other
    work for Python, and is called where that delays no device. Raises BackendUnavailable with the
    reason when the named backend cannot run here.
    """
    if name == "auto" and engine.parts == 1 and not engine.stages:
        return _fastest(weights, replace(engine, allow_inexact=False), note, beside)
    if engine.parts > 1 or engine.stages:
        beside()
        backend = _spread(name, weights, engine)
    else:
        backend = _named(name, weights, engine, note, beside)
    if backend.settled is not None:
        note(SettledNote(backend.settled))
    if backend.inexact:
        inexact = f"the results are not the specification's: {backend.device}"
        note(FallbackNote(f"backend {name}: {inexact}"))
    return backend


def _named(
    name: str, weights: Weights, engine: EngineConfig, note: Note, beside: Callable[[], None]
) -> Backend:
    # Imported here so that a backend's libraries load only when it is used.
    if name in ("cuda", *VARIANTS):
        from isobit.backends.cuda import CudaBackend, UnfusedCudaBackend  # noqa: PLC0415

        kind = UnfusedCudaBackend if name in VARIANTS else CudaBackend
        on_gpu = kind(weights, engine, beside=beside)
        note(f"device memory: {on_gpu.plan}")
        return on_gpu
    beside()
    if name == "reference":
        from isobit.backends.reference import ReferenceBackend  # noqa: PLC0415

        return ReferenceBackend(weights, engine)
    if name == "cpu":
        from isobit.backends.cpu import CpuBackend  # noqa: PLC0415

        return CpuBackend(weights, engine)
    if name == "wgpu":
        from isobit.backends.wgpu import WgpuBackend  # noqa: PLC0415

        return WgpuBackend(weights, engine)
    near = did_you_mean(name, ("auto", *BACKENDS, *VARIANTS))
    raise UsageError(f"backend: expected auto, {', '.join(BACKENDS)}; got {name!r}{near}")


def lacks(name: str, weights: Weights) -> str | None:
    """What a backend has no kernel for in a model, whatever the machine; None if it has all."""
    if name == "cuda":
        from isobit.backends import cuda  # noqa: PLC0415

        return cuda.lacks(weights)
    if name == "wgpu":
        from isobit.backends import wgpu  # noqa: PLC0415

        return wgpu.lacks(weights)
    return None


def _fastest(
    weights: Weights, engine: EngineConfig, note: Note, beside: Callable[[], None]
) -> Backend:
    """The first of cuda, wgpu (on a GPU, not a software device) and cpu that runs here."""
    if not may_have_gpu():  # to ask their libraries would take longer than a short run
        note(NoGpuNote("backend auto: using cpu (no GPU, nor a driver of one)"))
        return open_backend("cpu", weights, engine, note, beside)
    passed_over: list[str] = []
    for name in ("cuda", "wgpu"):
        usable, reason = _available(name)
        if usable:
            try:
                backend = open_backend(name, weights, engine, note, beside)
            except BackendUnavailable as error:
                reason = str(error)
            else:
                if passed_over:
                    note(FallbackNote(f"backend auto: using {name} ({'; '.join(passed_over)})"))
                return backend
        passed_over.append(reason)
    note(NoGpuNote(f"backend auto: using cpu ({'; '.join(passed_over)})"))
    return open_backend("cpu", weights, engine, note, beside)


def _available(name: str) -> tuple[bool, str]:
    if name == "cuda":
        from isobit.backends import cuda  # noqa: PLC0415

        return cuda.available()
    from isobit.backends import wgpu  # noqa: PLC0415

    return wgpu.available(software=False)


def _spread(name: str, weights: Weights, engine: EngineConfig) -> Backend:
    """A model over several processes or machines."""
    if engine.stages:
        if name != "auto" or engine.parts > 1:
            raise UsageError("stages: expected no backend and no parts beside; stages have theirs")
        from isobit.backends.distributed.pipeline import PipelineBackend, Stage  # noqa: PLC0415
        from isobit.backends.distributed.remote import connect  # noqa: PLC0415

        here = [at for at in engine.stages if at.startswith("ray:")]
        actors: Iterator[Stage] = iter(())
        if here:
            from isobit.backends.distributed.on_ray import start  # noqa: PLC0415  # an extra

            actors = iter(start(here, weights, engine))
        stages: list[Stage] = []
        try:
            for at in engine.stages:
                stages.append(next(actors) if at in here else connect(at, engine.stage_key))
            return PipelineBackend(weights, engine, stages)
        except BaseException:
            for stage in (*stages, *actors):
                stage.close()
            raise
    if name == "cuda":
        from isobit.backends.cuda.parts import CudaPartsBackend  # noqa: PLC0415

        return CudaPartsBackend(weights, engine)
    if name not in ("auto", "cpu"):
        raise UsageError(
            f"parts: expected 1 on {name} (cpu and cuda can be split), got {engine.parts}"
        )
    from isobit.backends.distributed.parts import PartsBackend  # noqa: PLC0415

    return PartsBackend(weights, engine)
