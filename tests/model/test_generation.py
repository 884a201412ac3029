"""Generation through the library, on the sample model."""

import struct
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import isobit
from isobit.config import EngineConfig
from isobit.errors import GateFailed, ModelRefused, UsageError
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.numerics import log_softmax, top_logprobs
from isobit.runtime.model import Model
from isobit.verify.ablate import Ablation
from tests.helpers.synth import write_model

PROMPT = "def fibonacci(n):\n"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with isobit.load("sample", backend="cpu") as m:
        yield m


def test_a_stream_is_the_completion_in_pieces(model: Model) -> None:
    with model.stream(PROMPT, max_tokens=30) as stream:
        pieces = list(stream)
    done = stream.completion
    assert done is not None
    assert "".join(pieces) == done.text == model.detokenize(done.token_ids)
    assert (done.finish_reason, len(done.token_ids), done.note) == ("length", 30, None)
    assert done.timings.prefill_tokens == len(model.tokenize(PROMPT))
    assert done.timings.decode_tokens == 29
    assert done.timings.decode_rate > 0
    assert model.generate(PROMPT, max_tokens=30).token_ids == done.token_ids
    assert model.generate(PROMPT, max_tokens=0).timings.prefill_tokens == 0  # nothing was run


def test_a_stop_string_ends_the_text_before_it(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=30).text
    stop = whole[12:15]
    done = model.generate(PROMPT, max_tokens=30, stop=["never", stop])
    assert done.finish_reason == "stop"
    assert done.text == whole[: whole.index(stop)]
    assert stop not in "".join(model.stream(PROMPT, max_tokens=30, stop=stop))


def test_the_stop_string_that_comes_first_counts(model: Model) -> None:
    pieces = list(model.stream(PROMPT, max_tokens=30))
    before, piece = next(
        ("".join(pieces[:i]), p)
        for i, p in enumerate(pieces)
        if len(p) > 2 and not set(p[1:3]) & {*"".join(pieces[:i]), p[0]}
    )
    done = model.generate(PROMPT, max_tokens=30, stop=[piece[2], piece[1]])
    assert done.text == before + piece[0]


def test_the_penalty_sees_what_was_generated(model: Model) -> None:
    plain = model.generate(PROMPT, max_tokens=20).token_ids
    penalised = model.generate(PROMPT, max_tokens=20, repeat_penalty=1e6).token_ids
    assert len(set(plain)) < 20 == len(set(penalised))


def test_half_a_character_at_the_end_is_shown(small_model: Path) -> None:
    """Random weights write random bytes, and end on any of them."""
    ends = 0
    with isobit.load(small_model, backend="cpu") as random:
        for seed in range(20):
            done = random.generate([65], max_tokens=3, temperature=2.0, seed=seed)
            text = random.tokenizer.decode(done.token_ids, skip_special=True)
            assert done.text == text
            ends += text.endswith("\ufffd")
    assert ends


def test_sampling_repeats_with_its_reported_seed(model: Model) -> None:
    first = model.generate(PROMPT, max_tokens=12, temperature=1.5)
    again = model.generate(PROMPT, max_tokens=12, temperature=1.5, seed=first.seed)
    assert again.token_ids == first.token_ids


def test_logprobs_are_those_of_the_logits(model: Model) -> None:
    ids = model.tokenize(PROMPT)
    done = model.generate(ids, max_tokens=9, temperature=1.5, seed=3, logprobs=4)
    assert done.token_ids == model.generate(ids, max_tokens=9, temperature=1.5, seed=3).token_ids
    logits = model.logits(ids + done.token_ids)[len(ids) - 1 : -1]
    every = log_softmax(logits)
    assert done.logprobs is not None
    assert done.logprobs.tokens.tobytes() == every[np.arange(9), done.token_ids].tobytes()
    top_ids, top = top_logprobs(logits, 4)
    assert np.array_equal(done.logprobs.top_ids, top_ids)
    assert done.logprobs.top.tobytes() == top.tobytes()
    greedy = model.generate(ids, max_tokens=9, logprobs=0).logprobs
    assert greedy is not None
    assert greedy.top.shape == (9, 0)
    nothing = model.generate(ids, max_tokens=0, logprobs=2).logprobs
    assert nothing is not None
    assert (nothing.tokens.shape, nothing.top_ids.shape) == ((0,), (0, 2))


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_scores_are_the_logprobs_of_a_generation(chunk: int, model: Model) -> None:
    prompt = model.tokenize(PROMPT)
    done = model.generate(prompt, max_tokens=20, temperature=1.2, seed=3, logprobs=0)
    assert done.logprobs is not None
    with Model("sample", "cpu", EngineConfig(chunk=chunk)) as other:
        assert other.score(prompt, done.token_ids).tobytes() == done.logprobs.tokens.tobytes()
        for split in (1, 5):
            whole = prompt + done.token_ids
            got = other.score(whole[:split], whole[split:])
            assert got[len(prompt) - split :].tobytes() == done.logprobs.tokens.tobytes()
        assert other.score(prompt, []).shape == (0,)
        for wrong in (([], [5]), ([5], [8192]), ([5], [5] * other.context)):
            with pytest.raises(UsageError):
                other.score(*wrong)


def test_a_bias_decides(model: Model) -> None:
    assert model.generate(PROMPT, max_tokens=3, logit_bias={5: 1000.0}).token_ids == [5, 5, 5]
    for wrong in ({8192: 1.0}, {-1: 1.0}, {5: float("nan")}):
        with pytest.raises(UsageError, match="logit_bias"):
            model.generate(PROMPT, max_tokens=1, logit_bias=wrong)


