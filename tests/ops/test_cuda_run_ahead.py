"""Generations on CUDA, which begins with the next step by itself: each as alone on the CPU."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from isobit.backends.base import Batch, Following, Wanted
from isobit.backends.base.batch import field_values
from isobit.backends.base.draws import Draws
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.resident import RecurrentState, Resident, StoredWeights
from isobit.backends.cuda.steps.run_ahead import RunAhead
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.runtime import batches
from isobit.runtime.grammar import Grammar
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampling
from isobit.verify.faults import with_backend
from isobit.verify.receipt import Recorder
from tests.helpers.synth import Geometry, write_model
from tests.model.test_backend_protocol import draws_of
from tests.model.test_engine import same_as_alone

from .cuda_emulator import EmulatedGpu
from .cuda_support import open_gpu, sized

ENGINE = EngineConfig(context=192, max_sequences=4, chunk=64, threads=1)
SHAPE = Geometry(layers=1, experts=2, experts_used=1)


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
    """Passes that were not begun ahead of the host."""
    found, begin = [], RunAhead.begin
    monkeypatch.setattr(RunAhead, "begin", lambda *a: found.append(a[1]) or begin(*a))
    return found


KINDS = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_p=0.9, top_k=40, seed=-2),
    Sampling(temperature=1.3, min_p=0.02, seed=3),
    Sampling(temperature=1.0, repeat_penalty=1.1, frequency_penalty=0.3, seed=4),
    Sampling(presence_penalty=50.0, logit_bias=((9, 1000.0), (11, 960.0)), seed=5),
]


def test_generations_are_those_of_the_cpu(opened, path, begun, rng):
    """Of other lengths, settings and ends, over the end of a page; receipts and log-probabilities
    with them; some with nothing but the most likely."""
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


class OneOfThree:
    """A constraint: after a token three may come, which depend on all before, or it ends."""

    grammar, free, error = Grammar("three"), False, ""

    def __init__(self):
        self.state, self.asked = 1, []

    def fill(self, row):
        self.asked.append(self.state)
        row[:] = 0
        for i in range(3):
            token = 8 + (self.state * 31 + i * 97) % 312
            row[token // 32] |= np.uint32(1 << token % 32)

    def append(self, token):
        self.state = (self.state * 7 + token) % 1009


def test_penalties_and_grammars_go_ahead(opened, path, begun, rng):
    """Beside plain ones, whose tokens are chosen in the same passes; a grammar is asked once a
    token. The tokens are those that the CPU chooses."""
    held = (replace(k, grammar=OneOfThree.grammar) for k in (KINDS[0], KINDS[5]))
    kinds = [KINDS[1], KINDS[4], *held]
    prompts = [rng.integers(8, 320, 2 + n).tolist() for n in range(len(kinds))]
    with Model(path, "cpu", ENGINE) as alone, with_backend(alone, opened) as model:
        found = []
        for of in (alone, model):
            engine, before, started = of.generations, len(begun), []
            for n, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True)):
                held = OneOfThree() if kind.grammar is not None else None
                started.append((engine.submit(prompt, 4 + n % 3, kind, constraint=held), held))
            tokens = [[t.id for t in generation] for generation, _ in started]
            found.append((tokens, [held.asked for _, held in started if held is not None]))
        assert found[0] == found[1]
        assert [len(asked) for asked in found[1][1]] == [6, 4]
        assert len(begun) == before + 1


def test_cancelled_as_the_next_pass_is_laid_out(opened, path, rng, monkeypatch):
    """One that is to begin there keeps its pages until the pass is over: without them the next one
    would write where another's are."""
    with (
        Model(path, "cpu", ENGINE) as alone,
        with_backend(alone, opened) as model,
    ):
        engine = model.generations
        stays = engine.submit(rng.integers(8, 320, 70).tolist(), 9, KINDS[0], logprobs=1)
        for _ in range(3):
            engine.step()
        leaves = engine.submit(rng.integers(8, 320, 3).tolist(), 5, KINDS[0], logprobs=1)
        goes_on, cancelled = batches._goes_on, []

        def meanwhile(part):
            found = goes_on(part)
            if part[1] is leaves and not cancelled:
                cancelled.append(part)
                thread = threading.Thread(target=leaves.cancel)
                thread.start()
                thread.join()
            return found

        monkeypatch.setattr(batches, "_goes_on", meanwhile)
        tokens = list(stays)
        assert cancelled
        assert leaves.ended
        true = alone.generate(stays.request.prompt, max_tokens=9, logprobs=1)
        assert [t.id for t in tokens] == true.token_ids
        assert [t.logprob for t in tokens] == true.logprobs.tokens.tolist()


PAGES = np.array([[3, 0, 7], [1, 4, 2], [5, 6, 8]], np.int32)
LEAVES, COMES, SAYS, DRAWS, ROUTED = "leaves", "comes", "says another", "draws another", "routed"
AHEAD = (None, LEAVES, DRAWS)


