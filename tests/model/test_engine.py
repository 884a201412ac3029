"""Generations together on one engine: each gets the bits that it gets alone."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isobit
from isobit.backends.base import Batch, Following, Results, Wanted
from isobit.backends.cpu.sampler import NOT_FINITE
from isobit.backends.cuda import available
from isobit.errors import ModelRefused, UsageError
from isobit.runtime.engine import Engine
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampling
from isobit.runtime.scheduler import Limits, QueueFull
from isobit.runtime.tokens import Generation, Token
from isobit.verify.receipt import Recorder, replay
from tests.helpers.expected import not_run
from tests.ops.wgpu_support import open_device

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
    e = model.generations
    yield e
    e.scheduler.blocks.check([r.table for r in e.scheduler.running])
    e.scheduler.blocks.forget()


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
        request.prompt,
        max_tokens=request.max_tokens,
        watch=recorder,
        logprobs=3,
        salt=None,
        **values,
    )
    assert [t.id for t in tokens] == done.token_ids
    assert generation.finish_reason == done.finish_reason
    assert done.logprobs is not None
    assert [t.logprob for t in tokens] == done.logprobs.tokens.tolist()
    assert [[i for i, _ in t.top] for t in tokens] == done.logprobs.top_ids.tolist()
    assert [[p for _, p in t.top] for t in tokens] == done.logprobs.top.tolist()
    same = {"backend": "", "device": ""}
    assert replace(got.receipt(), **same) == replace(recorder.receipt(), **same)
    for ours, theirs in zip(got.routes(), recorder.routes(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_together_is_alone(
    engine: Engine, alone: Model, heldout: list[int], rng: np.random.Generator
) -> None:
    begun = []
    list(engine.submit(heldout[:300], 1, Sampling(), watch=Recorder()))
    for n in range(24):
        length = int(rng.choice([1, 3, 63, 64, 65, 130, 300])) if n else 130
        start = int(rng.choice([0, 0, 64, 500])) if n else 0  # of which some begin alike
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
    assert begun[0][0].request.cached == 128
    assert engine.scheduler.blocks.held == 0


def test_a_backend_that_goes_ahead_is_told_what_follows(
    engine: Engine,
    alone: Model,
    heldout: list[int],
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That is what comes, without those that have ended, whoever arrives meanwhile."""
    monkeypatch.setattr(type(engine.model.backend), "goes_ahead", True)
    # By times a prompt may be left for later, and then have the first page of one that has ended.
    monkeypatch.setattr(engine.scheduler, "prefill_budget", lambda *_: 64)
    told: list[Following | None] = [None]
    as_told, run = [], engine.model.run_batch

    def seen(batch: Batch, wanted: Wanted, *more: Any) -> Results:
        if (said := told[-1]) is not None:
            known, same = said.batch.tokens >= 0, np.isin(said.batch.pages[:, 0], batch.pages[:, 0])
            left = same[said.batch.sequence]
            np.testing.assert_array_equal(said.batch.positions[left], batch.positions)
            at = known[left]
            np.testing.assert_array_equal(said.batch.tokens[left & known], batch.tokens[at])
            assert said.routes >= wanted.routes
            as_told.append(bool(same.all()))
        told.append(wanted.following)
        return run(batch, wanted, *more)

    monkeypatch.setattr(engine.model, "run_batch", seen)
    kinds = (Sampling(), Sampling(temperature=1.0, seed=4))
    begun, leaves = [], engine.submit(heldout[:5], 50, kinds[0], salt=None)
    for n in range(16):
        prompt = heldout[70 * n : 70 * n + int(rng.integers(1, 150))]
        begun.append(engine.submit(prompt, int(rng.integers(1, 12)), kinds[n % 2], salt=None))
        engine.submit(prompt, 50, kinds[0], salt=None).cancel()
        engine.step()
        if n == 4:
            leaves.cancel()
    for generation in begun:
        ids = [token.id for token in generation]
        s, request = generation.sampler.sampling, generation.request
        done = alone.generate(
            request.prompt,
            max_tokens=request.max_tokens,
            temperature=s.temperature,
            seed=s.seed,
            salt=None,
        )
        assert ids == done.token_ids
    assert as_told.count(True) >= 10
    assert False in as_told
    assert engine.scheduler.blocks.held == 0


