"""A model split over emulated GPUs, which write to one another's memory."""

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from isobit.backends.base import HIDDEN, LOGITS, Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.parts import CudaPartsBackend
from isobit.backends.cuda.steps.programs import CaptureSizes
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.model.checkpoint import open_model
from isobit.model.weights import Weights
from tests.helpers.passes import same_results
from tests.helpers.synth import Geometry, write_model

from .cuda_emulator import EmulatedGpu
from .cuda_support import ragged

ENGINE = EngineConfig(context=128, max_sequences=2, chunk=6)
_ACTIVE = threading.local()
_EMULATOR = threading.Lock()


class OneOfSeveral(EmulatedGpu):
    """An emulated GPU that is used as the driver lets one be: by threads that have made it theirs.

    Kernels run one at a time, as each is a library with one state, but for those that exchange
    values: each part has its own of these. A kernel that was not known before a pass is refused.
    """

    loaded = False

    def __init__(self, seed: int, rank: int) -> None:
        super().__init__(seed)
        self.rank = rank
        self.known: set[tuple[object, ...]] = set()
        self.fails: Callable[[str], None] = lambda _: None

    def activate(self) -> None:
        _ACTIVE.gpu = self

    def _check(self) -> None:
        assert getattr(_ACTIVE, "gpu", None) is self, "another device is the thread's"

    def memory(self) -> tuple[int, int]:
        self._check()
        return super().memory()

    def allocate(self, nbytes: int) -> int:
        self._check()
        return super().allocate(nbytes)

    def upload(self, address: int, values: np.ndarray) -> None:
        self._check()
        super().upload(address, values)

    def download(self, address: int, out: np.ndarray) -> None:
        self._check()
        super().download(address, out)

    def launch(self, stem: str, kernel: str, *a: object, **k: object) -> None:
        self._check()
        key = kernel, tuple(sorted((k.get("defines") or {}).items()))
        if self._runs and self.loaded:
            assert key in self.known, f"{kernel} was not known before the pass"
            self.fails(kernel)
        self.known.add(key)
        if "BOUNDS" in (k.get("defines") or {}):
            self._copy = self.rank
            super().launch(stem, kernel, *a, **k)
            self._copy = None
        else:
            with _EMULATOR:
                super().launch(stem, kernel, *a, **k)

    def capture(self, queue: Callable[[], None]) -> object:
        runs, self._runs = self._runs, False
        queue()
        self._runs = runs
        return super().capture(queue)


def opened(w: Weights, parts: int, seed: int, planes: int = 2) -> CudaPartsBackend:
    gpus = [OneOfSeveral(seed + r, r) for r in range(parts)]
    engine = EngineConfig(**vars(ENGINE) | {"parts": parts, "activation_bits": 8 * planes})
    backend = CudaPartsBackend(w, engine, gpus)
    backend._flags[1] = 600_000  # ms: other tests run beside
    for gpu in gpus:
        gpu.loaded = True
    return backend


def batches(rng: np.random.Generator, vocab: int) -> list[Batch]:
    """A prompt of each of two sequences in several passes, steps of both, of few rows and padded,
    a step beside a prompt, steps of one."""
    pages = np.array([[1, 0], [2, 3]], np.int32)
    alone = pages[1:]
    return [
        ragged(rng, vocab, [(0, 7), (0, 2)], pages),
        ragged(rng, vocab, [(7, 1), (2, 1)], pages),
        ragged(rng, vocab, [(8, 1), (3, 1)], pages),
        ragged(rng, vocab, [(9, 1), (4, 2)], pages),
        ragged(rng, vocab, [(6, 1)], alone),
        ragged(rng, vocab, [(7, 1)], alone),
    ]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are passes, not mixed batches, which take up to 256 tokens."""
    monkeypatch.setattr(CudaBackend, "sizes", CaptureSizes(few=(), padded=(2, 4)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    geometry = Geometry(layers=2, heads=4, kv_heads=2, head_dim=64, experts=4, context=128)
    path = write_model(tmp_path_factory.mktemp("parts") / "m.gguf", geometry, seed=seed)
    return Weights.from_file(open_model(path))


@pytest.mark.parametrize(("parts", "planes"), [(2, 2), (3, 1)])
def test_bits_of_one(parts: int, planes: int, weights: Weights) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    whole = CpuBackend(weights, EngineConfig(**vars(ENGINE) | {"activation_bits": 8 * planes}))
    split = opened(weights, parts, seed, planes)
    rng = np.random.default_rng(seed)
    for batch in batches(rng, weights.config.vocab)[::3]:
        expected, shown = whole.forward(batch), {}
        got = split.forward(batch, lambda name, layer, v, s=shown: s.update({(name, layer): v}))
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
        assert shown
    prompt, *steps = batches(rng, weights.config.vocab)
    for batch in (prompt, prompt, prompt, *steps):  # what comes again becomes a graph
        expected = whole.forward(batch).view(np.uint32)
        assert np.array_equal(split.forward(batch).view(np.uint32), expected)
    for wanted in (
        HIDDEN,
        HIDDEN,
        replace(HIDDEN, top=2, digests=True),
        replace(HIDDEN, logits=True),
    ):
        same_results(split.run(prompt, wanted), whole.run(prompt, wanted))
    tokens = np.array([5], np.int32), np.array([6], np.int32), np.array([[2, 3]], np.int32)
    assert np.array_equal(split.greedy(*tokens, 3), whole.greedy(*tokens, 3))
    split.close()
    whole.close()


def test_a_device_that_fails_or_hangs_is_an_error(weights: Weights) -> None:
    batch = batches(np.random.default_rng(1), weights.config.vocab)[0]
    for hangs in (False, True):
        split = opened(weights, 2, 1)
        split.forward(batch)
        broken, go_on = split._gpus[1], threading.Event()

        def fails(kernel: str, hangs: bool = hangs, go_on: threading.Event = go_on) -> None:
            if kernel == "gather":
                if hangs:
                    go_on.wait(30)
                else:
                    raise BackendUnavailable("cuda: the device is lost")

        broken.fails = fails
        split._flags[1] = 200  # ms
        threading.Timer(1, go_on.set).start()
        said = "device 1 of 2 has not answered" if hangs else "the device is lost"
        with pytest.raises(BackendUnavailable, match=said):
            split.forward(batch)
        assert split.lost
        with pytest.raises(BackendUnavailable, match="load"):
            split.run(batch, LOGITS)
        split.close()
