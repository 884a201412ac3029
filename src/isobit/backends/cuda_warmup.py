"""CUDA's driver and the first device's context, made ready while the host does something else."""

from threading import Thread
from typing import Any

_begun: list[tuple[Thread, list[Any]]] = []


def begin() -> None:
    """Begin, in the background. What goes wrong is found again, and said, by who needs the GPU."""
    held: list[Any] = []
    thread = Thread(target=_retain, args=(held,), name="isobit-driver", daemon=True)
    _begun.append((thread, held))
    thread.start()


def _retain(held: list[Any]) -> None:
    try:
        from cuda import core  # noqa: F401, PLC0415
        from cuda.bindings import driver  # noqa: PLC0415

        if driver.cuInit(0)[0] == driver.CUresult.CUDA_SUCCESS:
            _, device = driver.cuDeviceGet(0)
            if driver.cuDevicePrimaryCtxRetain(device)[0] == driver.CUresult.CUDA_SUCCESS:
                held.append(device)
    except Exception:  # no such package, no such driver: many kinds
        return


def wait() -> None:
    """Wait for what has begun: two threads must not import the driver's modules at once."""
    for thread, _ in _begun:
        thread.join()


def release() -> None:
    """Let go of what has begun; for who holds the context now."""
    wait()
    while _begun:
        for device in _begun.pop()[1]:
            from cuda.bindings import driver  # noqa: PLC0415

            driver.cuDevicePrimaryCtxRelease(device)