def test_two_hundred_at_once_have_the_receipts_of_each_alone(
    engine: Engine, alone: Model, heldout: list[int], rng: np.random.Generator
) -> None:
    asked = []
    for n in range(100):
        length = int(rng.choice([1, 7, 40, 64, 70, 130]))
        start = int(rng.choice([0, 0, 0, 300, 900]))  # of which many begin alike
        asked.append((heldout[start : start + length], int(rng.integers(1, 8)), settings(rng, n)))
    starts = [heldout[start : start + 130] for start in (0, 300, 900)]
    for prompt in starts:
        list(engine.submit(prompt, 1, Sampling(), watch=Recorder()))
    blocks = engine.scheduler.blocks
    tables = [blocks.open(prompt, routes=True) for prompt in starts]  # nobody takes these pages
    begun: list[tuple[Generation, Recorder, int]] = []

    def ask(share: int) -> None:
        for i, (prompt, most, sampling) in list(enumerate(asked))[share::4]:
            for choice in range(2):
                got = Recorder()
                generation = engine.submit(prompt, most, sampling, choice=choice, watch=got)
                begun.append((generation, got, i))
            if i % 5 == 0:
                engine.submit(prompt, 200, sampling, watch=Recorder()).cancel()
            if i % 7 == 0:  # in the midst of its prompt or its answer
                threading.Timer(0.01, engine.submit(prompt * 3, 60, sampling).cancel).start()

    threads = [threading.Thread(target=ask, args=(share,)) for share in range(4)]
    for thread in threads:
        thread.start()
    engine.start()
    for thread in threads:
        thread.join()
    together = [(list(generation), generation, got, i) for generation, got, i in begun]
    engine.stop()
    assert len(together) == 200
    for table in tables:
        blocks.close(table)
    for tokens, generation, got, i in together:
        prompt, most, sampling = asked[i]
        assert generation.request.cached == (len(prompt) - 1) // 64 * 64
        recorder = Recorder()
        sampling = replace(sampling, seed=generation.sampler.seed)
        only = alone.generations.submit(prompt, most, sampling, watch=recorder, salt=None)
        assert [t.id for t in only] == [t.id for t in tokens]
        assert got.receipt() == recorder.receipt()
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
    ):
        engine = model.generations
        ids = [int(i) for i in rng.integers(0, 200, 90)]
        begun = []
        for n in range(6):
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
        assert engine.scheduler.blocks.available_states == engine.scheduler.blocks.states


@pytest.mark.parametrize("backend", ["cpu", "reference", "wgpu", "cuda"])
def test_a_hybrid_model_goes_on_from_kept_states(backend: str, rng: np.random.Generator) -> None:
    few = backend in ("reference", "wgpu")
    if backend == "wgpu":
        open_device()  # or "not run"
    if backend == "cuda" and not (there := available())[0]:
        not_run("cuda", there[1])
    with (
        isobit.load(HYBRID, backend=backend, context=1024) as model,
        isobit.load(HYBRID, backend="cpu", context=1024, sequences=1) as alone,
    ):
        engine = model.generations
        text = [int(i) for i in rng.integers(0, 200, 90 if few else 700)]
        lengths = [64, 65] if few else [700, 700, 650, 256, 257, 320, 321, 330, 100]
        used = []
        for n, length in enumerate(lengths):
            prompt = text[:length] if n % 2 else [*text[:length], 5, n]
            recorder = Recorder()
            generation = engine.submit(
                prompt, 3, Sampling(temperature=1, seed=n), logprobs=3, watch=recorder
            )
            same_as_alone(alone, generation, list(generation), recorder)
            used.append(generation.request.cached)
        assert used == ([0, 64] if few else [0, 640, 640, 0, 256, 256, 256, 320, 0])
        # The next turn of a conversation goes on from the last page of its prompt, or after it.
        first = engine.submit(text[:70], 2 if few else 20, Sampling())
        answer = [t.id for t in first]
        turn = engine.submit([*text[:70], *answer, 7, 8, 9], 2, Sampling())
        list(turn)
        assert turn.request.cached == 64
        engine.scheduler.blocks.check([])


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


def test_an_engine_with_a_thread_tells_the_listener(engine: Engine, heldout: list[int]) -> None:
    engine.start()
    ended = threading.Event()
    generation: list[Generation] = []

    class Listening:
        def notify(self) -> None:
            if generation and generation[0].finish_reason is not None:
                ended.set()

        def wait_taken(self, seconds: float) -> None: ...

    with engine._lock:
        generation.append(engine.submit(heldout[:9], 5, Sampling(), listen=Listening()))
    assert ended.wait(60)
    assert len([generation[0].take() for _ in range(5)]) == 5
    assert engine.serving
    waits = engine.submit(heldout[:9], None, Sampling())
    engine.stop()
    assert not engine.serving
    assert waits.finish_reason == "interrupted"
    assert len(list(engine.submit(heldout[:9], 3, Sampling()))) == 3


