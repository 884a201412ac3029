"""The backends whose single operations are tested, and how each is opened.

An entry opens an object with the operations of :class:`isobit.backends.cpu.CpuOps`: the functions
of ``isobit.numerics`` argument for argument, results in memory from its ``empty(shape, dtype)``.
"""

from collections.abc import Callable

import pytest

CPU_LEVELS = ("portable", "avx2", "avx512vnni", "neon", "neon_i8mm")


def _cpu(simd: str) -> Callable[[], object]:
    def open_ops() -> object:
        from isobit.backends.cpu import CpuOps, simd_levels  # noqa: PLC0415

        if simd not in simd_levels():
            pytest.skip(f"not run: this machine or build has no {simd}")
        return CpuOps(simd, threads=2)

    return open_ops


OPENERS: dict[str, Callable[[], object]] = {f"cpu-{level}": _cpu(level) for level in CPU_LEVELS}
