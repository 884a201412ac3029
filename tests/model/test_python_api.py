"""The library as a caller meets it: discovery, types, batches, threads, files without text."""

import io
import json
import pydoc
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import isobit
from isobit import Model
from isobit.cli import main
from isobit.config import EngineConfig
from isobit.errors import ContextFull, IsobitError, ModelRefused, UsageError
from isobit.runtime.detokenizer import StopText
from isobit.server.request.chat import begun
from isobit.server.request.fields import ChatRequest
from isobit.verify.trace import record
from tests.helpers.synth import write_model

PROMPTS = ["def fibonacci(n):\n", "import os\n", "class Stack:\n"]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with isobit.load("sample", backend="cpu") as m:
        yield m


def test_what_is_public_can_be_found() -> None:
    code = "import isobit; print(*dir(isobit)); print(isobit.errors.UsageError.exit_code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(isobit.__all__) <= set(done.stdout.split())
    out = io.StringIO()
    pydoc.Helper(output=out).help(isobit)
    for name in ("load(", "class Model", "class Completion", "temperature"):
        assert name in out.getvalue()
    for name in isobit.__all__:
        assert getattr(isobit, name) is not None
    with pytest.raises(AttributeError):
        _ = isobit.nothing


def test_importing_is_quick() -> None:
    code = "import isobit, sys; assert not {'numpy', 'tokenizers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_shows_what_it_is() -> None:
    with isobit.load("sample", "cpu", context=64, activation_bits=8) as m:
        shown = repr(m)
        assert all(
            word in shown
            for word in ("qwen3moe", "cpu", "context 64", "activation_bits 8", ".gguf")
        )
        assert "closed" not in shown
    assert "closed" in repr(m)


def test_rows_of_logits_are_those_of_all(model: Model) -> None:
    ids = model.tokenize("def f(x):\n    return x\n" * 100)
    assert len(ids) > model.engine.chunk
    whole = model.logits(ids)
    for rows in ([-1], [3, 0, 3, -2], slice(5, 9), slice(-2, None), [], range(510, 514)):
        expected = whole[list(rows)] if not isinstance(rows, slice) else whole[rows]
        assert model.logits(ids, rows).tobytes() == expected.tobytes()
    text = model.logits("def f(x):", rows=[-1])
    assert text.tobytes() == model.logits(model.tokenize("def f(x):"))[-1:].tobytes()
    for wrong in ([len(ids)], [-len(ids) - 1], [1.5], ["1"], 5, [None]):
        with pytest.raises(UsageError, match="rows: expected"):
            model.logits(ids, wrong)  # type: ignore[arg-type]


def test_a_batch_gives_what_each_prompt_gives(model: Model) -> None:
    alone = [model.generate(p, max_tokens=6, temperature=1.0, seed=3) for p in PROMPTS]
    for batch in (PROMPTS, [model.tokenize(p) for p in PROMPTS]):
        done = model.generate(batch, max_tokens=6, temperature=1.0, seed=3)
        assert [d.token_ids for d in done] == [a.token_ids for a in alone]
        assert [d.text for d in done] == [a.text for a in alone]
    [one] = model.generate(PROMPTS[:1], max_tokens=2)
    assert one.token_ids == model.generate(PROMPTS[0], max_tokens=2).token_ids
    for wrong in ([PROMPTS[0], ""], [[1], []], [[1], [8192]], [PROMPTS[0], 5], [[]]):
        with pytest.raises(UsageError):
            model.generate(wrong, max_tokens=1)  # type: ignore[arg-type]
    rows = np.array([[1, 2], [3, 4]])
    assert len(model.generate(rows, max_tokens=1)) == 2  # type: ignore[call-overload]


def _of_another(m: Model) -> object:
    with isobit.load("sample", backend="cpu", threads=1, context=64) as other:
        return other.forward(m.new_sequence(), [1])


