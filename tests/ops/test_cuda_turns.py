"""Generations on CUDA, which begins with the next step by itself: each as alone on the CPU."""

from dataclasses import replace

import numpy as np
import pytest

from isobit.backends.base import Batch, Wanted
from isobit.backends.base.draws import Draws
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.resident import Resident, State
from isobit.backends.cuda.turns import Turns
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampling
from isobit.verify.faults import with_backend
from isobit.verify.receipt import Recorder
from tests.helpers.synth import Geometry, write_model
from tests.model.test_backend_protocol import draws_of
from tests.model.test_engine import same_as_alone

from .cuda_emulator import EmulatedGpu
from .cuda_support import open_gpu, ragged, sized

ENGINE = EngineConfig(context=192, max_sequences=4, chunk=64, threads=1)
SHAPE = Geometry(layers=1, experts=2, experts_used=1)
LIKELIEST = Wanted(logits=False, likeliest=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", SHAPE, seed=3)


@pytest.fixture(params=["emulated", "cuda"])
def opened(request):
    """Makes a backend of weights and settings."""

    def make(weights, engine):
        gpu, kind = open_gpu(request.param), CudaBackend
        if request.param == "emulated":
            gpu.multiprocessors = 1  # which is what takes its time
            kind = sized(padded=(4,))
        return kind(weights, engine, gpu)

    return make


@pytest.fixture
def begun(monkeypatch):
    """Turns that had to be begun by the host."""
    found, begin = [], Turns._begin
    monkeypatch.setattr(Turns, "_begin", lambda *a: found.append(a[2]) or begin(*a))
    return found


KINDS = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_p=0.9, top_k=40, seed=-2),
    Sampling(temperature=1.3, min_p=0.02, seed=3),
    Sampling(temperature=1.0, repeat_penalty=1.1, seed=4),
]


def test_generations_are_those_of_the_cpu(opened, path, begun, rng):
    """Of other lengths, settings and ends, over the end of a page; receipts and log-probabilities
    with them; some with nothing but the likeliest."""
    with (
        Model(path, "cpu", ENGINE) as alone,
        with_backend(alone, opened) as model,
    ):
        engine = model.generations
        for plain in (True, False):
            started = []
            for n, sampling in enumerate([KINDS[0]] * 3 if plain else KINDS):
                prompt = rng.integers(8, 320, 1 + n).tolist()
                recorder = Recorder()
                more = {} if plain and n else {"logprobs": 3, "watch": recorder}
                started.append((engine.submit(prompt, 7 - n, sampling, **more), recorder))
                engine.step()  # others come while these run
            for generation, recorder in started:
                tokens = list(generation)
                if generation.logprobs is not None:
                    same_as_alone(alone, generation, tokens, recorder)
                else:
                    done = alone.generate(generation.request.prompt, max_tokens=len(tokens))
                    assert [t.id for t in tokens] == done.token_ids
        one, before = engine.submit(rng.integers(8, 320, 61).tolist(), 6, KINDS[2]), len(begun)
        tokens = [t.id for t in one]
        assert len(begun) == before + 1  # all others went ahead
        again = alone.generate(
            one.request.prompt, max_tokens=6, temperature=0.7, top_p=0.9, top_k=40, seed=-2
        )
        assert tokens == again.token_ids


