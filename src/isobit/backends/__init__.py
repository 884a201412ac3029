"""Backends by name."""

from collections.abc import Callable

from isobit.backends.base import Backend
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, UsageError
from isobit.model.weights import Weights

Note = Callable[[str], None]

NAMES = ("reference", "cpu", "cuda", "wgpu")
"""Every backend; ``auto`` takes the fastest that can run here."""


def open_backend(
    name: str, weights: Weights, engine: EngineConfig, note: Note | None = None
) -> Backend:
    """Make a model ready on a backend.

    ``auto`` tries CUDA, then the CPU; why CUDA was passed over goes to ``note`` as one line. Raises
    BackendUnavailable with the reason when the named backend cannot run here.
    """
    if name == "auto":
        from isobit.backends.cuda import available  # noqa: PLC0415

        usable, reason = available()
        if usable:
            try:
                return open_backend("cuda", weights, engine)
            except BackendUnavailable as error:
                reason = str(error)
        if note is not None:
            note(f"backend auto: using cpu ({reason})")
        return open_backend("cpu", weights, engine)
    # Imported here so that a backend's libraries load only when it is used.
    if name == "reference":
        from isobit.backends.reference import ReferenceBackend  # noqa: PLC0415

        return ReferenceBackend(weights, engine)
    if name == "cpu":
        from isobit.backends.cpu import CpuBackend  # noqa: PLC0415

        return CpuBackend(weights, engine)
    if name == "cuda":
        from isobit.backends.cuda import CudaBackend  # noqa: PLC0415

        return CudaBackend(weights, engine)
    if name == "wgpu":
        from isobit.backends.wgpu import WgpuBackend  # noqa: PLC0415

        return WgpuBackend(weights, engine)
    raise UsageError(f"backend: expected auto, {', '.join(NAMES)}; got {name!r}")
