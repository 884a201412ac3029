"""The ways in which a case is run, each with known bytes behind all that a pass may write."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest

from isobit.backends.base import Backend
from isobit.backends.cpu import CpuBackend, _cpu, simd_levels
from isobit.backends.cuda.lowering import Lowering
from isobit.backends.cuda.steps.programs import _rows
from isobit.backends.cuda.workspace import Slot
from isobit.backends.wgpu import WgpuBackend, fusions
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.model.weights import Weights

from .cuda_support import open_cuda
from .harness import Case, check, matrix, refusal, specified
from .wgpu_support import Guards, open_device

Opened = tuple[Backend, Callable[[], None]]
"""A backend, and what fails if it wrote beside the memory of a value."""
Way = Callable[[Weights, EngineConfig], AbstractContextManager[Opened]]
GUARD = 4096


@contextmanager
def cpu(weights: Weights, engine: EngineConfig, level: str) -> Iterator[Opened]:
    """At a level of SIMD."""
    levels = simd_levels()
    if level not in levels and not (level == "emulated_amx" and "avx512vnni" in levels):
        pytest.skip(f"not run: this machine or build has no {level}")
    with patch.object(_cpu, "simd_levels", lambda: [*levels, level]):
        backend = CpuBackend(weights, engine, simd=level)
    backend._engine.fence()

    def intact() -> None:
        assert backend._engine.intact(), "wrote behind a value"

    yield backend, intact
    backend.close()


@contextmanager
def wgpu(weights: Weights, engine: EngineConfig, *, fused: bool, dot: str = "") -> Iterator[Opened]:
    """On the first adapter; ``dot``: with another file of dot products."""
    device = open_device()
    guards = Guards(device)
    with (
        patch.object(device, "empty", guards.empty),
        patch.object(device, "dot", dot or device.dot),
        patch.object(fusions, "CLAIMS", fusions.CLAIMS if fused else ()),
    ):
        yield WgpuBackend(weights, engine, device), guards.check


@contextmanager
def cuda(weights: Weights, engine: EngineConfig, kind: str, *, fused: bool) -> Iterator[Opened]:
    """On a GPU, or emulated on one whose memory ends where it must not be touched."""
    plain, allocate = Slot.nbytes, Lowering.allocate

    def apart(g: Lowering, rows: Mapping[str, int], _: int) -> None:
        """No memory that programs use in turns, where one's values lie on another's guards."""
        allocate(g, rows, g.gpu.allocate(g.nbytes(rows, own=False)))

    with (
        patch.object(Slot, "nbytes", lambda slot, rows: plain(slot, rows) + GUARD),
        patch.object(Lowering, "allocate", apart),
    ):
        backend = open_cuda(kind, weights, engine, fused=fused)
    gpu, known = backend._gpu, np.full(GUARD // 4, 0x5B5B5B5B, np.uint32)
    guards = [
        slot.address + 4 * (slot.words * _rows(made.g, n)[slot.rows] + slot.more)
        for made, n in backend._programs._programs
        for slot in made.g.slots
    ]
    for address in guards:
        gpu.upload(address, known)

    def intact() -> None:
        for address in guards:
            gpu.download(address, found := np.empty_like(known))
            assert (found == known).all(), "a kernel wrote behind a value"

    yield backend, intact
    backend.close()


LEVELS = "portable", "avx2", "avx512vnni", "avx512amx", "emulated_amx", "neon", "neon_i8mm"
"""Of emulated_amx the matrix unit's instructions alone are emulated."""
WAYS: dict[str, Way] = {
    **{f"cpu-{level}": partial(cpu, level=level) for level in LEVELS},
    "wgpu": partial(wgpu, fused=True),
    "wgpu-unfused": partial(wgpu, fused=False),
    "wgpu-dot-plain": partial(wgpu, fused=True, dot="dot_plain"),
    "emulated": partial(cuda, kind="emulated", fused=True),
    "emulated-unfused": partial(cuda, kind="emulated", fused=False),
    "cuda": partial(cuda, kind="cuda", fused=True),
    "cuda-unfused": partial(cuda, kind="cuda", fused=False),
}


def a_test_of(*cases: Case) -> Callable[[Case, str], None]:
    """A test of these cases in all their ways."""
    pairs = [pytest.param(case, way, id=f"{way}-{case.name}") for case, way in matrix(cases, WAYS)]

    @pytest.mark.parametrize(("case", "way"), pairs)
    def test(case: Case, way: str) -> None:
        wanted, _ = specified(case)
        expected = refusal(case, way)
        try:
            with WAYS[way](wanted.weights, wanted.engine) as (backend, intact):
                check(case, backend, intact)
        except BackendUnavailable as said:
            if expected is None or expected not in str(said):
                raise
            pytest.skip(f"unsupported: {said}")
        assert expected is None, "it was said to be unsupported"

    return test
