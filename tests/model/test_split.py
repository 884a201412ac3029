"""A model split over parts gives the whole model's bits, wherever it is cut."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isobit.backends.base import HIDDEN, Batch, Wanted
from isobit.backends.cpu import CpuBackend
from isobit.backends.distributed import parts
from isobit.backends.distributed.parts import PartsBackend
from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, UsageError
from isobit.gguf.formats import F32
from isobit.model.architectures import qwen35
from isobit.model.checkpoint import open_model
from isobit.model.parallel.cuts import bounds
from isobit.model.parallel.split import split
from isobit.model.weights import Weights
from isobit.numerics import Weight
from isobit.runtime.model import sample_path
from tests.helpers.geometries import AnyTensors
from tests.helpers.passes import same_results
from tests.helpers.synth import Geometry, write_model

HYBRID = Path(__file__).parents[1] / "data" / "pyhybrid-moe-34m-Q4_K_M.gguf"
ENGINE = EngineConfig(context=64, max_sequences=2, threads=2)


class Meeting:
    """Threads that give their part of a value and get every part's."""

    def __init__(self, parts: int) -> None:
        self.barrier = threading.Barrier(parts)
        self.given: list[np.ndarray] = [np.empty(0)] * parts

    def exchange(self, rank: int):
        def give(x: np.ndarray) -> list[np.ndarray]:
            self.given[rank] = x
            self.barrier.wait(60)
            every = list(self.given)
            self.barrier.wait(60)
            return every

        return give


