"""A KV cache that fits the memory: what gives way, what is refused, and what is said of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import isobit
from isobit import machine
from isobit.backends import SettledNote, open_backend
from isobit.backends.base import Backend
from isobit.backends.base.kv_pages import Headroom, fit_kv_cache, page_bytes
from isobit.backends.reference import ReferenceBackend
from isobit.cli import main
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, UsageError
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers.synth import Geometry, write_model

LONG = Geometry(layers=1, context=262_144)
ASKED = EngineConfig()


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    with GGUFFile.open(write_model(tmp_path / "long.gguf", LONG)) as file:
        return Weights.from_file(file)


def settle(weights: Weights, have: float, /, **asked: int) -> tuple[int, int, str]:
    """(context, pages, what is said) with room for so many pages."""
    page = page_bytes(weights)
    room = Headroom(have * page, page)
    engine, said = fit_kv_cache(weights, replace(ASKED, **asked), lambda _: room)
    assert engine.context is not None
    assert engine.pages is not None
    return engine.context, engine.pages, said or ""


def test_room_for_all_says_nothing(weights: Weights) -> None:
    assert settle(weights, 16384) == (262_144, 16384, "")
    assert settle(weights, 1e9, max_sequences=2) == (262_144, 8192, "")
    assert settle(weights, 8, context=100) == (100, 8, "")
    assert settle(weights, 8, context=100, pages=5) == (100, 5, "")


def test_fewer_full_sequences(weights: Weights) -> None:
    context, pages, said = settle(weights, 5000.5)
    assert (context, pages) == (262_144, 5000)
    assert said.startswith("KV cache: 320,000 tokens for 4 sequences of up to 262,144: 1,048,576 ")
    assert settle(weights, 3, context=100)[:2] == (100, 3)


@pytest.mark.parametrize(
    ("have", "asked", "sequences", "pages"),
    [
        (1e6, {}, 64, 64 * 4096),  # all of full length, of less than half
        (100_000, {}, 64, 50_000),  # half
        (20_000, {}, 64, 16_384),  # no less than the fewest have
        (5000, {}, 64, 5000),  # which have all
        (2048, {}, 32, 2048),
        (300, {}, 4, 300),  # and 75 pages each
        (40, {}, 4, 40),
        (1e6, {"context": 100}, 64, 128),
        (100, {"context": 100}, 32, 50),
        (1e6, {"pages": 600, "context": 4096}, 8, 600),
        (1e6, {"max_sequences": 3}, 64, 64 * 4096),
    ],
)
def test_more_sequences_where_there_is_room(
    weights: Weights, have: float, asked: dict[str, int], sequences: int, pages: int
) -> None:
    page = page_bytes(weights)
    engine = replace(ASKED, most_sequences=64, **asked)
    settled, _ = fit_kv_cache(weights, engine, lambda _: Headroom(have * page, page))
    assert (settled.max_sequences, settled.pages) == (sequences, pages)
    assert settled.most_sequences is None
    assert fit_kv_cache(weights, settled, lambda _: Headroom(have * page, page))[0] == settled


def test_states_of_more_sequences_take_of_the_room(weights: Weights) -> None:
    page = page_bytes(weights)

    def room(engine: EngineConfig) -> Headroom:
        return Headroom((5000 - 100 * engine.max_sequences) * page, page)

    settled, _ = fit_kv_cache(weights, replace(ASKED, most_sequences=64), room)
    assert (settled.max_sequences, settled.pages) == (16, 3400)


def test_where_nobody_says_what_room_there_is_the_fewest_run_together(weights: Weights) -> None:
    page = page_bytes(weights)
    settled, _ = fit_kv_cache(
        weights, replace(ASKED, most_sequences=64), lambda _: Headroom(np.inf, page)
    )
    assert (settled.max_sequences, settled.pages) == (4, 16_384)


def test_a_context_that_nobody_named_gives_way(weights: Weights) -> None:
    context, pages, said = settle(weights, 1000)
    assert (context, pages) == (64_000, 1000)
    assert said.startswith("context: 64,000 tokens, not the model's 262,144: 1,048,576 tokens take")
    context, pages, said = settle(weights, 1e9, pages=10)
    assert (context, pages) == (640, 10)
    assert said.endswith("as long as the KV cache")


@pytest.mark.parametrize(
    ("pages", "asked"),
    [
        (1000, {"context": 262_144}),
        (9, {"pages": 10}),
        (3, {}),
        (-1, {}),
        (1, {"context": 100}),
    ],
)
def test_what_was_named_is_kept_or_refused(
    weights: Weights, pages: float, asked: dict[str, int]
) -> None:
    with pytest.raises(BackendUnavailable, match=r"^KV cache: .* are left for them; a context of"):
        settle(weights, pages, **asked)
    with pytest.raises(UsageError, match="context: expected at most 640 tokens"):
        settle(weights, 1e9, context=1000, pages=10)


def test_pages_take_what_is_said(weights: Weights) -> None:
    """Of 2 key-value heads of 64: K and V, 16 bits and a scale each."""
    assert page_bytes(weights) == 64 * 2 * 2 * (2 * 64 + 4)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch, weights: Weights) -> None:
    """Room for 1,000 pages beside the weights."""
    mapped = sum(w.data.nbytes for w in weights.graph.weights.values())
    free = (1000.5 * page_bytes(weights) + mapped) / 0.9
    monkeypatch.setattr(machine, "free_memory", lambda: free)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_long_model_opens_where_a_smaller_pool_fits(
    name: str, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="context: 64,000 tokens, not the model's 262,144"):
        model = isobit.load(tmp_path / "long.gguf", name)
    with model:
        assert model.context == 64_000
        assert model.backend.limits.pages == 1000
        logits = model.logits([1, 2, 3])
        assert np.isfinite(logits).all()
        with pytest.raises(UsageError, match="at most 64000 tokens"):
            model.logits([1] * 64_001)
    command = ["run", str(tmp_path / "long.gguf"), "--backend", name, "--tokens", "1", "-n", "1"]
    assert main(command) == 0
    assert "context: 64,000 tokens, not the model's 262,144" in capsys.readouterr().err
    assert main([*command, "-c", "64064"]) == 4
    assert "a context of 64,000 has room" in capsys.readouterr().err
    assert main([*command, "--cache", "1000", "--chunk", "7", "--sequences", "2"]) == 0
    assert "context: 1,024 tokens" in capsys.readouterr().err


@pytest.mark.usefixtures("little_memory")
def test_notes_of_what_is_settled(weights: Weights) -> None:
    notes: list[str] = []
    open_backend("reference", weights, ASKED, notes.append).close()
    assert [type(n) for n in notes] == [SettledNote]


def test_load_sets_all_sizes() -> None:
    with isobit.load("sample", "cpu", sequences=3, chunk=5, cache=1000, context=500) as model:
        assert model.backend.limits.pages == 16
        assert (model.engine.max_sequences, model.engine.chunk, model.context) == (3, 5, 500)
        assert model.generate([1, 2, 3], max_tokens=2).token_ids
    for wrong in ({"chunk": 0}, {"sequences": 0}, {"cache": -1}, {"cache": 1.5}):
        with pytest.raises(UsageError, match="expected an integer"):
            isobit.load("sample", "cpu", **wrong)


def test_a_fallback_from_a_gpu_that_is_there_is_a_warning(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Backend:
        raise BackendUnavailable("cuda: the model needs 124.00 GB")

    monkeypatch.setattr("isobit.backends.may_have_gpu", lambda: True)
    monkeypatch.setattr("isobit.backends.cuda.available", lambda: (True, ""))
    monkeypatch.setattr("isobit.backends.cuda.CudaBackend", full)
    monkeypatch.setattr("isobit.backends.wgpu.available", lambda **_: (False, "wgpu: none"))
    monkeypatch.setattr("isobit.backends.gpus", lambda: ["NVIDIA"])
    settings = EngineConfig(context=64, max_sequences=1)
    with pytest.warns(UserWarning, match=r"auto: using cpu \(cuda: the model needs 124.00 GB"):
        open_backend("auto", weights, settings).close()


def test_a_machine_without_a_gpu_is_no_news(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("isobit.backends.may_have_gpu", lambda: True)
    monkeypatch.setattr("isobit.backends.cuda.available", lambda: (False, "cuda: none"))
    monkeypatch.setattr("isobit.backends.wgpu.available", lambda **_: (False, "wgpu: none"))
    monkeypatch.setattr("isobit.backends.gpus", list)
    open_backend("auto", weights, EngineConfig(context=64, max_sequences=1)).close()
    assert not recwarn.list


def test_auto_asks_no_library_where_there_is_no_gpu(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isobit.backends.may_have_gpu", lambda: False)
    monkeypatch.setattr("isobit.backends.cuda.available", lambda: pytest.fail("asked"))
    notes: list[str] = []
    open_backend("auto", weights, EngineConfig(context=64, max_sequences=1), notes.append).close()
    assert notes == ["backend auto: using cpu (no GPU, nor a driver of one)"]


def test_a_backend_made_by_hand_is_settled_too(weights: Weights) -> None:
    backend = ReferenceBackend(weights, EngineConfig(context=128, pages=5))
    assert (backend.limits.positions, backend.limits.pages) == (128, 5)
