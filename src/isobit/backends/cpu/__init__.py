"""The CPU backend: C++ kernels for portable, AVX2, AVX-512 VNNI, AMX and NEON machines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from isobit.errors import BackendUnavailable

try:
    from isobit.backends.cpu import _cpu
    from isobit.backends.cpu._cpu import simd_levels
except ImportError as error:
    raise BackendUnavailable(
        f"cpu: the extension module does not load ({error}); build it with pip install"
    ) from None

if TYPE_CHECKING:
    from isobit.backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend", "in_the_way", "shown_level", "simd_levels"]


def shown_level(level: str) -> str:
    """A level's name, and whether something stands in the way of a better one."""
    return f"{level} (AMX refused: see isobit devices)" if _cpu.refused_unit() else level


def in_the_way() -> str:
    """What does, and what to do about it; "" if nothing does."""
    if not _cpu.refused_unit():
        return ""
    return (
        "the processor has AMX, which reads prompts faster, but the system refuses it: expected "
        "Linux 5.16 or newer, and a container or sandbox that lets arch_prctl through (seccomp)"
    )


def __getattr__(name: str) -> Any:
    """Import it late: it stands on backends.base, which uses the extension."""
    if name == "CpuBackend":
        return import_module("isobit.backends.cpu.backend").CpuBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
