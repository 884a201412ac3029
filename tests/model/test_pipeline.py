"""A model whose layers run in stages gives the whole model's bits, wherever it is cut."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Listener
from pathlib import Path

import numpy as np
import pytest

import isobit
from isobit.backends.base import HIDDEN, Backend, Batch, Results, Wanted
from isobit.backends.cpu import CpuBackend
from isobit.backends.distributed import remote
from isobit.backends.distributed.pipeline import LocalStage, PipelineBackend
from isobit.backends.distributed.remote import connect
from isobit.backends.reference import ReferenceBackend
from isobit.backends.wgpu import WgpuBackend
from isobit.cli import main
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, CacheLost, UsageError
from isobit.model.checkpoint import open_model
from isobit.model.parallel.layers import layers
from isobit.model.weights import Weights
from isobit.runtime.model import sample_path
from isobit.verify.receipt import Recorder, replay
from tests.helpers.passes import same_results
from tests.ops.wgpu_support import open_device

HYBRID = Path(__file__).parents[1] / "data" / "pyhybrid-moe-34m-Q4_K_M.gguf"
ENGINE = EngineConfig(context=256, max_sequences=2, threads=1)


def of_file(path: Path) -> Weights:
    return Weights.from_file(open_model(path))


def on_wgpu(weights: Weights, engine: EngineConfig) -> Backend:
    return WgpuBackend(weights, engine, device=open_device())


def batches(rng: np.random.Generator, vocab: int, n: tuple[int, int]) -> list[Batch]:
    """Two sequences: prefilled together with rows asked for out of order, then a step of both."""
    ids = rng.integers(0, vocab, sum(n) + 2).astype(np.int32)
    pages = np.array([[3, 1], [0, 2]], np.int32)
    states = np.array([1, 0], np.int32)
    first = Batch(
        ids[: sum(n)],
        np.array([*range(n[0]), *range(n[1])], np.int32),
        np.array([0] * n[0] + [1] * n[1], np.int32),
        pages,
        np.array([sum(n) - 1, 0, n[0] - 1, 40, 40], np.int32),
        states,
    )
    each = np.arange(2, dtype=np.int32)
    return [first, Batch(ids[sum(n) :], np.array(n, np.int32), each, pages, each, states)]


def logits(backend: Backend, vocab: int, seed: int, n: tuple[int, int] = (90, 41)) -> np.ndarray:
    found = [backend.forward(b) for b in batches(np.random.default_rng(seed), vocab, n)]
    backend.close()
    return np.concatenate(found).view(np.uint32)


@pytest.mark.parametrize("path", [sample_path(), HYBRID], ids=["sample", "hybrid"])
def test_every_cut(path: Path) -> None:
    """In two stages, at each layer; the backends take turns."""
    w = of_file(path)
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    whole = logits(CpuBackend(w, ENGINE), w.config.vocab, seed)
    n = w.graph.n_layers
    for at in range(1, n):
        stages = [LocalStage(CpuBackend, w, ENGINE, cut) for cut in ((0, at), (at, n))]
        cut = logits(PipelineBackend(w, ENGINE, stages), w.config.vocab, seed)
        assert np.array_equal(cut, whole), f"cut at {at}"


def test_stages_of_different_backends() -> None:
    w = of_file(HYBRID)
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    few = 50, 14  # the reference is slow, and these are two parts of a batch already
    whole = logits(CpuBackend(w, ENGINE), w.config.vocab, seed, few)
    n = w.graph.n_layers
    makes = [(on_wgpu, (0, 3)), (ReferenceBackend, (3, 4)), (CpuBackend, (4, n - 1))]
    stages = [LocalStage(make, w, ENGINE, cut) for make, cut in [*makes, (on_wgpu, (n - 1, n))]]
    cut = logits(PipelineBackend(w, ENGINE, stages), w.config.vocab, seed, few)
    assert np.array_equal(cut, whole)


def test_traced_stages_are_those_of_the_whole() -> None:
    w = of_file(HYBRID)
    batch = batches(np.random.default_rng(1), w.config.vocab, (90, 41))[0]
    shown: list[dict] = []
    stages = [LocalStage(CpuBackend, w, ENGINE, cut) for cut in ((0, 2), (2, w.graph.n_layers))]
    for backend in (CpuBackend(w, ENGINE), PipelineBackend(w, ENGINE, stages)):
        found: dict = {}
        backend.forward(batch, lambda name, layer, x, found=found: found.update({(name, layer): x}))
        shown.append(found)
    assert list(shown[0]) == list(shown[1])
    for key, value in shown[0].items():
        assert np.array_equal(value, shown[1][key]), key


def check_results(spread: Backend, whole: Backend, rng: np.random.Generator) -> None:
    """Of a batch that runs in several parts, and of a step."""
    vocab = whole.limits.vocabulary
    for batch in batches(rng, vocab, (90, 41)):
        rows = len(batch.logit_rows)
        given = rng.integers(0, vocab, (rows, 3)).astype(np.int32)
        some = rng.integers(0, rows, 3).astype(np.int32)
        more = {"argmax": True, "top": 4, "given": given, "digests": True, "routes": True}
        every = Wanted(some, hidden=True, **more)
        for wanted in (every, Wanted(**more), Wanted(False, top=2), HIDDEN):
            same_results(spread.run(batch, wanted), whole.run(batch, wanted))


def test_results_are_made_where_the_last_stage_runs(rng: np.random.Generator) -> None:
    w = of_file(HYBRID)
    whole, n = CpuBackend(w, ENGINE), w.graph.n_layers
    spread = PipelineBackend(
        w, ENGINE, [LocalStage(CpuBackend, w, ENGINE, c) for c in ((0, 2), (2, n))]
    )
    check_results(spread, whole, rng)
    spread.close()
    whole.close()


def test_a_pipeline_says_what_its_stages_leave_out() -> None:
    class Fused(CpuBackend):
        fused_away = frozenset({("attn_norm", 1)})

    w = of_file(HYBRID)
    n = w.graph.n_layers
    stages = [LocalStage(Fused, w, ENGINE, (0, 2)), LocalStage(CpuBackend, w, ENGINE, (2, n))]
    assert PipelineBackend(w, ENGINE, stages).fused_away == Fused.fused_away


class Forgetful:
    """A stage that dies before some of its passes, and comes back with an empty cache."""

    def __init__(self, w: Weights, engine: EngineConfig, deaths: list[int]) -> None:
        self._new = lambda: LocalStage(CpuBackend, w, engine, (0, w.graph.n_layers))
        self._stage = self._new()
        self.about = self._stage.about
        self.deaths = deaths

    def run(
        self, batch: Batch, wanted: Wanted, stages: frozenset[str] | None
    ) -> tuple[Results, dict]:
        self.deaths[:] = [n - 1 for n in self.deaths]
        if 0 in self.deaths:
            self._stage.close()
            self._stage = self._new()
            raise CacheLost("died")
        return self._stage.run(batch, wanted, stages)

    def close(self) -> None:
        self._stage.close()


@pytest.mark.parametrize("path", [sample_path(), HYBRID], ids=["sample", "hybrid"])
def test_what_ran_when_a_cache_was_lost_runs_again(
    path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Forgetful] = []

    def connect(*_: object) -> Forgetful:
        engine = EngineConfig(context=512, max_sequences=4, threads=1)
        made.append(Forgetful(of_file(path), engine, []))
        return made[0]

    monkeypatch.setattr(remote, "connect", connect)
    prompts = [rng.integers(0, 1000, n).tolist() for n in (150, 30)]
    asked: dict = {"max_tokens": 20, "seed": 1, "temperature": 1.0, "logprobs": 2}
    with (
        isobit.load(path, backend="cpu", context=512, threads=1) as here,
        isobit.load(path, context=512, stages=["elsewhere:1"], chunk=64) as model,
    ):
        made[0].deaths += sorted(rng.integers(1, 20, 3).tolist())
        print(made[0].deaths)
        found = []
        for m in (here, model):
            watches = [Recorder() for _ in prompts]
            streams = [m.stream(p, watch=w, **asked) for p, w in zip(prompts, watches, strict=True)]
            for stream in streams:
                stream.begin(wait=False)
            scores = m.score(prompts)
            texts = [(s.text, s.logprobs) for s in (stream.complete() for stream in streams)]
            receipts = [w.receipt().tokens for w in watches]
            found.append((scores, texts, receipts))
        assert model.backend.losses >= 1
        for a, b in zip(found[0][0], found[1][0], strict=True):
            assert np.array_equal(a, b)
        assert repr(found[0][1:]) == repr(found[1][1:])
        model.generations.scheduler.blocks.check([])
        made[0].deaths += [1]
        tap = Watching()
        with pytest.raises(CacheLost, match="begin again"):
            model.generate(prompts[0], max_tokens=2, watch=tap)
        made[0].deaths += range(1, 9)  # a pass is of two parts
        with pytest.raises(BackendUnavailable, match="died, 4 times in turn"):
            model.generate(prompts[0], max_tokens=2)


def test_a_pipeline_is_verified_and_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(*_: object) -> LocalStage:
        return LocalStage(CpuBackend, of_file(sample_path()), ENGINE, (0, 8))

    monkeypatch.setattr(remote, "connect", connect)
    monkeypatch.setenv("ISOBIT_STAGE_KEY", "k")
    spread = ["--hosts", "elsewhere:1", "--backend", "auto"]
    assert main(["verify", *spread, "--against", "cpu", "-p", "import os, sys"]) == 0
    assert "pipeline" in capsys.readouterr().out
    receipt = str(tmp_path / "r.json")
    assert main(["run", "-p", "import", "-n", "3", "--backend", "cpu", "--receipt", receipt]) == 0
    assert main(["replay", receipt, *spread]) == 0
    assert "identical: 3 tokens on pipeline" in capsys.readouterr().out


class Watching:
    stages = frozenset({"attn_norm"})

    def begin(self, *_: object) -> None:
        pass

    def tap(self, *_: object) -> None:
        pass

    routed = chose = tap


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        ([(0, 2)], "up to 8, got them up to 2"),
        ([(0, 2), (3, 8)], "expected layers from 2 of 8 on, got 3:8"),
        ([(2, 8), (0, 2)], "expected layers from 0 of 8 on, got 2:8"),
    ],
)
def test_stages_must_be_the_model(cuts: list[tuple[int, int]], said: str) -> None:
    w = of_file(sample_path())
    with pytest.raises(UsageError, match=said):
        PipelineBackend(w, ENGINE, [LocalStage(CpuBackend, w, ENGINE, cut) for cut in cuts])
    other = LocalStage(CpuBackend, w, EngineConfig(activation_bits=8, context=64), (0, 8))
    with pytest.raises(UsageError, match="activation_bits: expected 16, got 8"):
        PipelineBackend(w, ENGINE, [other])
    for wrong in ((0, 0), (3, 2), (0, 9), (-1, 2)):
        with pytest.raises(UsageError, match="layers: expected a range within 0:8"):
            layers(w.graph, *wrong)


@contextmanager
def stage(cut: str, key: str = "secret") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``isobit stage`` in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "isobit", "stage", "--layers", cut, "-c", "256", "-t", "1"]
        + ["--chunk", "64", "--cache", "1024"]
        + ["--backend", "cpu"],
        env=os.environ | {"ISOBIT_STAGE_KEY": key},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"layers {cut} on cpu" in line, line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("greeting", "found"),
    [
        ({"activation_planes": 2, "first": 0}, "none"),
        ({"protocol": 1}, "1"),
        ({"protocol": 3}, "3"),
    ],
)
def test_a_stage_of_another_version_is_refused(greeting: dict, found: str) -> None:
    with Listener(("127.0.0.1", 0), authkey=b"k") as listener, ThreadPoolExecutor(1) as worker:

        def greet() -> None:
            with listener.accept() as connection:
                connection.send_bytes(json.dumps(greeting).encode())
                with pytest.raises(EOFError):
                    connection.recv_bytes()

        gone = worker.submit(greet)
        host, port = listener.address
        said = f"stage {host}:{port}: expected protocol 2, got {found}; start it with the isobit"
        with pytest.raises(BackendUnavailable, match=re.escape(said)):
            connect(f"{host}:{port}", b"k")
        gone.result(10)


def test_processes_give_the_same_text_results_and_errors(rng: np.random.Generator) -> None:
    with stage("0:5") as (_, first), stage("5:8") as (process, second):
        stages = [first, second]
        alone, one = connect(first, b"secret"), np.zeros(1, np.int32)
        for wrong, said in (({"top": "x"}, "top: .*got 'x'"), ({"logits": None}, "got None")):
            with pytest.raises(BackendUnavailable, match=said):
                alone.run(Batch(one, one, one, one[None], one), replace(HIDDEN, **wrong), None)
        assert alone.about.pages == 1024 // 64
        alone.close()
        with isobit.load("sample", context=256, stages=stages, stage_key=b"secret") as model:
            assert "layers 0:5 on cpu" in model.backend.device
            recorder = Recorder()
            said = model.generate("def add(a, b):", max_tokens=12, watch=recorder)
            with isobit.load("sample", backend="cpu", context=256) as here:
                assert here.generate("def add(a, b):", max_tokens=12).text == said.text
                assert replay(recorder.receipt(), here) is None
                check_results(model.backend, here.backend, rng)
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(BackendUnavailable, match=f"stage {second}: the connection"):
                model.generate("def", max_tokens=2)
        with pytest.raises(BackendUnavailable, match="expected the key"):
            isobit.load("sample", stages=[first], stage_key=b"other")
        with pytest.raises(UsageError, match="up to 8, got them up to 5"):
            isobit.load("sample", stages=[first], stage_key=b"secret")
    with pytest.raises(BackendUnavailable, match="cannot connect"):
        isobit.load("sample", stages=[first], stage_key=b"secret")
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        isobit.load("sample", stages=["x"], stage_key=b"secret")
