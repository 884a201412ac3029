"""NVIDIA's driver: whether it is there, and what it says of a device."""

from typing import Any

from isobit.errors import BackendUnavailable

OLDEST = (8, 0)
"""Ampere: the oldest architecture with the integer instructions the kernels use."""

FORKED = (
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
            return False, FORKED
        if result != driver.CUresult.CUDA_SUCCESS:
            return False, f"no usable NVIDIA driver or device ({in_words(driver, result)})"
        result, count = driver.cuDeviceGetCount()
        if result != driver.CUresult.CUDA_SUCCESS or count == 0:
            return False, "no CUDA device"
        major, minor = capability(driver, 0)
    except Exception as error:  # the bindings raise RuntimeError when libcuda is missing
        words = str(error).split(". ")[0] or type(error).__name__
        return False, f"no usable NVIDIA driver ({words})"
    if (major, minor) < OLDEST:
        return False, (
            f"compute capability {OLDEST[0]}.{OLDEST[1]} or newer is needed, the device has "
            f"{major}.{minor}"
        )
    return True, ""


def attribute(driver: Any, device: Any, name: str) -> int:
    """What a device says of itself. Raises BackendUnavailable."""
    kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    result, value = driver.cuDeviceGetAttribute(kind, device)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise BackendUnavailable(f"cuda: {name}: {in_words(driver, result)}")
    return int(value)


def capability(driver: Any, device: Any) -> tuple[int, int]:
    """A device's compute capability. Raises BackendUnavailable."""
    major, minor = (
        attribute(driver, device, f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR")
    )
    return major, minor


def in_words(driver: Any, result: Any) -> str:
    """An error of the driver."""
    error, text = driver.cuGetErrorString(result)
    return text.decode() if error == driver.CUresult.CUDA_SUCCESS else str(result)
