"""A model split over emulated GPUs, which write to one another's memory."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from isobit.backends.base import HIDDEN, LOGITS, Backend, Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.parts import CudaPartsBackend
from isobit.backends.cuda.steps.programs import CaptureSizes
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.model.checkpoint import open_model
from isobit.model.parallel.split import split as cut
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
        self._knows(kernel, **k)
        if "BOUNDS" in (k.get("defines") or {}):
            self._copy = self.rank
            at_once = kernel == "decode_attn_out"  # any of its blocks may send what one waits for
            super().launch(stem, kernel, *a, **k | {"cooperative": at_once})
            self._copy = None
        else:
            with _EMULATOR:
                super().launch(stem, kernel, *a, **k)

    def _knows(self, kernel: str, defines: Mapping[str, str] | None = None, **_: object) -> None:
        key = kernel, tuple(sorted((defines or {}).items()))
        if self._runs and self.loaded:
            assert key in self.known, f"{key} was not known before the pass"
            self.fails(kernel)
        self.known.add(key)

    def capture(self, queue: Callable[[], None]) -> object:
        runs, self._runs = self._runs, False
        queue()
        self._runs = runs
        return super().capture(queue)


class Idle(OneOfSeveral):
    """Runs nothing, as a large device would."""

    multiprocessors = 132

    def launch(self, _: str, kernel: str, *__: object, **k: object) -> None:
        self._knows(kernel, **k)


def opened(
    w: Weights,
    parts: int,
    seed: int,
    planes: int = 2,
    chunk: int = ENGINE.chunk,
    warpgroups: bool = False,
    **shares: tuple[int, ...],
) -> CudaPartsBackend:
    gpus = [OneOfSeveral(seed + r, r) for r in range(parts)]
    for gpu in gpus:
        gpu.warpgroups = warpgroups
    engine = replace(ENGINE, parts=parts, activation_bits=8 * planes, chunk=chunk, **shares)
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
    geometry = Geometry(layers=2, heads=8, kv_heads=4, head_dim=128, experts=4, context=128)
    path = write_model(tmp_path_factory.mktemp("parts") / "m.gguf", geometry, seed=seed)
    return Weights.from_file(open_model(path))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def shown(backend: Backend, batch: Batch) -> dict[tuple[str, int | None], np.ndarray]:
    found = {}
    backend.forward(batch, lambda name, layer, v: found.update({(name, layer): v}))
    return found


def test_bits_of_one(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    monkeypatch.setattr(CudaBackend, "sizes", CaptureSizes(few=(2,), padded=(4,)))
    whole, split = CpuBackend(weights, ENGINE), opened(weights, 2, seed)
    prompt, *steps = batches(np.random.default_rng(seed), weights.config.vocab)
    for batch in (prompt, steps[-2]):
        expected, got = shown(whole, batch), shown(split, batch)
        assert ("post_attn_residual", 0) in got
        assert all(np.array_equal(v, expected[key]) for key, v in got.items())
    for batch in (prompt, prompt, prompt, *steps):  # what comes again becomes a graph
        assert same_bits(split.forward(batch), whole.forward(batch))
    wanted = HIDDEN, HIDDEN, replace(HIDDEN, top=2, digests=True), replace(HIDDEN, logits=True)
    for results in wanted:
        same_results(split.run(prompt, results), whole.run(prompt, results))
    split._passes = split._renewed_after  # numbers of exchanges begin anew
    assert same_bits(split.forward(steps[-1]), whole.forward(steps[-1]))
    assert split._passes == 0
    for slow in split._gpus:  # what is sent to it must wait until it is read
        slow.fails = lambda _: time.sleep(0.02)
        assert same_bits(split.forward(steps[-1]), whole.forward(steps[-1]))
        slow.fails = lambda _: None
    tokens = np.array([5], np.int32), np.array([8], np.int32), np.array([[2, 3]], np.int32)
    assert np.array_equal(split.greedy(*tokens, 3), whole.greedy(*tokens, 3))
    exchanging = {kernel for kernel, defines in split._gpus[0].known if "BOUNDS" in dict(defines)}
    assert {"decode_qkv", "decode_router", "batch_merge", "norm_quantise", "meet"} <= exchanging
    mirroring = {kernel for kernel, how in split._gpus[0].known if "MIRRORED" in dict(how)}
    assert {"attention", "batch_matmul", "combine"} <= mirroring
    split.close()
    whole.close()


@pytest.mark.parametrize("warpgroups", [False, True])
def test_prompts_on_tensor_cores(weights: Weights, warpgroups: bool) -> None:
    """Runs of many tokens, whose attention gives all parts what it makes."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    whole = CpuBackend(weights, ENGINE)
    split = opened(weights, 2, seed, chunk=32, warpgroups=warpgroups)
    rng, pages = np.random.default_rng(seed), np.array([[1, 0], [2, 3]], np.int32)
    for parts in ([(0, 28), (0, 4)], [(28, 28), (4, 4)]):
        batch = ragged(rng, weights.config.vocab, parts, pages)
        assert same_bits(split.forward(batch), whole.forward(batch))
    mirroring = {kernel for kernel, how in split._gpus[0].known if "MIRRORED" in dict(how)}
    assert ("attention_wgmma" if warpgroups else "attention_mma") in mirroring
    split.close()
    whole.close()


