"""The CPU backend: C++ kernels for portable, AVX2, AVX-512 VNNI and NEON machines."""

from isobit.backends.cpu._cpu import simd_levels
from isobit.backends.cpu.backend import CpuBackend
from isobit.backends.cpu.ops import CpuOps

__all__ = ["CpuBackend", "CpuOps", "simd_levels"]
