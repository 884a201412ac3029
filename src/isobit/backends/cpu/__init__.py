"""The CPU backend: C++ kernels for portable, AVX2, AVX-512 VNNI and NEON machines."""

from isobit.errors import BackendUnavailable

try:
    from isobit.backends.cpu._cpu import simd_levels
except ImportError as error:
    raise BackendUnavailable(
        f"cpu: the extension module does not load ({error}); build it with pip install"
    ) from None
from isobit.backends.cpu.backend import CpuBackend
from isobit.backends.cpu.single import CpuOps

__all__ = ["CpuBackend", "CpuOps", "simd_levels"]