@pytest.mark.parametrize("goes_ahead", [False, True])
@pytest.mark.parametrize(("who", "when"), [(0, 2), (1, 4)], ids=["in it", "in the next"])
def test_who_leaves_in_a_pass_of_a_prompt_has_no_pages_after_it(
    engine: Engine,
    heldout: list[int],
    monkeypatch: pytest.MonkeyPatch,
    who: int,
    when: int,
    goes_ahead: bool,
) -> None:
    monkeypatch.setattr(type(engine.model.backend), "goes_ahead", goes_ahead)
    before, run = engine.scheduler.limits, engine.model.run_batch
    engine.limit(Limits(pass_tokens=64, running=2))
    both = [engine.submit(heldout[:300], 5, Sampling(), salt=None) for _ in range(2)]
    passes = 0

    def leaves(*given: Any) -> Results:
        nonlocal passes
        passes += 1
        if passes == when:
            both[who].cancel()
            at_once = who == 1 and not goes_ahead  # else a device may be writing to its pages
            assert both[who].ended is at_once
        return run(*given)

    monkeypatch.setattr(engine.model, "run_batch", leaves)
    for _ in range(when):
        assert not both[who].ended
        engine.step()
    assert both[who].ended
    assert engine.scheduler.blocks.held == len(both[1 - who].request.table.pages)
    assert len(list(both[1 - who])) == 5
    engine.limit(before)


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


