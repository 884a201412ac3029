"""An engine that several threads use: every interleaving here is forced, none is hoped for."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import isobit
from isobit.errors import BackendUnavailable, UsageError
from isobit.runtime.batches import Part
from isobit.runtime.engine import Engine
from isobit.runtime.generation import Stream
from isobit.runtime.model import Model
from isobit.runtime.pass_thread import PassThread
from isobit.runtime.sampler import Sampling
from isobit.runtime.scheduler import Limits
from isobit.runtime.tokens import Generation, Token
from isobit.verify.receipt import Recorder

HYBRID = Path(__file__).parents[1] / "data" / "pyhybrid-moe-34m-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with isobit.load("sample", backend="cpu", context=256, sequences=4) as m:
        yield m


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    e, limits = model.generations, model.generations.scheduler.limits
    yield e
    e.stop()
    e.limit(limits)
    e.scheduler.blocks.check([])


def elsewhere(work: Callable[[], object]) -> None:
    """Do it in another thread, now."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_stream_that_is_closed_as_it_begins_ends(
    engine: Engine, model: Model, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, submit = model.stream(heldout[:9], max_tokens=50), engine.submit

    def closed_meanwhile(*given: object, **settings: object) -> Generation:
        elsewhere(stream.close)
        return submit(*given, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "submit", closed_meanwhile)
    assert list(stream) == []
    assert stream.completion is not None
    assert stream.completion.finish_reason == "interrupted"


