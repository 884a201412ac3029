"""What this machine computes with, as far as its system tells without loading a driver."""

import platform
import sys
from pathlib import Path

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


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