def test_what_comes_may_be_another(opened, path, monkeypatch, rng):
    """A step that was begun is taken for what it is: fewer rows, other tokens, settings or pages,
    or beside a prompt, each gives what it gives without it."""
    composed, compose = [], CudaBackend._compose
    monkeypatch.setattr(CudaBackend, "_compose", lambda *a: composed.append(a[1]) or compose(*a))
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        ours, plain = (opened(weights, ENGINE) for _ in range(2))
        pages = np.array([[3, 0, 7], [1, 4, 2], [5, 6, 8]], np.int32)
        prompt = ragged(rng, 320, [(0, 2), (0, 1), (0, 3)], pages)
        asked = draws_of(rng, 3)

        def same(batch, wanted):
            found = ours.run(batch, replace(wanted, ahead=True))
            expected = plain.run(batch, wanted)
            for name, value in vars(found).items():
                other = vars(expected)[name]
                assert (value is None) == (other is None)
                assert value is None or value.tobytes() == other.tobytes(), name
            return found.drawn if wanted.drawn is not None else found.likeliest

        def turn(rows, tokens, at, draws):
            each = np.arange(len(rows), dtype=np.int32)
            batch = Batch(tokens.astype(np.int32), at[rows], each, pages[rows], each)
            return same(batch, LIKELIEST if draws is None else Wanted(False, drawn=draws))

        def of(rows, step, **more):
            columns = type(asked.columns)(*(a[rows] for a in vars(asked.columns).values()))
            each = np.arange(len(rows), dtype=np.int32)
            index = asked.index[rows] + np.uint64(step)
            return Draws(
                **{"rows": each, "columns": columns, "index": index, "logprobs": True, **more}
            )

        for draws in (lambda *_: None, of):
            at = np.array([2, 1, 3], np.int32)
            every, some = np.arange(3), np.array([0, 2])
            same(prompt, LIKELIEST)
            tokens = turn(every, rng.integers(8, 320, 3), at, draws(every, 0))
            tokens = turn(some, tokens[some], at + 1, draws(some, 1))
            tokens = turn(some, tokens, at + 2, draws(some, 2))
            wanted = Wanted(False, likeliest=True, digests=True, routes=True)
            for step in (3, 4):  # the same with a receipt, then beside a prompt
                drawn = draws(np.array([2, 0, 1]), step)
                batch = Batch(
                    tokens=np.array([tokens[0], 50, 60, tokens[1]], np.int32),
                    positions=np.array([at[0] + step, 0, 1, at[2] + step], np.int32),
                    sequence=np.array([0, 1, 1, 2], np.int32),
                    pages=pages,
                    logit_rows=np.array([3, 0, 2], np.int32),
                )
                if step == 3:
                    drawn, keep = draws(some, step), [0, 3]
                    batch = Batch(
                        *(a[keep] for a in (batch.tokens, batch.positions)),
                        np.arange(2, dtype=np.int32),
                        pages[some],
                        np.arange(2, dtype=np.int32),
                    )
                tokens = same(batch, replace(wanted, drawn=drawn))
            assert len(composed.pop().tokens) == 2
            tokens = turn(some, tokens[[1, 0]], at + 5, draws(some, 5))
            tokens = turn(some, (tokens + 1) % 300, at + 6, draws(some, 6))
            turn(some[:1], tokens[:1], at + 7, draws(some[:1], 9))
        assert not composed
        ours.close()
        plain.close()


class Noting(EmulatedGpu):
    """Runs nothing; notes what is launched, and the bytes that come to the host."""

    def __init__(self):
        super().__init__()
        self.launched, self.downloaded = [], []

    def launch(self, stem, kernel, grid, arguments, *, overlap=False, **_):  # noqa: ARG002
        self.launched.append((kernel, overlap))

    def download(self, address, out):
        self.downloaded.append(out.nbytes)
        super().download(address, out)


def test_launches_of_steps_overlap_and_little_comes_back(path):
    """Those that quantise for a product of many rows, too; of steps of n sequences come as many ids
    as are asked for."""
    with GGUFFile.open(path) as file:
        gpu = Noting()
        backend = sized()(Weights.from_file(file), ENGINE, gpu)
        pages, each = np.arange(9, dtype=np.int32).reshape(3, 3), np.arange(3, dtype=np.int32)
        gpu.launched, gpu.downloaded = [], []
        backend.greedy(each + 8, each + 2, pages, 5)
        assert gpu.downloaded == [4 * 3 * 5]
        kernels = {kernel for kernel, _ in gpu.launched}
        assert {"norm_quantise", "batch_matmul", "next_token"} <= kernels
        assert all(overlap for _, overlap in gpu.launched)
        backend.close()


def test_states_are_copied_on_the_device():
    """Of every operation the one state, and no other."""
    gpu, resident = EmulatedGpu(), Resident(64)
    states = {"a": (5, np.arange(20)), "b": (300, np.arange(1200))}
    for name, (words, values) in states.items():
        address = gpu.allocate(4 * len(values))
        gpu.upload(address, values.astype(np.int32))
        resident.states[name] = State(words, address)
    resident.copy_state(gpu, 3, 1)
    for name, (words, values) in states.items():
        found = np.empty(len(values), np.int32)
        gpu.download(resident.states[name].address, found)
        expected = values.reshape(4, words).copy()
        expected[1] = expected[3]
        assert found.tolist() == expected.ravel().tolist()
