"""What this machine computes with, as far as it tells without loading a driver."""

import ctypes
import sys
import time
from pathlib import Path

import numpy as np

_DEV = Path("/dev")
_DEVICE_FILES = (
    *("dri/*", "dxg", "kfd", "accel*"),  # DRM, WSL, AMD
    *("nvidia*", "nvhost*", "nvgpu*", "nvmap"),
    *("mali*", "kgsl*", "pvr*", "galcore", "goldfish*"),  # of phones and boards
)
"""What drivers of GPUs work through on Linux, in /dev."""

_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}


def gpus() -> list[str]:
    """Makers of the GPUs, e.g. ["NVIDIA"]; empty where there is none.

    Looks at Linux's device files. Elsewhere nothing is known and nothing is listed, save on a Mac,
    which has one always.
    """
    if sys.platform == "darwin":
        return ["Apple"]
    found = ["NVIDIA" for p in Path("/dev").glob("nvidia[0-9]*")]
    for vendor in Path("/sys/class/drm").glob("renderD*/device/vendor"):
        try:
            name = _VENDORS.get(vendor.read_text().strip())
        except OSError:
            continue
        if name is not None and not (name == "NVIDIA" and "NVIDIA" in found):
            found.append(name)
    return found


def may_have_gpu() -> bool:
    """Whether a driver might find a GPU; takes no time. False only on a Linux that has no device
    file that one's driver works through, nor NVIDIA's library, which may reach another machine's.
    """
    if sys.platform != "linux" or any(any(_DEV.glob(name)) for name in _DEVICE_FILES):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, if it says."""
    import subprocess  # noqa: PLC0415 - 4 ms that a start does not need

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    import platform  # noqa: PLC0415

    return platform.processor() or platform.machine()


def read_bandwidth(threads: int) -> float:
    """Bytes a second that this many threads together read from the host's memory: the best of five
    passes over 512 MiB, which is far beyond any cache."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    parts = [np.ones((512 << 20) // threads // 8, np.uint64) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return sum(p.nbytes for p in parts) / best
