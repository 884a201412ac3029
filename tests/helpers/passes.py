"""Runs token ids through a backend pass by pass, with page tables of the test's own choosing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isobit.backends import open_backend
from isobit.backends.base import F32, I32, Backend, Batch, Results, Tap
from isobit.backends.base.batch import field_values
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.numerics import KV_PAGE
from tests.helpers.expected import not_run

BACKENDS = ("reference", "cpu")


@contextmanager
def backend_of(
    path: Path,
    name: str,
    planes: int = 2,
    *,
    threads: int | None = None,
    simd: str | None = None,
) -> Iterator[Backend]:
    """A model file opened on a backend; the test is "not run" where the backend cannot run.

    ``simd`` names a SIMD level of the CPU backend.
    """
    engine = EngineConfig(activation_bits=8 * planes, threads=threads)
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        try:
            backend: Backend
            if simd is None:
                backend = open_backend(name, weights, engine)
            else:
                from isobit.backends.cpu import CpuBackend  # noqa: PLC0415

                backend = CpuBackend(weights, engine, simd=simd)
        except (BackendUnavailable, ImportError) as error:
            not_run(name, f"backend {name}: {error}")
        try:
            yield backend
        finally:
            backend.close()


def opened(name: str, weights: Weights, engine: EngineConfig) -> Backend:
    """A backend by name; every test's wgpu is on one device, and "not run" where there is none."""
    if name != "wgpu":
        return open_backend(name, weights, engine)
    from isobit.backends.wgpu import WgpuBackend  # noqa: PLC0415
    from tests.ops.wgpu_support import open_device  # noqa: PLC0415

    return WgpuBackend(weights, engine, open_device())


def run_cut(backend: Backend, ids: Sequence[int], cuts: Sequence[int]) -> F32:
    """:func:`run` in passes that begin at ``cuts``, the first of which is 0."""
    ends = [*cuts[1:], len(ids)]
    pages = page_table(len(ids))
    parts = [run(backend, ids[a:b], start=a, pages=pages) for a, b in zip(cuts, ends, strict=True)]
    return np.concatenate(parts)


def i32(values: Sequence[int] | range | NDArray[np.integer]) -> I32:
    return np.array(values, np.int32)


def page_table(tokens: int) -> I32:
    """Pages 0, 1, ... for one sequence: int32 [1, P]."""
    return i32(range(-(-tokens // KV_PAGE)))[None]


def run(
    backend: Backend,
    ids: Sequence[int],
    *,
    chunk: int | None = None,
    pages: I32 | None = None,
    start: int = 0,
    tap: Tap | None = None,
    stages: frozenset[str] | None = None,
) -> F32:
    """Run one sequence in chunks (None: all at once): logits float32 [len(ids), vocabulary].

    ``start`` is the first id's position; what comes before must have run on the same pages.
    """
    pages = page_table(start + len(ids)) if pages is None else pages
    step = chunk or len(ids)
    out = []
    for at in range(0, len(ids), step):
        part = ids[at : at + step]
        n = len(part)
        batch = Batch(
            tokens=i32(part),
            positions=i32(range(start + at, start + at + n)),
            sequence=np.zeros(n, np.int32),
            pages=pages,
            logit_rows=i32(range(n)),
        )
        out.append(backend.forward(batch, tap, stages))
    return np.concatenate(out)


class Experts:
    """A tap that keeps which experts each token took."""

    STAGES = frozenset({"moe_router_indices"})

    def __init__(self) -> None:
        self._layers: dict[int, list[I32]] = {}

    def __call__(self, _stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
        assert layer is not None
        self._layers.setdefault(layer, []).append(np.array(value, np.int32))

    @property
    def ids(self) -> I32:
        """[layers, T, k], most likely first."""
        return np.stack([np.concatenate(self._layers[i]) for i in sorted(self._layers)])


def same_bits(a: F32, b: F32) -> bool:
    """Equal shape and equal bit patterns: the sign of zero and a NaN's payload count."""
    return (
        a.dtype == b.dtype == np.float32
        and a.shape == b.shape
        and bool((a.view(np.uint32) == b.view(np.uint32)).all())
    )


def same_results(found: Results, expected: Results) -> None:
    """Fail where two passes gave other bits, or something that the other did not."""
    for name, value in field_values(expected).items():
        other = field_values(found)[name]
        assert (value is None) == (other is None), name
        if value is not None:
            assert (other.shape, other.dtype) == (value.shape, value.dtype), name
            assert other.tobytes() == value.tobytes(), name