@pytest.mark.parametrize(("shares", "planes"), [((1, 2, 1), 1), ((1,) * 8, 2)])
def test_more_parts(
    shares: tuple[int, ...], planes: int, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, with uneven cuts (3) and with key-value heads that several parts have (8)."""
    monkeypatch.setattr(CudaBackend, "sizes", CaptureSizes(few=(), padded=(2,)))
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    engine = EngineConfig(**vars(ENGINE) | {"activation_bits": 8 * planes, "max_sequences": 1})
    whole = CpuBackend(weights, engine)
    split = opened(weights, len(shares), seed, planes, shares=shares)
    rng, pages = np.random.default_rng(seed), np.array([[1, 0]], np.int32)
    for position in range(2):
        batch = ragged(rng, weights.config.vocab, [(position, 1)], pages)
        assert same_bits(split.forward(batch), whole.forward(batch))
    split.close()
    whole.close()


@pytest.mark.parametrize(
    ("shares", "planes"), [((3, 1), 2), ((1, 2, 1), 1), ((1, 1, 1, 1), 2), ((1,) * 8, 1)]
)
def test_whole_experts(
    shares: tuple[int, ...], planes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt and steps of one and several rows; parts none of whose experts is chosen."""
    monkeypatch.setattr(CudaBackend, "sizes", CaptureSizes(few=(), padded=(2,)))
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    geometry = Geometry(layers=1, heads=8, kv_heads=4, experts=9, experts_used=3, context=128)
    w = Weights.from_file(open_model(write_model(tmp_path / "m.gguf", geometry, seed=seed)))
    whole = CpuBackend(w, replace(ENGINE, activation_bits=8 * planes))
    split = opened(w, len(shares), seed, planes, expert_shares=shares)
    steps = batches(np.random.default_rng(seed), w.config.vocab)
    for batch in (steps[0], *steps[1:3], *steps[4:]):
        assert same_bits(split.forward(batch), whole.forward(batch))
    expected, got = shown(whole, steps[0]), shown(split, steps[0])
    assert ("moe_expert_out", 0) in got
    assert all(np.array_equal(v, expected[key]) for key, v in got.items())
    split.close()
    whole.close()


@pytest.mark.parametrize("shares", [(), (3, 1)])
def test_passes_of_any_size_find_their_kernels(shares: tuple[int, ...], weights: Weights) -> None:
    """From those that padded batches are for up to a chunk."""
    engine = EngineConfig(context=640, max_sequences=2, chunk=320, parts=2, expert_shares=shares)
    gpus = [Idle(1, r) for r in range(2)]
    backend, rng = CudaPartsBackend(weights, engine, gpus), np.random.default_rng(1)
    for gpu in gpus:
        gpu.loaded = True
    pages = np.arange(20, dtype=np.int32).reshape(2, 10)
    for n in (*range(5, 80), *range(80, engine.chunk, 7)):
        for parts in ([(0, n)], [(n, n - 1), (9, 1)]):
            batch = ragged(rng, weights.config.vocab, parts, pages[: len(parts)])
            for rows in (batch.logit_rows[-1:], batch.logit_rows):
                backend.run(replace(batch, logit_rows=rows), LOGITS)
    backend.close()


class Noting(EmulatedGpu):
    """Runs nothing; notes what would be launched on a large device."""

    multiprocessors = 132

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[str, list[int]]] = []

    def launch(self, _: str, kernel: str, __: object, arguments: list[int], **___: object) -> None:
        self.launched.append((kernel, [*arguments]))

    def left_out(self, parts: int) -> set[tuple[int, int]]:
        """The exchanges of a pass that no kernel of it names. A kernel has them behind their table,
        the one that begins a pass says how many there are."""
        out = set()
        for count, sites in (of for kernel, of in self.launched if kernel == "exchanges"):
            table = count - 8 * (parts + 3)
            named = {s for _, of in self.launched if table in of for s in of[of.index(table) + 1 :]}
            out |= {(table, site) for site in range(sites) if site not in named}
        return out


