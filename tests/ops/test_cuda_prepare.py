"""A device that was prepared compiles and captures nothing more, whatever comes."""

import numpy as np
import pytest

from isobit.backends.base import ARGMAX, LOGITS, Wanted
from isobit.backends.cuda import backend as backend_module
from isobit.backends.cuda.device import compile
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.runtime.model import sample_path
from tests.helpers.expected import needs
from tests.model.test_backend_protocol import draws_of

from .cuda_emulator import EmulatedGpu
from .cuda_support import ragged, sized
from .test_cuda_compile import HYBRID

ENGINE = EngineConfig(context=1024, max_sequences=20, chunk=192)


class Listener(EmulatedGpu):
    """Runs nothing, and knows what it was asked for."""

    multiprocessors = 132

    def __init__(self):
        super().__init__()
        self.kernels, self.captured = set(), 0

    def launch(self, stem, kernel, grid, arguments, *, defines=None, **_):  # noqa: ARG002
        self.kernels.add((stem, tuple(sorted((defines or {}).items()))))

    def capture(self, queue):
        self.captured += 1
        return super().capture(queue)


def compositions(rng, vocab):
    """Batches of all kinds, some twice: prompts, steps, both together, several tokens of some."""
    pages = rng.permutation(20 * 16).astype(np.int32).reshape(20, 16)
    for _ in range(60):
        n = int(rng.integers(1, 21))
        lengths = rng.choice((1, 1, 1, 2, 3, 17, 40, 190), n)
        while lengths.sum() > ENGINE.chunk:
            lengths = lengths[1:]
        if rng.random() < 0.4:
            lengths[:] = 1
        starts = rng.integers(0, ENGINE.context - lengths + 1)
        parts = list(zip(starts.tolist(), lengths.tolist(), strict=True))
        yield ragged(rng, vocab, parts, pages[: len(parts)])


@pytest.mark.parametrize("path", [sample_path(), HYBRID], ids=["sample", "states"])
def test_nothing_is_left_to_do(path, rng):
    gpu = Listener()
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        backend = sized((2, 3), (4, 8, 16, 24, 48))(weights, ENGINE, gpu)
        backend.prepare()
        known, captured = set(gpu.kernels), gpu.captured
        assert captured
        pages = np.arange(16, dtype=np.int32)[None]
        for start in (0, 192, 384):
            whole = ragged(rng, weights.config.vocab, [(start, ENGINE.chunk)], pages)
            backend.run(whole, ARGMAX)
        assert gpu.captured == captured
        gpu.may_wait = backend.padded != ()  # passes of recurrent states become graphs as they come
        batches = list(compositions(rng, weights.config.vocab))
        for batch in (*batches, *batches[::7]):
            rows = len(batch.logit_rows)
            draws = draws_of(rng, rows)
            measured = Wanted(False, top=3, drawn=draws, digests=True, hidden=rng.random() < 0.3)
            for wanted in (LOGITS, ARGMAX, measured):
                backend.run(batch, wanted)
        assert gpu.kernels == known
        assert gpu.captured == captured
        backend.prepare()
        assert gpu.captured == captured
        backend.close()


def test_there_are_programs_for_as_many_as_run():
    made = []
    with GGUFFile.open(sample_path()) as file:
        weights = Weights.from_file(file)
        for sequences in (1, 3, 4, 5):
            engine = EngineConfig(context=256, max_sequences=sequences, chunk=64)
            programs = sized((2, 3, 4), (4, 8))(weights, engine, Listener())._programs
            made.append((list(programs.rows), programs.many is not None))
    assert made == [([], False), ([2, 3], True), ([2, 3, 4], False), ([2, 3, 4], True)]


def test_kernels_are_compiled_by_processes(tmp_path, monkeypatch):
    needs("nvrtc", "cuda.bindings.nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels, told = {("ops/add", ()), ("ops/silu", ()), ("ops/nosuch", ())}, []
    with pytest.raises(OSError, match="nosuch"):
        compile.compile_all(kernels, "sm_90", lambda *_: None)
    kernels.remove(("ops/nosuch", ()))
    assert compile.compile_all(kernels, "sm_90", lambda *at: told.append(at)) == 2
    assert sorted(told) == [(1, 2), (2, 2)]
    assert len(list(tmp_path.rglob("*.cubin"))) == 2
    assert compile.compile_all(kernels, "sm_90", lambda *_: None) == 0


@pytest.mark.parametrize(("free", "order"), [(1 << 40, "weights beside there"), (0, "beside")])
def test_weights_are_on_their_way_before_anything_else(free, order, monkeypatch):
    """If they have room; what has none is planned, and refused."""
    seen = []

    class Small(Listener):
        def memory(self):
            return free, 1 << 40

        def bring(self, parts):
            seen.append("weights")
            wait = super().bring(parts)
            return lambda: (seen.append("there"), wait())

    programs = backend_module.Programs
    monkeypatch.setattr(
        backend_module, "Programs", lambda *a: seen.append("programs") or programs(*a)
    )
    with GGUFFile.open(sample_path()) as file:
        weights = Weights.from_file(file)
        how = {"gpu": Small(), "beside": lambda: seen.append("beside")}
        if free:
            sized()(weights, ENGINE, **how).close()
        else:
            with pytest.raises(BackendUnavailable, match="KV cache"):
                sized()(weights, ENGINE, **how)
    assert [each for each in seen if each != "programs"] == order.split()
    assert seen.index("programs") == order.split().index("beside") + 1