@pytest.mark.parametrize("path", ["sample", HYBRID])
def test_an_interruption_is_only_for_who_ran_the_pass(
    path: str | Path, alone: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with isobit.load(path, backend="cpu", context=256) as model:
        prompts = [[n] * 70 for n in range(1, 4)]
        expected = [model.generate(p, max_tokens=9, salt=None).token_ids for p in prompts]
        streams = [model.stream(p, max_tokens=9) for p in prompts]
        begun = [stream.begin() for stream in streams]
        for _ in range(3):
            model.generations.step()
        run = model.backend.run

        def interrupted(*given: object) -> object:
            run(*given)  # states move on, and nobody is told
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(model.backend, "run", interrupted)
            assert begun[0] is not None
            while begun[0].take():
                pass
            with pytest.raises(KeyboardInterrupt):
                next(streams[0])
        assert [s.complete().token_ids for s in streams[1:]] == expected[1:]
        assert not model.generations.scheduler.running


def test_what_watches_one_generation_harms_no_other(engine: Engine, heldout: list[int]) -> None:
    class Broken(Recorder):
        def chose(self, _logits: np.ndarray, _token: int) -> None:
            raise ValueError("planted")

    bad = engine.submit(heldout[:9], 3, Sampling(), watch=Broken())
    good = engine.submit(heldout[:9], 3, Sampling())
    assert len(list(good)) == 3
    with pytest.raises(ValueError, match="planted"):
        list(bad)
    assert engine.scheduler.blocks.held == 0


def test_logits_that_are_not_finite_end_one_generation(
    engine: Engine, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(temperature=1, seed=1)
    bad, good = (engine.submit(heldout[n : n + 9], 3, sampling) for n in (0, 20))
    run = engine.model.run_batch

    def damaged(batch: Batch, *rest: Any) -> Results:
        results = run(batch, *rest)
        if results.drawn is not None and len(results.drawn) == 2:
            results.drawn[0] = NOT_FINITE
        return results

    monkeypatch.setattr(engine.model, "run_batch", damaged)
    assert len(list(good)) == 3
    with pytest.raises(ModelRefused, match="finite"):
        list(bad)


def test_the_queue_is_bounded(engine: Engine, heldout: list[int]) -> None:
    before = engine.scheduler.limits
    engine.limit(Limits(running=2, waiting=1))
    generations = [engine.submit(heldout[:5], 2, Sampling()) for _ in range(3)]
    with pytest.raises(QueueFull):
        engine.submit(heldout[:5], 2, Sampling())
    assert len(engine.model.generate([heldout[:5]] * 9, max_tokens=2)) == 9  # waits
    assert [len(list(g)) for g in generations] == [2, 2, 2]
    engine.limit(before)


def test_no_more_run_at_once_than_there_are_pages(heldout: list[int]) -> None:
    with isobit.load("sample", backend="cpu", context=512, sequences=1) as model:
        engine = model.generations
        assert engine.scheduler.limits.running == model.backend.limits.pages == 8
        engine.limit(Limits(waiting=1))
        begun = [engine.submit(heldout[:5], 2, Sampling()) for _ in range(9)]
        with pytest.raises(QueueFull):
            engine.submit(heldout[:5], 2, Sampling())
        assert [len(list(g)) for g in begun] == [2] * 9


def test_a_closed_engine_says_so(heldout: list[int]) -> None:
    with isobit.load("sample", backend="cpu", context=64) as model:
        begun = model.generations.submit(heldout[:5], 9, Sampling())
        next(begun)
    with pytest.raises(UsageError, match="closed"):
        list(begun)
    with pytest.raises(UsageError, match="closed"):
        model.generations.submit(heldout[:5], 2, Sampling())


class Told:
    """A listener that notes, whenever it is told, whether its generation had ended."""

    def __init__(self) -> None:
        self.ended: list[bool] = []
        self.generation: Generation | None = None

    def notify(self) -> None:
        assert self.generation is not None
        self.ended.append(self.generation.ended)

    def wait_taken(self, seconds: float) -> None: ...


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("how", ["cancel", "stop"])
def test_who_listens_is_told_of_an_end_between_passes(
    how: str, passes: int, engine: Engine, heldout: list[int]
) -> None:
    told = Told()
    generation = told.generation = engine.submit(heldout[:9], 50, Sampling(), listen=told)
    for _ in range(passes):
        engine.step()
    before = len(told.ended)
    generation.cancel() if how == "cancel" else engine.stop()
    assert told.ended[before:] == [True]
    generation.cancel()  # again, which is no news
    assert told.ended[before:] == [True]


@pytest.mark.parametrize("by_engine", [False, True])
def test_closing_a_stream_from_a_thread_ends_who_reads_it_in_a_loop(
    by_engine: bool, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(model: Model) -> None:
        # Passes do not run, so that nothing but its closing can wake the reader.
        monkeypatch.setattr(model.generations._thread, "_begin", lambda: None)
        stream = model.stream(heldout[:9], max_tokens=5)
        read = asyncio.create_task(anext(stream))
        while not (stream._generation and stream._generation.listen):
            await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, model.generations.stop if by_engine else stream.close)
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(read, 60)
        assert stream.completion is not None
        assert stream.completion.finish_reason == "interrupted"

    with isobit.load("sample", backend="cpu", context=64) as model:
        asyncio.run(run(model))


def test_tokens_that_were_generated_elsewhere_are_a_prompt_to_the_pace(
    engine: Engine, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, int]] = []
    monkeypatch.setattr(engine.prefill_budget, "ran", lambda *of: ran.append(of[:2]))
    generation = engine.submit(heldout[:30], 80, Sampling(), begun=heldout[30:100], salt=None)
    engine.step()
    assert generation.decode_seconds == 0 < generation.prefill_seconds
    assert len(list(generation)) == 10
    assert ran == [(0, 100), *[(1, 0)] * 9]
    assert generation.decode_seconds > 0


class Interrupting(threading.Condition):
    """Ctrl-C as somebody comes to the books for the n-th time."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __enter__(self) -> bool:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().__enter__()

    def wait(self, _seconds: float | None = None) -> bool:
        raise AssertionError("its only thread waits for itself")


def test_ctrl_c_anywhere_leaves_an_engine_that_works(heldout: list[int]) -> None:
    with isobit.load("sample", backend="cpu", context=1024, sequences=2) as model:
        wanted = model.generate(heldout[:9], max_tokens=4).token_ids
        engine, at, interrupted = model.generations, 0, True
        while interrupted:
            at += 1
            engine._lock = engine._changed = books = Interrupting(at)
            with suppress(KeyboardInterrupt):
                assert model.generate(heldout[:9], max_tokens=4).token_ids == wanted
            interrupted, books.left = books.left <= 0, 0
            assert model.generate(heldout[:9], max_tokens=4).token_ids == wanted
            engine.scheduler.blocks.check([r.table for r in engine.scheduler.running])
            assert not engine.scheduler.running
        assert at > 10