class Talk:
    """Three sequences in passes: one is read in parts, one goes on with the most likely."""

    def __init__(self, rng):
        self.texts = [rng.integers(8, 320, n).tolist() for n in (2, 5, 15)]
        self.done, self.index, self.draws = [0, 0, 0], np.zeros(3, np.uint64), draws_of(rng, 3)
        self.here = [0, 1, 2]

    def parts(self, chunk):
        """Of a pass: sequence, first position, tokens, whether it gives the next."""
        for s in self.here:
            at, text = self.done[s], self.texts[s]
            tokens = text[at : at + chunk]
            yield s, at, tokens, at + len(tokens) == len(text)

    def after(self, parts, chunk):
        """Of the pass after one."""
        row = 0
        for s, at, tokens, gives in parts:
            row += gives
            end, text = at + len(tokens), self.texts[s]
            more = [-row] if gives else text[end : end + chunk]
            yield s, end, more, gives or end + len(more) == len(text)

    def wanted(self, parts, **more):
        """What is asked of a pass."""
        giving = np.array([s for s, _, _, gives in parts if gives], np.intp)
        rows = np.flatnonzero(giving != 1)
        if not len(rows):
            return Wanted(False, argmax=True, **more)
        of = giving[rows]
        columns = type(self.draws.columns)(*(a[of] for a in vars(self.draws.columns).values()))
        index = self.draws.index[of] + self.index[of]
        drawn = Draws(rows.astype(np.int32), columns, index, logprobs=True)
        return Wanted(False, argmax=True, drawn=drawn, **more)


def laid(parts):
    tokens, lengths = [t for _, _, t, _ in parts], [len(t) for _, _, t, _ in parts]
    ends = np.cumsum(lengths)
    return Batch(
        tokens=np.concatenate(tokens).astype(np.int32),
        positions=np.concatenate(
            [np.arange(at, at + len(t), dtype=np.int32) for _, at, t, _ in parts]
        ),
        sequence=np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
        pages=PAGES[[s for s, *_ in parts]],
        logit_rows=np.array([e - 1 for e, p in zip(ends, parts, strict=True) if p[3]], np.int32),
    )


def test_what_comes_may_be_another(opened, path, begun, rng):
    """A pass that was begun is taken for what it is: as it was told, or without some sequences; if
    other tokens or sequences come, that one runs. Each gives what it gives without it."""
    talk = Talk(rng)
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        ours, plain = (opened(weights, ENGINE) for _ in range(2))
    changes = [None, None, LEAVES, COMES, None, SAYS, None, DRAWS, None, ROUTED, None]
    changes += [LEAVES, None, None]  # now that all have a next token
    chunks = [5, *[2] * len(changes)]  # first more tokens than a graph takes
    for k, change in enumerate(changes):
        if change == SAYS:
            talk.texts[0][-1] ^= 1
        elif change == DRAWS:
            talk.index += np.uint64(5)
        elif change in (LEAVES, COMES):
            talk.here = [0, 2] if change == LEAVES else [2, 0, 1]
        parts, routed = list(talk.parts(chunks[k])), {"routes": k > 8}
        after = list(talk.after(parts, chunks[k + 1]))
        wanted = talk.wanted(parts, **routed)
        then = Following(laid(after), routes=k > 8)
        before = len(begun)
        found = ours.run(laid(parts), replace(wanted, following=then))
        assert (len(begun) == before) == (k > 0 and change in AHEAD), (k, change)
        expected = plain.run(laid(parts), wanted)
        for name, value in field_values(found).items():
            other = field_values(expected)[name]
            assert (value is None) == (other is None)
            assert value is None or value.tobytes() == other.tobytes(), (k, name)
        drawn = iter(() if found.drawn is None else found.drawn.tolist())
        for (s, at, tokens, gives), id in zip(parts, _rows(parts, found.argmax), strict=True):
            talk.done[s] = at + len(tokens)
            if gives:
                talk.texts[s].append(id if s == 1 else next(drawn))
                talk.index[s] += np.uint64(1)
    ours.close()
    plain.close()


def _rows(parts, argmax):
    """The most likely token after each part that gives one."""
    ids = iter(argmax.tolist())
    return [next(ids) if gives else None for *_, gives in parts]


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
    gpu, resident = EmulatedGpu(), Resident(64, StoredWeights())
    states = {"a": (5, np.arange(20)), "b": (300, np.arange(1200))}
    for name, (words, values) in states.items():
        address = gpu.allocate(4 * len(values))
        gpu.upload(address, values.astype(np.int32))
        resident.states[name] = RecurrentState(words, address)
    resident.copy_state(gpu, 3, 1)
    for name, (words, values) in states.items():
        found = np.empty(len(values), np.int32)
        gpu.download(resident.states[name].address, found)
        expected = values.reshape(4, words).copy()
        expected[1] = expected[3]
        assert found.tolist() == expected.ravel().tolist()
