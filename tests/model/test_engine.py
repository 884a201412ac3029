"""Generations together on one engine: each gets the bits that it gets alone."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import isobit
from isobit.backends.base import Batch, Results
from isobit.errors import ContextFull, ModelRefused, UsageError
from isobit.runtime.engine import Engine
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampling
from isobit.runtime.scheduler import Limits, QueueFull
from isobit.runtime.tokens import Generation, Token
from isobit.verify.receipt import Recorder, replay

HYBRID = Path(__file__).parents[1] / "data" / "pyhybrid-moe-34m-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with isobit.load("sample", backend="cpu", context=1024, sequences=8) as m:
        yield m


@pytest.fixture(scope="module")
def alone() -> Iterator[Model]:
    with isobit.load("sample", backend="cpu", context=1024, sequences=1) as m:
        yield m


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model) as e:
        yield e
        e.scheduler.blocks.check([r.table for r in e.scheduler.running])


def settings(rng: np.random.Generator, n: int) -> Sampling:
    kinds = [
        Sampling(),
        Sampling(temperature=1.0, seed=n),
        Sampling(temperature=0.7, top_p=0.9, top_k=40, seed=-n),
        Sampling(temperature=1.2, min_p=0.05, repeat_penalty=1.1, presence_penalty=0.5, seed=n),
        Sampling(frequency_penalty=0.4, logit_bias=((5, 2.0), (9, -1e6))),
    ]
    return kinds[rng.integers(len(kinds))]


def same_as_alone(alone: Model, generation: Generation, tokens: list[Token], got: Recorder) -> None:
    request, sampling = generation.request, generation.sampler.sampling
    sampling = replace(sampling, seed=generation.sampler.seed)
    recorder, values = Recorder(), vars(sampling) | {"logit_bias": dict(sampling.logit_bias)}
    assert values.pop("grammar") is None
    done = alone.generate(
        request.prompt, max_tokens=request.max_tokens, watch=recorder, logprobs=3, **values
    )
    assert [t.id for t in tokens] == done.token_ids
    assert generation.finish_reason == done.finish_reason
    assert done.logprobs is not None
    assert [t.logprob for t in tokens] == done.logprobs.tokens.tolist()
    assert [[i for i, _ in t.top] for t in tokens] == done.logprobs.top_ids.tolist()
    assert [[p for _, p in t.top] for t in tokens] == done.logprobs.top.tolist()
    assert got.receipt() == recorder.receipt()
    for ours, theirs in zip(got.routes(), recorder.routes(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_together_is_alone(
    engine: Engine, alone: Model, heldout: list[int], rng: np.random.Generator
) -> None:
    begun = []
    for n in range(24):
        length = int(rng.choice([1, 3, 63, 64, 65, 130, 300]))
        start = int(rng.choice([0, 0, 64, 500]))  # of which some begin alike
        recorder = Recorder()
        generation = engine.submit(
            heldout[start : start + length],
            int(rng.integers(1, 24)),
            settings(rng, n),
            logprobs=3,
            watch=recorder,
        )
        begun.append((generation, recorder))
        if n % 3 == 0:
            engine.step()  # the others arrive in the midst of it
        if n % 7 == 6:
            engine.submit(heldout[:200], 50, Sampling()).cancel()
    for generation, recorder in begun:
        same_as_alone(alone, generation, list(generation), recorder)
    assert max(generation.request.cached for generation, _ in begun) > 0
    assert engine.scheduler.blocks.held == 0


def test_a_receipt_with_a_cached_prefix_replays(
    engine: Engine, alone: Model, heldout: list[int]
) -> None:
    for cached in (0, 192):
        recorder = Recorder()
        generation = engine.submit(heldout[:200], 80, Sampling(), watch=recorder)
        assert len(list(generation)) == 80
        assert generation.request.cached == cached
        assert replay(recorder.receipt(), alone) is None


def test_a_hybrid_model_keeps_states_apart(rng: np.random.Generator) -> None:
    with (
        isobit.load(HYBRID, backend="cpu", context=512, sequences=3) as model,
        isobit.load(HYBRID, backend="cpu", context=512, sequences=1) as alone,
        Engine(model) as engine,
    ):
        ids = [int(i) for i in rng.integers(0, 200, 90)]
        begun = []
        for n in range(8):
            recorder = Recorder()
            length = int(rng.choice([1, 2, 70, 90]))
            generation = engine.submit(
                ids[:length], 6, Sampling(temperature=1, seed=n), logprobs=3, watch=recorder
            )
            begun.append((generation, recorder))
            engine.step()
        assert len(engine.scheduler.running) <= 3
        begun.pop(4)[0].cancel()
        for generation, recorder in begun:
            same_as_alone(alone, generation, list(generation), recorder)
        assert sorted(engine._states) == [0, 1, 2]


def test_whoever_waits_runs_passes_for_all(
    engine: Engine, alone: Model, heldout: list[int]
) -> None:
    recorders = [Recorder() for _ in range(6)]
    generations = [
        engine.submit(heldout[n : n + 40], 12, Sampling(), logprobs=3, watch=r)
        for n, r in enumerate(recorders)
    ]
    found: list[list[Token]] = [[] for _ in generations]
    threads = [
        threading.Thread(target=lambda i=i, g=g: found[i].extend(g))
        for i, g in enumerate(generations)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for generation, tokens, recorder in zip(generations, found, recorders, strict=True):
        same_as_alone(alone, generation, tokens, recorder)


def test_an_engine_with_a_thread_tells_the_listener(model: Model, heldout: list[int]) -> None:
    with Engine(model) as engine:
        thread = threading.Thread(target=engine.run)
        thread.start()
        ended = threading.Event()
        generation: list[Generation] = []

        def listen() -> None:
            if generation and generation[0].finish_reason is not None:
                ended.set()

        with engine._books:
            generation.append(engine.submit(heldout[:9], 5, Sampling(), listen=listen))
        assert ended.wait(60)
        assert len([generation[0].take() for _ in range(5)]) == 5
    thread.join(60)
    assert not thread.is_alive()


def test_cancelling_frees_the_pages(engine: Engine, heldout: list[int]) -> None:
    generation = engine.submit(heldout[:900], 100, Sampling())
    engine.step()
    assert engine.scheduler.blocks.held == 8
    generation.cancel()
    assert generation.finish_reason == "interrupted"
    assert engine.scheduler.blocks.held == 0
    assert list(generation) == []
    waiting = engine.submit(heldout[:10], 4, Sampling())
    waiting.cancel()
    assert not engine.step()


def test_a_pass_that_fails_ends_its_generations_alone(
    engine: Engine, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine.submit(heldout[:10], 4, Sampling())

    def broken(batch: Batch, *_: object) -> None:
        raise ModelRefused("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "run_batch", broken)
        with pytest.raises(ModelRefused, match="on fire"):
            next(first)
    assert engine.scheduler.blocks.held == 0
    assert len(list(engine.submit(heldout[:10], 4, Sampling()))) == 4


def test_logits_that_are_not_finite_end_one_generation(
    engine: Engine, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = (engine.submit(heldout[n : n + 9], 3, Sampling()) for n in (0, 20))
    run = engine.model.run_batch

    def damaged(batch: Batch, *rest: object) -> Results:
        results = run(batch, *rest)
        assert results.logits is not None
        if len(results.logits) == 2:
            results.logits[0, 7] = np.nan
        return results

    monkeypatch.setattr(engine.model, "run_batch", damaged)
    assert len(list(good)) == 3
    with pytest.raises(ModelRefused, match="finite"):
        list(bad)


def test_the_queue_is_bounded_and_the_cache_is_the_engines(
    model: Model, heldout: list[int]
) -> None:
    with Engine(model, Limits(running=2, waiting=2)) as engine:
        generations = [engine.submit(heldout[:5], 2, Sampling()) for _ in range(2)]
        with pytest.raises(QueueFull):
            engine.submit(heldout[:5], 2, Sampling())
        with pytest.raises(ContextFull):
            model.generate(heldout[:5], max_tokens=2)
        assert [len(list(g)) for g in generations] == [2, 2]
    with pytest.raises(UsageError, match="closed"):
        engine.submit(heldout[:5], 2, Sampling())
    assert len(model.generate(heldout[:5], max_tokens=2).token_ids) == 2
