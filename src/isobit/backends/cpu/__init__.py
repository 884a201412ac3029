"""The CPU backend: C++ kernels for portable, AVX2, AVX-512 VNNI and NEON machines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from isobit.errors import BackendUnavailable

try:
    from isobit.backends.cpu._cpu import simd_levels
except ImportError as error:
    raise BackendUnavailable(
        f"cpu: the extension module does not load ({error}); build it with pip install"
    ) from None

if TYPE_CHECKING:
    from isobit.backends.cpu.backend import CpuBackend
    from isobit.backends.cpu.single import CpuOps

__all__ = ["CpuBackend", "CpuOps", "simd_levels"]

_HOMES = {"CpuBackend": "backend", "CpuOps": "single"}


def __getattr__(name: str) -> Any:
    """Import these late: they stand on backends.base, which uses the extension."""
    if name in _HOMES:
        return vars(import_module(f"isobit.backends.cpu.{_HOMES[name]}"))[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