def test_a_full_context_ends_with_length_and_says_so() -> None:
    with isobit.load("sample", backend="cpu", context=20) as small:
        n = len(small.tokenize(PROMPT))
        done = small.generate(PROMPT, max_tokens=None)
        assert (done.finish_reason, len(done.token_ids)) == ("length", 20 - n)
        assert done.note == "the context of 20 tokens is full"
        with pytest.raises(UsageError, match="at most 20 tokens"):
            small.generate([5] * 21)


def test_prompts_that_are_refused(model: Model) -> None:
    for prompt in ("", [], [8192], [-1]):
        with pytest.raises(UsageError):
            model.generate(prompt, max_tokens=1)
    with pytest.raises(UsageError, match="max_tokens"):
        model.generate(PROMPT, max_tokens=-1)


@pytest.fixture
def small() -> Iterator[Model]:
    """A model whose KV cache holds four sequences of 128 positions."""
    with isobit.load("sample", backend="cpu", context=128) as m:
        yield m


def test_closing_streams_frees_their_pages(small: Model) -> None:
    for _ in range(9):
        stream = small.stream([5] * 70, max_tokens=4)
        next(stream)
        stream.close()


def test_threads_get_what_one_thread_gets(model: Model) -> None:
    prompts = [PROMPT, "import os\n", "class Stack:\n", "for i in "]
    alone = [model.generate(p, max_tokens=20).token_ids for p in prompts]
    together: list[list[int]] = [[] for _ in prompts]

    def work(i: int) -> None:
        together[i] = model.generate(prompts[i], max_tokens=20).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert together == alone


def test_a_closed_model_keeps_nothing_large() -> None:
    """Though it is still known, as by a cycle until the collector comes to it."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        with isobit.load("sample", "reference") as model:
            model.logits(PROMPT)
            held, _ = tracemalloc.get_traced_memory()
        after, _ = tracemalloc.get_traced_memory()
        assert "closed" in repr(model)
    finally:
        tracemalloc.stop()
    assert held - before > 50e6
    assert after - before < 10e6


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_closed_model_says_so(backend: str) -> None:
    with isobit.load("sample", backend) as closed:
        stream = closed.stream(PROMPT)
    for call in (lambda: closed.logits([1, 2]), lambda: next(stream)):
        with pytest.raises(UsageError, match="expected an open model, got a closed one"):
            call()
    closed.close()


def test_a_pass_that_fails_takes_no_positions(small: Model) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("planted")

    with small.new_sequence() as sequence:
        first = small.forward(sequence, [5, 6], [1])
        with pytest.raises(MemoryError, match="planted"):
            small.forward(sequence, [7, 8], [1], fail)
        assert sequence.length == 2
        after = small.forward(sequence, [9], [0])
    with small.new_sequence() as sequence:
        assert small.forward(sequence, [5, 6], [1]).tobytes() == first.tobytes()
        assert small.forward(sequence, [9], [0]).tobytes() == after.tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_logit_that_is_no_number_ends_it(
    value: float, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.zeros((1, 8192), np.float32)
    logits[0, 5] = value
    real = type(model.backend)
    monkeypatch.setattr(real, "compute", lambda self, _b, w, *_: self._measured(logits, w))
    for temperature in (0, 1):
        with pytest.raises(ModelRefused, match="expected finite logits"):
            model.generate([1], max_tokens=1, temperature=temperature)
    assert not model.generations.scheduler.running


def test_damaged_weights_are_an_error_without_warnings(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = write_model(tmp_path / "m.gguf")
    with GGUFFile.open(path) as file:
        norm = file.tensors["blk.0.ffn_norm.weight"]
    data = bytearray(path.read_bytes())
    data[norm.offset : norm.offset + norm.nbytes] = struct.pack("<f", 3e38) * 256
    path.write_bytes(data)
    with isobit.load(path, "reference") as damaged:
        with pytest.raises(ModelRefused, match="expected finite logits"):
            damaged.logits([1, 2, 3])
        with pytest.raises(GateFailed, match="expected finite logits"):
            Ablation(Weights.from_file(damaged.file), [[1, 2, 3]])
    assert not recwarn.list


def test_closing_waits_for_the_pass_of_another_thread() -> None:
    model = isobit.load("sample", "cpu")
    started, errors = threading.Event(), []

    def generate() -> None:
        try:
            while True:
                model.generate(PROMPT, max_tokens=4)
                started.set()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait()
    model.close()
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == [UsageError] * 3


@pytest.mark.parametrize("ids", ["", [1.5], ["1"], [None], [1 << 80], [-1], [], 5, None])
def test_ids_that_are_none(ids: object, model: Model) -> None:
    with pytest.raises(UsageError):
        model.logits(ids)  # type: ignore[arg-type]


def test_a_keyword_that_is_none_is_refused_in_the_name_of_what_was_called(model: Model) -> None:
    messages = [{"role": "user", "content": "a"}]
    for method, call in (
        ("generate", lambda: model.generate("a", max_toks=2)),
        ("generate", lambda: model.generate([], max_toks=2)),
        ("chat", lambda: model.chat(messages, max_toks=2)),
    ):
        said = rf"^Model\.{method}\(\) .* argument 'max_toks'; did you mean 'max_tokens'\?$"
        with pytest.raises(TypeError, match=said):
            call()
    with pytest.raises(TypeError, match=r"^Model\.chat_ids\(\) .* 'tolls'; did you mean 'tools'"):
        model.chat_ids(messages, tolls=[])