WRONG: dict[str, Callable[[Model], object]] = {
    "bytes": lambda m: m.generate(b"abc"),
    "bytearray": lambda m: m.logits(bytearray(b"abc")),
    "truth as ids": lambda m: m.generate([True]),
    "a watcher": lambda m: m.generate("x", watch=3),  # type: ignore[arg-type]
    "a number to score": lambda m: m.score(5),  # type: ignore[call-overload]
    "a number as continuation": lambda m: m.score("x", 5),  # type: ignore[call-overload]
    "a text as continuations": lambda m: m.score(["a", "b"], "xy"),  # type: ignore[call-overload]
    "no prompt": lambda m: m.generate(None),  # type: ignore[call-overload]
    "max_tokens": lambda m: m.generate("x", max_tokens="3"),  # type: ignore[arg-type]
    "max_tokens flag": lambda m: m.generate("x", max_tokens=True),
    "max_tokens part": lambda m: m.generate("x", max_tokens=1.0),  # type: ignore[arg-type]
    "temperature": lambda m: m.generate("x", temperature="1"),  # type: ignore[arg-type]
    "temperature nan": lambda m: m.generate("x", temperature=float("nan")),
    "top_p": lambda m: m.generate("x", top_p=None),  # type: ignore[arg-type]
    "top_k": lambda m: m.generate("x", top_k=True),
    "seed": lambda m: m.generate("x", seed="1"),  # type: ignore[arg-type]
    "stop": lambda m: m.generate("x", stop=5),  # type: ignore[arg-type]
    "stop items": lambda m: m.generate("x", stop=[5]),  # type: ignore[list-item]
    "stop bytes": lambda m: m.generate("x", stop=b"x"),  # type: ignore[arg-type]
    "detokenize": lambda m: m.detokenize(["x"]),  # type: ignore[list-item]
    "tokenize": lambda m: m.tokenize(b"x"),  # type: ignore[arg-type]
    "chat": lambda m: m.chat("hello"),  # type: ignore[arg-type]
    "tools": lambda m: m.chat([{"role": "user", "content": "x"}], tools="f"),  # type: ignore[arg-type]
    "variables": lambda m: m.chat_ids(
        [{"role": "user", "content": "x"}], chat_template_kwargs={"messages": []}
    ),
    "load": lambda _: isobit.load(None),  # type: ignore[arg-type]
    "load number": lambda _: isobit.load(3),  # type: ignore[arg-type]
    "backend": lambda _: isobit.load("sample", ["cpu"]),  # type: ignore[arg-type]
    "bits": lambda _: isobit.load("sample", activation_bits=True),
    "bits part": lambda _: isobit.load("sample", activation_bits=16.0),  # type: ignore[arg-type]
    "threads": lambda _: isobit.load("sample", threads=True),
    "context": lambda _: isobit.load("sample", context="9"),  # type: ignore[arg-type]
    "sequences": lambda _: isobit.load("sample", sequences=None),  # type: ignore[arg-type]
    "a stage": lambda m: record(m, [1], frozenset({"lm_head"}))["nosuch", 3],
    "a layer": lambda m: record(m, [1], frozenset({"lm_head"}))["lm_head", 10**5000],
    "no pair": lambda m: record(m, [1], frozenset({"lm_head"}))["lm_head"],  # type: ignore[index]
    "another's sequence": _of_another,
    "a sequence twice": lambda m: m.step([s := m.new_sequence(), s], [1, 2]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_are_usage_errors(name: str, model: Model) -> None:
    with pytest.raises(UsageError) as caught:
        WRONG[name](model)
    assert len(str(caught.value)) < 200


def test_a_path_that_no_system_takes_is_refused() -> None:
    for path in ("x" * 5000, Path("x" * 5000), "a\0b", ""):
        with pytest.raises(ModelRefused) as caught:
            isobit.load(path, "cpu")
        assert len(str(caught.value)) < 200


def test_only_the_word_is_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("sample"), Path("./sample"), "./sample"):
        with pytest.raises(ModelRefused, match="no such file: 'sample'; the model that"):
            isobit.load(path, "cpu")


def test_variables_reach_the_template(tmp_path: Path) -> None:
    template = (
        "{{ enable_thinking }}{{ tools[0].name }}{{ documents[0].text }}<|im_end|>"
        "{{ messages[0].content }}"
    )
    path = write_model(tmp_path / "m.gguf", metadata={"tokenizer.chat_template": template})
    said = [{"role": "user", "content": "hi"}]
    with isobit.load(path, "cpu") as m:
        more = {"enable_thinking": False}
        given = {"tools": [{"name": "f"}], "documents": [{"text": "t"}]}
        ids = m.chat_ids(said, chat_template_kwargs=more, **given)  # type: ignore[arg-type]
        assert m.detokenize(ids) == "Falseft<|im_end|>hi"
        answer = m.chat(said, chat_template_kwargs=more, max_tokens=2, **given)  # type: ignore[arg-type]
        assert answer.timings.prefill_tokens == len(ids)


def test_a_text_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    template = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    said = [{"role": "user", "content": text} for text in ("hi", "and more")]
    path = write_model(tmp_path / "m.gguf", metadata=template)
    wanted = r"messages\[1\]: expected what the model's chat template writes"
    with isobit.load(path, "cpu") as m, pytest.raises(UsageError, match=wanted):
        m.chat_ids(said)


def test_a_chat_beyond_the_context_is_refused() -> None:
    with (
        isobit.load("sample", "cpu", context=20) as m,
        pytest.raises(UsageError, match="at most 20 tokens"),
    ):
        m.chat([{"role": "user", "content": "word " * 1000}])


def test_a_stop_that_is_a_special_token_stops_at_its_id(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eos_token_id": None})
    with isobit.load(path, "cpu") as m:
        special = m.tokenizer.vocabulary.control
        text, token = next((t, i) for t, i in special.items() if i not in m.stop_ids)
        for seed in range(1000):
            whole = m.generate([65], max_tokens=40, temperature=3.0, seed=seed)
            if token in whole.token_ids[1:]:
                break
        n = whole.token_ids.index(token) + 1
        done = m.generate([65], max_tokens=40, temperature=3.0, seed=seed, stop=text)
        assert (done.token_ids, done.finish_reason) == (whole.token_ids[:n], "stop")
        assert done.text == m.tokenizer.decode(whole.token_ids[:n], skip_special=True)


NO_TOKENIZER: dict[str, object] = {
    f"tokenizer.ggml.{key}": None for key in ("model", "pre", "tokens", "token_type", "merges")
}


def without_tokenizer(path: Path) -> Path:
    return write_model(path, metadata=NO_TOKENIZER)


def test_token_ids_go_on_without_a_tokenizer(tmp_path: Path) -> None:
    with isobit.load(write_model(tmp_path / "a.gguf"), "cpu") as m:
        expected = m.generate([65, 66], max_tokens=8).token_ids
    with isobit.load(without_tokenizer(tmp_path / "b.gguf"), "cpu") as m:
        done = m.generate([65, 66], max_tokens=8)
        assert (done.token_ids, done.text) == (expected, "")
        assert "no text" in str(done.note)
        for call in (
            lambda: m.generate("text"),
            lambda: m.generate([65], stop="x"),
            lambda: m.chat([{"role": "user", "content": "x"}]),
        ):
            with pytest.raises(ModelRefused, match="use token ids"):
                call()


def test_run_prints_ids_where_there_is_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = without_tokenizer(tmp_path / "b.gguf")
    with isobit.load(path, "cpu") as m:
        expected = m.generate([65, 66], max_tokens=8).token_ids
        with m.stream([65, 66], max_tokens=8) as stream:
            told = [len(stream.token_ids) for _ in stream]
    assert told == list(range(1, len(expected) + 1)), "each as soon as it is chosen"
    argv = ["run", str(path), "--backend", "cpu", "--tokens", "65,66", "-n", "8"]
    assert main(argv) == 0
    assert list(map(int, capsys.readouterr().out.split("\n")[:-1])) == expected
    assert main([*argv, "--jsonl"]) == 0
    *events, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert [e["id"] for e in events] == done["token_ids"] == expected


def test_without_a_tokenizer_the_keys_end_an_answer(tmp_path: Path) -> None:
    with isobit.load(without_tokenizer(tmp_path / "b.gguf"), "cpu") as m:
        third = m.generate([65], max_tokens=8).token_ids[2]
    keys = NO_TOKENIZER | {"tokenizer.ggml.eos_token_ids": [third]}
    with isobit.load(write_model(tmp_path / "c.gguf", metadata=keys), "cpu") as m:
        done = m.generate([65], max_tokens=8)
        assert (done.finish_reason, done.token_ids[-1]) == ("stop", third)
        assert len(done.token_ids) <= 3


def test_more_threads_than_sequences_lose_no_text() -> None:
    with isobit.load("sample", "cpu", context=128, sequences=2, threads=1) as m:
        alone = [m.generate(p, max_tokens=100).token_ids for p in PROMPTS]
        together: list[list[int]] = [[] for _ in range(12)]
        errors: list[BaseException] = []

        def work(i: int) -> None:
            try:
                together[i] = m.generate(PROMPTS[i % 3], max_tokens=100).token_ids
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not errors
        assert together == [alone[i % 3] for i in range(12)]


def test_streams_that_are_held_open_make_way() -> None:
    with isobit.load("sample", "cpu", context=128, sequences=1) as m:
        with m.stream(PROMPTS[0], max_tokens=100) as held:
            first = next(held)
            alone = m.generate("x", max_tokens=100).token_ids  # runs the other to its end
            assert m.logits([1] * 128).shape == (128, m.config.vocab)
            rest = list(held)
        assert held.completion is not None
        assert first + "".join(rest) == held.completion.text
        assert len(held.completion.token_ids) == 100
        assert m.generate("x", max_tokens=100).token_ids == alone


def test_sequences_that_are_held_open_do_not() -> None:
    with isobit.load("sample", "cpu", context=128, sequences=1) as m:
        with m.new_sequence() as held:
            m.prefill(held, [5] * 100)
            with pytest.raises(ContextFull, match="sequences that hold it"):
                m.generate("x", max_tokens=100)
        stream = m.stream("x", max_tokens=100)
        next(stream)
        with m.new_sequence() as late, pytest.raises(ContextFull, match="more sequences"):
            m.forward(late, [5])
        assert len(stream.complete().token_ids) == 100


def test_a_stream_that_nobody_can_read_ends() -> None:
    with isobit.load("sample", "cpu", context=128, sequences=2) as m:
        stream = m.stream(PROMPTS[0], max_tokens=None)
        next(stream)
        del stream
        m.generate("x", max_tokens=2)
        assert not m.generations.scheduler.running


def test_another_thread_may_close_a_stream() -> None:
    with isobit.load("sample", "cpu") as m:
        stream = m.stream(PROMPTS[0], max_tokens=3000)
        pieces: list[str] = []
        begun = threading.Event()

        def read() -> None:
            for piece in stream:
                pieces.append(piece)
                begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        begun.wait()
        stream.close()
        reader.join()
        assert stream.completion is not None
        assert stream.completion.finish_reason == "interrupted"
        assert stream.completion.text == "".join(pieces)
        assert len(stream.completion.token_ids) < 3000
        assert list(stream) == []
        unread = m.stream(PROMPTS[0])
        unread.close()
        with pytest.raises(UsageError, match="was closed"):
            unread.complete()
        # Its pages are free again: all sequences fit.
        held = [m.stream([5], max_tokens=None) for _ in range(m.engine.max_sequences)]
        for each in held:
            next(each)
        for each in held:
            each.close()


def test_a_stream_closed_while_it_waits_for_pages_comes_to_its_end() -> None:
    """Not to ContextFull, as if nobody had closed it."""
    with isobit.load("sample", "cpu", context=64, sequences=1) as m:
        running = m.stream([5], max_tokens=40)
        next(running)  # holds all pages
        stream = m.stream([6], max_tokens=40)
        found: list[object] = []

        def read() -> None:
            try:
                found.extend(stream)
            except IsobitError as error:
                found.append(error)

        with m.generations.turn():  # nobody runs a pass meanwhile
            reader = threading.Thread(target=read)
            reader.start()
            reader.join(0.3)
            waited = reader.is_alive()
            stream.close()
        reader.join()
        running.close()
    assert waited
    assert found == []
    assert stream.completion is not None
    assert stream.completion.finish_reason == "interrupted"


def test_an_exception_leaves_what_there_was() -> None:
    class Stops:
        stages: frozenset[str] = frozenset()
        seen = 0

        def begin(self, *_: object) -> None:
            pass

        tap = begin

        def chose(self, *_: object) -> None:
            self.seen += 1
            if self.seen == 5:
                raise KeyboardInterrupt

    done: list[tuple[int, int]] = []
    with isobit.load("sample", "cpu") as m:
        expected = m.generate(PROMPTS[0], max_tokens=4).text
        stream = m.stream(
            PROMPTS[0], max_tokens=9, watch=Stops(), progress=lambda *n: done.append(n)
        )
        with pytest.raises(KeyboardInterrupt):
            list(stream)
        n = len(m.tokenize(PROMPTS[0]))
    assert stream.completion is not None
    assert (stream.completion.finish_reason, stream.completion.text) == ("interrupted", expected)
    assert done == [(n, n)]


def test_two_threads_may_read_one_stream() -> None:
    with isobit.load("sample", "cpu") as m:
        expected = m.generate(PROMPTS[0], max_tokens=60).text
        stream = m.stream(PROMPTS[0], max_tokens=60)
        pieces: list[str] = []
        threads = [threading.Thread(target=lambda: pieces.extend(stream)) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert stream.completion is not None
        assert stream.completion.text == expected
        assert sorted("".join(pieces)) == sorted(expected)


def stopped_naively(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    """The text before the string that is complete first, the longest of those."""
    text = "".join(pieces)
    for end in range(1, len(text) + 1):
        whole = [s for s in stop if s and text[:end].endswith(s)]
        if whole:
            return text[: end - max(map(len, whole))], True
    return text, False


def test_stop_strings_are_found_however_the_text_is_cut() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(2000):
        stop = ["".join(rng.choices("ab", k=rng.randrange(6))) for _ in range(rng.randrange(4))]
        pieces = ["".join(rng.choices("abc", k=rng.randrange(5))) for _ in range(8)]
        found = StopText(stop)
        sent = ""
        for pieces_seen, piece in enumerate(pieces, start=1):
            sent += found.push(piece)
            if found.stopped:
                break
            # What is held back might be the beginning of one, and nothing else is.
            held = "".join(pieces[:pieces_seen]).removeprefix(sent)
            assert not held or any(s.startswith(held) for s in stop)
        else:
            sent += found.flush()
        assert (sent, found.stopped) == stopped_naively(pieces, stop)
        assert found.all == sent


def test_the_work_for_long_stop_strings_is_linear() -> None:
    # Comparing every beginning with every end would take hours here.
    found = StopText(["x" * 300_000, "ab" * 200_000 + "c", "x" * 299_999 + "y"])
    assert "".join(found.push("xxxx") for _ in range(60_000)) == ""
    assert found.push("ab" * 10).startswith("x" * 240_000)
    assert found.push("x" * 400_000) == "ab" * 10
    assert found.stopped


@pytest.mark.parametrize("call", [lambda m: m.generate([1], max_tokens=1), repr])
def test_a_closed_model_is_no_trap(call: Callable[[Model], object]) -> None:
    closed = Model("sample", "cpu", EngineConfig(context=64))
    closed.close()
    try:
        call(closed)
    except IsobitError as error:
        assert "closed" in str(error)  # noqa: PT017


def test_messages_are_what_they_are_to_the_server() -> None:
    question = {"role": "user", "content": "How warm is it?"}
    function = {"name": "weather", "arguments": '{"zone": 3}'}
    call = {"id": "a", "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": "a", "content": "20"}
    asked = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        question,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        result,
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        result,
    ]
    with isobit.load("sample", backend="cpu", context=256) as model:
        assert model.chat_ids(asked) == model.chat_ids(plain)
        for tools in (None, [{"type": "function", "function": {"name": "weather"}}]):
            ids = model.chat_ids(asked, tools=tools)
            assert ids == begun(model, ChatRequest(messages=asked, tools=tools)).prompt
            text = model.detokenize(ids)  # in words: the sample's template knows no tools
            assert '{"name": "weather", "arguments": {"zone": 3}}' in text
            assert ('{"name": "weather", "parameters": {' in text) == (tools is not None)
        for wrong in ([{}], [{"function": 3}]):
            with pytest.raises(UsageError, match=r"tools\[0\].name: expected the name of a"):
                model.chat_ids(asked, tools=wrong)
        with pytest.raises(UsageError, match=r'messages\[0\]: expected a mapping with a "role"'):
            model.chat_ids([3])  # type: ignore[list-item]