def test_an_end_that_is_read_before_it_is_written_down_is_one(
    engine: Engine, model: Model, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = model.generate(heldout[:9], max_tokens=4).token_ids[3]
    monkeypatch.setattr(Model, "stop_ids", frozenset({end}))
    wanted = model.generate(heldout[:9], max_tokens=9)
    assert wanted.finish_reason == "stop"
    stream, end_if_over = model.stream(heldout[:9], max_tokens=9), engine._books._end_if_over
    generation = stream.begin()
    assert generation is not None

    def read_meanwhile(over: Generation) -> None:
        elsewhere(lambda: stream._took(over.take()))
        end_if_over(over)

    monkeypatch.setattr(engine._books, "_end_if_over", read_meanwhile)
    while stream.completion is None:
        engine.step()
    assert stream.completion.token_ids == wanted.token_ids
    assert stream.completion.finish_reason == "stop"


def test_a_stream_that_is_closed_as_its_loop_reads_a_token_is_whole(
    engine: Engine, model: Model, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, left, closed = engine._run, 3, threading.Event()

    def unless_it_would_end(parts: Sequence[Part]) -> object:
        nonlocal left
        left -= 1
        assert left >= 0 or closed.wait(60)
        return run(parts)

    monkeypatch.setattr(engine, "_run", unless_it_would_end)

    class Closing(list[Token]):
        """Of a stream that is closed when it has the id of a second token, and no more of it."""

        def append(self, token: Token) -> None:
            if len(self) == 1:
                elsewhere(stream.close)
                closed.set()
            super().append(token)

    async def read(stream: Stream) -> None:
        stream.tokens = Closing()
        assert [piece async for piece in stream]

    stream = model.stream(heldout[:9], max_tokens=50, logprobs=2)
    asyncio.run(read(stream))
    done = stream.completion
    assert done is not None
    assert done.logprobs is not None
    assert done.finish_reason == "interrupted"
    assert len(done.token_ids) == len(done.logprobs.tokens) == len(done.logprobs.top) >= 2
    assert done.text == model.detokenize(done.token_ids)


def test_who_waits_for_room_goes_on_as_soon_as_there_is(
    engine: Engine, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.limit(Limits(running=1, waiting=1))
    first, _ = (engine.submit(heldout[:9], 2, Sampling()) for _ in range(2))
    full, found = threading.Event(), list[Generation]()
    wait = engine._changed.wait

    def waits(seconds: float | None = None) -> bool:
        full.set()
        return wait(seconds)

    monkeypatch.setattr(engine._changed, "wait", waits)
    ask = threading.Thread(
        target=lambda: found.append(engine.line_up(heldout[:9], 2, Sampling())), daemon=True
    )
    with engine.turn():  # as where pass follows pass
        ask.start()
        assert full.wait(10)
        first.cancel()
        ask.join(10)
        assert not ask.is_alive()
    assert len(list(found[0])) == 2


def test_a_loop_goes_on_while_a_stream_waits_for_room(
    engine: Engine, model: Model, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.limit(Limits(running=1, waiting=1))

    def blocks(*_: object) -> None:
        raise AssertionError("the event loop waits for a pass, or runs it")

    monkeypatch.setattr(engine, "advance", blocks)
    monkeypatch.setattr("isobit.runtime.generation._AGAIN", 0)

    async def all_of_them() -> list[isobit.Completion]:
        streams = [model.stream(heldout[n : n + 9], max_tokens=2) for n in range(5)]
        return await asyncio.gather(*(stream.completed() for stream in streams))

    assert [len(done.token_ids) for done in asyncio.run(all_of_them())] == [2] * 5


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_progress_is_told_whoever_runs_the_passes(
    in_a_loop: bool,
    engine: Engine,
    model: Model,
    heldout: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, run = list[tuple[int, int]](), engine._run

    def after_it_was_told(parts: Sequence[Part]) -> object:
        done = min(parts[0][0].start, 200)
        for _ in range(20_000):
            if not done or told[-1:] == [(done, 200)]:
                return run(parts)
            time.sleep(0.001)
        raise AssertionError(f"{done} tokens ran, told was {told}")

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    engine.limit(Limits(pass_tokens=64, running=1))
    monkeypatch.setattr(engine, "_run", after_it_was_told)
    engine.start()
    stream = model.stream(heldout[:200], max_tokens=2, progress=tell, salt=None)
    asyncio.run(stream.completed()) if in_a_loop else stream.complete()
    assert told == [(64, 200), (128, 200), (192, 200), (200, 200)]


def test_a_recorder_of_what_waits_for_room_begins_once(engine: Engine, heldout: list[int]) -> None:
    engine.limit(Limits(running=1, waiting=1))
    first, other = (engine.submit(heldout[:9], 2, Sampling()) for _ in range(2))
    recorder = Recorder()
    second = engine.line_up(heldout[:9], 2, Sampling(temperature=1), watch=recorder)
    assert [len(list(g)) for g in (second, first, other)] == [2, 2, 2]
    receipt = recorder.receipt()
    assert len(receipt.tokens) == 2
    assert receipt.sampling["seed"] == second.sampler.seed
    used = engine.model.stream(heldout[:9], watch=recorder)
    with pytest.raises(UsageError, match="watches one generation"):
        next(used)
    assert not engine.scheduler.waiting


def test_an_interruption_leaves_the_others_what_they_get_alone() -> None:
    with isobit.load(HYBRID, backend="cpu", context=256) as model:
        engine = model.generations

        def asked(at: int) -> tuple[Generation, Recorder]:
            recorder, sampling = Recorder(), Sampling(seed=at)
            settings = {"logprobs": 1, "of_prompt": True, "watch": recorder, "salt": None}
            return engine.submit([at] * 70, 6, sampling, **settings), recorder  # type: ignore[arg-type]

        def got(generation: Generation, recorder: Recorder) -> object:
            return list(generation), generation.prompt, recorder.receipt()

        wanted = [got(*asked(at)) for at in (2, 3)]
        for where in ("in the pass", "handing out", "handed out"):
            begun = [asked(at) for at in (1, 2, 3)]
            first = begun[0][0]
            for _ in range(3):
                engine.step()
            while first.take():
                pass
            owner, name = {
                "in the pass": (model.backend, "run"),
                "handing out": (first, "give"),
                "handed out": (engine._books, "_end_if_over"),
            }[where]
            own = getattr(owner, name)

            def interrupted(*given: object, own: Callable[..., object] = own) -> None:
                own(*given)  # states move on
                raise KeyboardInterrupt

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    next(first)
            first.cancel()
            assert [got(*each) for each in begun[1:]] == wanted, where
            engine.scheduler.blocks.check([])


def test_a_stream_that_an_event_loop_left_stands_until_it_is_read_again(
    engine: Engine, model: Model, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = model.generate(heldout[:9], max_tokens=60).token_ids
    monkeypatch.setattr("isobit.runtime.pass_thread._AFTER_READER", 0.0)
    run, passes = engine._run, 0

    def counted(parts: Sequence[Part]) -> object:
        nonlocal passes
        passes += 1
        return run(parts)

    monkeypatch.setattr(engine, "_run", counted)

    async def read() -> Stream:
        async with model.stream(heldout[:9], max_tokens=60) as stream:
            async for _ in stream:
                break
            with engine.turn():
                before = passes
            await asyncio.sleep(0.1)
            assert passes <= before + 1  # which may have been about to begin
            assert [piece async for piece in stream]
        async with model.stream(heldout[:9], max_tokens=60) as left:
            await anext(left)
        assert left.completion is not None
        assert left.completion.finish_reason == "interrupted"
        return stream

    done = asyncio.run(read()).completion
    assert done is not None
    assert done.token_ids == wanted


def test_what_watches_a_pass_cannot_run_another_in_it(
    engine: Engine, model: Model, heldout: list[int]
) -> None:
    class Nesting(Recorder):
        def chose(self, _digest: bytes, _token: int) -> None:
            model.generate(heldout[:9], max_tokens=2)

    wanted = model.generate(heldout[:9], max_tokens=3).token_ids
    nesting = engine.submit(heldout[:9], 3, Sampling(), watch=Nesting())
    beside = engine.submit(heldout[:9], 3, Sampling())
    assert [token.id for token in beside] == wanted
    with pytest.raises(UsageError, match="not by what watches one"):
        list(nesting)


def test_states_that_cannot_be_copied_end_who_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with isobit.load(HYBRID, backend="cpu", context=256) as model:
        engine, prompt = model.generations, [5] * 70
        tokens = list(engine.submit(prompt, 3, Sampling()))

        def broken(*_: int) -> None:
            raise BackendUnavailable("the device is gone")

        with monkeypatch.context() as patch:
            patch.setattr(model.backend, "copy_state", broken)
            with pytest.raises(BackendUnavailable, match="gone"):
                list(engine.submit(prompt, 3, Sampling()))
        engine.scheduler.blocks.check([])
        assert not engine.scheduler.running
        assert list(engine.submit(prompt, 3, Sampling())) == tokens


def test_a_thread_that_is_ended_meanwhile_is_none() -> None:
    class Ended(PassThread):
        def __init__(self) -> None:
            self.threads: Sequence[Any] = [SimpleNamespace(is_alive=lambda: True), None]

        @property
        def _thread(self) -> Any:  # type: ignore[override]
            thread, *self.threads = self.threads
            return thread

    assert Ended().alive