@pytest.mark.parametrize("shares", [(), (1, 3)])
def test_no_pass_leaves_out_an_exchange(
    shares: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its size: steps, padded batches and prompts."""
    monkeypatch.setattr(CudaBackend, "sizes", CaptureSizes())
    geometry = Geometry(hidden=512, heads=16, kv_heads=4, head_dim=128, ffn=512)
    w = Weights.from_file(open_model(write_model(tmp_path / "m.gguf", geometry)))
    part = Weights(w.config, cut(w.graph, 0, 2, expert_shares=shares).graph)
    gpu = Noting()
    engine = EngineConfig(context=512, max_sequences=512, pages=8, chunk=512)
    backend, seen = CudaBackend(part, engine, gpu), 0
    at, pages = np.arange(512, dtype=np.int32), np.arange(8, dtype=np.int32)[None]
    tokens = at % w.config.vocab
    prompts = [Batch(tokens[:n], at[:n], 0 * at[:n], pages, at[n - 1 : n]) for n in (260, 512)]
    passes = [partial(backend.forward, b) for b in prompts]
    captures = backend._programs.captures()
    for run in (*passes, *(graphs.queue(key) for graphs in captures for key in graphs.keys)):
        gpu.launched = []
        run()
        assert not gpu.left_out(2)
        seen += any(kernel == "exchanges" for kernel, _ in gpu.launched)
    assert seen > 30
    backend.close()


@pytest.mark.parametrize(("at", "kernel"), [(0, "meet"), (4, "decode_down")])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_device_that_fails_or_hangs_is_an_error(
    at: int, kernel: str, hangs: bool, weights: Weights
) -> None:
    """In a prompt, and within a step, where kernels wait for what others send."""
    batch = batches(np.random.default_rng(1), weights.config.vocab)[at]
    split = opened(weights, 2, 1)
    split.forward(batch)

    def fails(launched: str) -> None:
        if launched == kernel:
            if not hangs:
                raise BackendUnavailable("cuda: the device is lost")
            until = time.monotonic() + 60
            while not split._flags[0] and time.monotonic() < until:
                time.sleep(0.01)

    split._gpus[1].fails = fails
    split._flags[1] = 500  # ms
    said = "device 1 of 2 has not answered" if hangs else "the device is lost"
    with pytest.raises(BackendUnavailable, match=said):
        split.forward(batch)
    assert split.lost
    with pytest.raises(BackendUnavailable, match="load"):
        split.run(batch, LOGITS)
    split.close()