def passes(backends: list, vocab: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Two sequences prefilled, then decoded together, on every part: each part's logits."""
    ids = rng.integers(0, vocab, 24).astype(np.int32)
    pages = np.array([[0], [1]], np.int32)

    def batch(tokens, positions, sequence):
        arrays = [np.array(x, np.int32) for x in (tokens, positions, sequence)]
        rows = np.arange(len(tokens), dtype=np.int32)
        return Batch(*arrays, pages, rows, np.array([0, 1], np.int32))

    batches = [
        batch(ids[:20], [*range(13), *range(7)], [0] * 13 + [1] * 7),
        batch(ids[20:22], [13, 7], [0, 1]),
        batch(ids[22:], [14, 8], [0, 1]),
    ]
    out: list = [None] * len(backends)

    def run(rank: int) -> None:
        out[rank] = np.concatenate([backends[rank].forward(b) for b in batches])

    threads = [threading.Thread(target=run, args=(r,)) for r in range(len(backends))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(300)
    return out


def of_file(path: Path) -> Weights:
    return Weights.from_file(open_model(path))


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


@pytest.mark.parametrize(
    ("geometry", "parts"),
    [
        (Geometry(), 2),
        (Geometry(heads=12, kv_heads=3), 2),  # shares that are uneven
        (Geometry(heads=8, kv_heads=2), 3),  # a key-value head that two parts have
        (Geometry(experts=0, heads=8, kv_heads=2, ffn=512), 8),  # one query head each
        (Geometry(heads=8, experts_used=3), 8),
    ],
)
@pytest.mark.parametrize("uneven", ["", "shares", "expert_shares"])
def test_reference_parts(geometry: Geometry, parts: int, uneven: str, tmp_path: Path) -> None:
    """The specification run on every part; each ends with the whole logits."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    w = of_file(write_model(tmp_path / "m.gguf", geometry, seed=seed))
    (whole,) = passes([ReferenceBackend(w, ENGINE)], w.config.vocab, np.random.default_rng(seed))
    meeting = Meeting(parts)
    backends = []
    for rank in range(parts):
        shares = range(1, parts + 1) if parts < 8 else (1,) * parts
        how = {uneven: shares} if uneven else {}
        graph = split(w.graph, rank, parts, **how).graph
        assert sum(x.data.nbytes for x in graph.weights.values()) < 0.8 * sum(
            x.data.nbytes for x in w.graph.weights.values()
        )
        mine = Weights(w.config, graph)
        backends.append(ReferenceBackend(mine, ENGINE, exchange=meeting.exchange(rank)))
    for logits in passes(backends, w.config.vocab, np.random.default_rng(seed)):
        assert np.array_equal(bits(logits), bits(whole))


@pytest.mark.parametrize(
    ("path", "parts", "expert_shares", "shares"),
    [
        (sample_path(), 2, (), (3, 1)),
        (sample_path(), 3, (1, 2, 5), ()),
        (sample_path(), 4, (), ()),
        (None, 8, (), (1, 2, 3, 4, 4, 3, 2, 1)),
        (None, 8, (1,) * 8, ()),
        (HYBRID, 2, (3, 1), (1, 3)),
        (HYBRID, 3, (), ()),
        (HYBRID, 4, (1, 1, 1, 1), ()),
    ],
)
def test_processes(
    path: Path | None,
    parts: int,
    expert_shares: tuple[int, ...],
    shares: tuple[int, ...],
    tmp_path: Path,
) -> None:
    """Columns of every expert, or whole ones; in these proportions."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    geometry = Geometry(heads=8, experts_used=3)
    w = of_file(path or write_model(tmp_path / "m.gguf", geometry, seed=seed))
    outs = []
    split_engine = replace(ENGINE, parts=parts, expert_shares=expert_shares, shares=shares)
    for backend in (CpuBackend(w, ENGINE), PartsBackend(w, split_engine)):
        outs.append(passes([backend], w.config.vocab, np.random.default_rng(seed))[0])
        backend.close()
    assert np.array_equal(bits(outs[0]), bits(outs[1]))


def test_results_of_parts(rng: np.random.Generator) -> None:
    w = of_file(HYBRID)
    ids, each = rng.integers(0, w.config.vocab, 9).astype(np.int32), np.arange(9, dtype=np.int32)
    batch = Batch(ids, each, 0 * each, np.zeros((1, 1), np.int32), each[[8, 3]])
    given = rng.integers(0, w.config.vocab, (2, 2)).astype(np.int32)
    every = Wanted(True, True, 3, given, hidden=True, digests=True, routes=True)
    several = replace(ENGINE, parts=2)
    with closing(CpuBackend(w, ENGINE)) as one, closing(PartsBackend(w, several)) as parts:
        for wanted in (every, HIDDEN, replace(HIDDEN, routes=True), Wanted(False, top=2)):
            same_results(parts.run(batch, wanted), one.run(batch, wanted))


@pytest.mark.parametrize(
    ("parts", "shares"), [(1, (1,)), (2, ()), (3, (1, 5, 2)), (4, ()), (4, (1, 1, 1, 1))]
)
def test_a_delta_net_in_parts(parts: int, shares: tuple[int, ...]) -> None:
    """Key heads with their value heads, uneven shares, a key head that two parts have."""
    w = of_file(HYBRID)
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    (whole,) = passes([ReferenceBackend(w, ENGINE)], w.config.vocab, np.random.default_rng(seed))
    meeting, backends = Meeting(parts), []
    for rank in range(parts):
        graph = split(w.graph, rank, parts, expert_shares=shares).graph
        heads = [op.inputs[2].shape.row[0] for op in graph.ops if op.kind == "gated_delta"]
        assert max(heads) < 4 or parts == 1
        mine = Weights(w.config, graph)
        backends.append(ReferenceBackend(mine, ENGINE, exchange=meeting.exchange(rank)))
    for logits in passes(backends, w.config.vocab, np.random.default_rng(seed)):
        assert np.array_equal(bits(logits), bits(whole))


class Drawn(AnyTensors):
    """Tensors of any name and shape, of random numbers."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def take(self, name: str, *shape: int) -> Weight:
        values = self._rng.normal(0, 0.3, shape).astype(np.float32)
        values = -np.abs(values) if name.endswith("ssm_a") else values
        return Weight(name, F32, shape, values.reshape(-1).view(np.uint8))


@pytest.mark.parametrize(("parts", "key_heads"), [(3, 4), (8, 2), (8, 8)])
def test_delta_nets_of_many_heads(parts: int, key_heads: int) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    config = qwen35.Config(
        architecture="qwen35moe",
        n_layers=4,
        hidden=64,
        n_heads=8,
        n_kv_heads=2,
        head_dim=16,
        ffn=32,
        n_experts=9,
        n_experts_used=3,
        vocab=96,
        rope_base=1e7,
        eps=1e-6,
        context_length=256,
        normalise_experts=True,
        recurrent=(True, True, True, False),
        rotated=8,
        key_heads=key_heads,
        value_heads=16,
        state_size=8,
        conv_kernel=4,
        shared_ffn=32,
    )
    graph = qwen35.graph(config, Drawn(seed))
    rng = np.random.default_rng
    (whole,) = passes([ReferenceBackend(Weights(config, graph), ENGINE)], config.vocab, rng(seed))
    assert np.isfinite(whole).all()
    for shares in ((), tuple(range(1, parts + 1)) if parts < 8 else (1,) * parts):
        meeting = Meeting(parts)
        cut = [split(graph, rank, parts, expert_shares=shares).graph for rank in range(parts)]
        heads = [op.inputs[2].shape.row[0] for g in cut for op in g.ops if op.kind == "gated_delta"]
        assert sum(heads) == 3 * 16
        backends = [
            ReferenceBackend(Weights(config, g), ENGINE, exchange=meeting.exchange(rank))
            for rank, g in enumerate(cut)
        ]
        for logits in passes(backends, config.vocab, rng(seed)):
            assert np.array_equal(bits(logits), bits(whole))


@pytest.mark.parametrize("shares", [(), (1, 2, 1)])
def test_stages_of_the_parts_are_put_together(shares: tuple[int, ...]) -> None:
    w = of_file(HYBRID)
    batch = Batch(
        np.arange(5, dtype=np.int32) + 7,
        np.arange(5, dtype=np.int32),
        np.zeros(5, np.int32),
        np.zeros((1, 1), np.int32),
        np.array([4], np.int32),
    )
    shown: list[dict] = []
    split_engine = replace(ENGINE, parts=3, expert_shares=shares)
    for backend in (CpuBackend(w, ENGINE), PartsBackend(w, split_engine)):
        found: dict = {}
        backend.forward(batch, lambda name, layer, x, found=found: found.update({(name, layer): x}))
        shown.append(found)
        backend.close()
    assert list(shown[0]) == list(shown[1])
    for key, value in shown[0].items():
        assert np.array_equal(value, shown[1][key]), key


def test_a_part_that_ends_is_an_error() -> None:
    w = of_file(sample_path())
    backend, zero = PartsBackend(w, replace(ENGINE, parts=2)), np.zeros(1, np.int32)
    try:
        (process, _), *_ = backend._others
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(BackendUnavailable, match="a part of the split model has ended"):
            backend.forward(Batch(zero, zero, zero, zero[:, None], zero))
    finally:
        backend.close()


def test_more_parts_than_heads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = of_file(sample_path())
    with pytest.raises(UsageError, match="parts: expected at most"):
        split(w.graph, 0, 1000)
    monkeypatch.setattr(PartsBackend, "_start", lambda *_: pytest.fail("a process starts"))
    with pytest.raises(UsageError, match="parts: expected at most"):
        PartsBackend(w, replace(ENGINE, parts=1000))
    geometry = Geometry(experts=4, heads=8)
    few = of_file(write_model(tmp_path / "m.gguf", geometry))
    with pytest.raises(UsageError, match="expert_shares: expected at most 4, one an expert"):
        PartsBackend(few, replace(ENGINE, parts=8, expert_shares=(1,) * 8))


@pytest.mark.parametrize("shares", [(1,), (1, 0), (1, 1, 1)])
@pytest.mark.parametrize("name", ["shares", "expert_shares"])
def test_shares_are_checked(name: str, shares: tuple[int, ...]) -> None:
    w = of_file(sample_path())
    with pytest.raises(UsageError, match=f"^{name}: expected"):
        split(w.graph, 0, 2, **{name: shares})


@pytest.mark.parametrize(
    ("total", "shares", "expected"),
    [
        (768, (1, 1), [0, 384, 768]),
        (768, (3, 1), [0, 576, 768]),
        (8, (1, 1, 1), [0, 2, 5, 8]),
        (4, (1, 1 << 19), [0, 1, 4]),
        (4, (1 << 19, 1), [0, 3, 4]),
        (4, (1, 9, 1, 1), [0, 1, 2, 3, 4]),
    ],
)
def test_shares_are_about_proportional(total: int, shares: list[int], expected: list[int]) -> None:
    """One or more for each."""
    assert bounds(total, shares) == expected


def test_a_part_whose_caller_has_ended_says_nothing() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        n = theirs.fileno()
        command = [sys.executable, "-m", parts.__name__, str(n), "0"]
        done = subprocess.run(command, pass_fds=[n], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
