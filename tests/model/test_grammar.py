"""Answers that are held to a grammar: by the sample model, and of a real vocabulary."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher

import isobit
from isobit.errors import FileRefused, UsageError
from isobit.gguf.reader import GGUFFile
from isobit.runtime.engine import Engine
from isobit.runtime.grammar import Constraint, Grammar, Grammars
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampling
from isobit.text.tokenizer import Tokenizer
from isobit.verify.receipt import Receipt, Recorder, replay

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "size": {"type": "integer"},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
COMPACT = {"whitespace_flexible": False}
JSON = LLMatcher.grammar_from_json_schema(SCHEMA, overrides=COMPACT)


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with isobit.load("sample", backend="cpu", context=512, sequences=4) as model:
        yield model


@pytest.fixture(scope="module")
def grammars(model: Model) -> Grammars:
    return Grammars(model.tokenizer, model.config.vocab, model.stop_ids)


def test_answers_beside_free_ones_fit_and_their_receipts_replay(
    model: Model, grammars: Grammars, tmp_path: Path
) -> None:
    prompt = model.tokenize("def f(x):\n")
    texts = (JSON, regex("[0-9]{3}-[a-f]{2}"), None, regex("(yes|no)"))
    each = []
    with Engine(model) as engine:
        for n, text in enumerate(texts * 2):
            grammar = None if text is None else Grammar(text)
            sampling = Sampling(temperature=n / 4, seed=n, grammar=grammar)
            constraint = grammar and grammars.constraint(grammar)
            recorder = Recorder()
            each.append(
                (
                    engine.submit(prompt, 100, sampling, watch=recorder, constraint=constraint),
                    recorder,
                )
            )
        done = [([t.id for t in generation], generation, r) for generation, r in each]
    for n, (ids, generation, recorder) in enumerate(done):
        answer = model.tokenizer.decode(ids, skip_special=True)
        match n % 4:
            case 0:
                jsonschema.validate(json.loads(answer), SCHEMA)
            case 1:
                assert re.fullmatch("[0-9]{3}-[a-f]{2}", answer)
            case 3:
                assert answer in ("yes", "no")
        if n % 4 != 2:
            assert generation.finish_reason == "stop"
        recorder.receipt().save(tmp_path / "receipt.json")
        receipt = Receipt.load(tmp_path / "receipt.json")
        assert replay(receipt, model) is None
        if n % 4 == 3:
            other = {"text": regex("(maybe|never)")}
            changed = receipt.sampling | {"grammar": receipt.sampling["grammar"] | other}
            found = replay(replace(receipt, sampling=changed), model)
            assert found is not None
            assert found.stage == "sampling"
            broken = receipt.sampling["grammar"] | {"text": regex("(")}
            with pytest.raises(FileRefused, match="grammar"):
                replay(replace(receipt, sampling=receipt.sampling | {"grammar": broken}), model)


def test_a_choice_that_nothing_allows_fails_alone(model: Model, grammars: Grammars) -> None:
    prompt, grammar = model.tokenize("def f(x):\n"), Grammar(regex("[0-9]{9}"))
    constraint = grammars.constraint(grammar)
    with Engine(model) as engine:
        failing = engine.submit(prompt, 9, Sampling(grammar=grammar), constraint=constraint)
        other = engine.submit(prompt, 9, Sampling())
        assert next(failing)
        constraint.error = "too complex"  # as the library says when a limit of its is reached
        with pytest.raises(UsageError, match="grammar: too complex"):
            list(failing)
        assert len(list(other)) == 9


@pytest.mark.parametrize("text", [regex("("), "start: nosuch", "{}", "x" * (1 << 21)])
def test_grammars_that_are_refused(grammars: Grammars, text: str) -> None:
    with pytest.raises(UsageError):
        grammars.constraint(Grammar(text))


def chain(n: int) -> str:
    rules = "\n".join(f'r{i}: "a" r{i + 1}' for i in range(n))
    return f'start: r0\n{rules}\nr{n}: "b"'


def referring(n: int) -> str:
    """A schema whose definitions refer each to the next."""
    each = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(n)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": each | {f"d{n}": {"type": "null"}}}
    return f"start: %json {json.dumps(schema)}"


@pytest.mark.parametrize(
    "text",
    [
        chain(20_000),
        referring(5000),
        "start: " + "(" * 100_000,
        "start: %json " + '{"items":' * 50_000,
        regex("((((((a{9}){9}){9}){9}){9}){9})"),
        "start: s\ns: s s s | " + '"a" | ""',
        regex("ab" * 30_000),
    ],
    ids=["rules", "references", "brackets", "items", "repeated", "ambiguous", "long"],
)
def test_grammars_that_cost_too_much_end_themselves_alone(grammars: Grammars, text: str) -> None:
    """None ends the process: each is refused, or says what is wrong, or works."""
    try:
        constraint = grammars.constraint(Grammar(text))
    except UsageError:
        return
    for _ in range(50):
        row = Allowed(constraint, grammars).row()
        if constraint.error:
            assert not row.any()
            break
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")
        constraint.append(int(np.flatnonzero(bits)[0]))


def test_steps_that_take_too_long_end_an_answer(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraint = grammars.constraint(Grammar(regex("[a-z]*")))
    clock = iter(range(1000))
    monkeypatch.setattr(time, "thread_time", lambda: next(clock) / 10)  # each step takes 0.1 s
    allowed = Allowed(constraint, grammars)
    assert allowed.row().any()
    while not constraint.error:
        allowed.row()
    assert constraint.error == "its steps take too long"
    assert next(clock) < 10
    assert not allowed.row().any()


class Allowed:
    """The tokens that a constraint allows."""

    def __init__(self, constraint: Constraint, grammars: Grammars) -> None:
        self.constraint, self.tokenizer = constraint, grammars.tokenizer
        self.size = grammars.tokenizer.vocab_size
        self.ends = grammars.ends

    def row(self) -> np.ndarray:
        row = np.zeros(-(-self.size // 32), np.uint32)
        self.constraint.fill(row)
        return row

    def all(self) -> set[int]:
        row = self.row()
        return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())

    def says(self, text: str) -> None:
        """Each of its tokens is allowed, one after the other."""
        for token in self.tokenizer.encode(text, special=True, bos=False):
            assert token in self.all(), (text, self.tokenizer.decode([token]))
            self.constraint.append(token)
        assert not self.constraint.error


@pytest.fixture(scope="module")
def qwen() -> Grammars:
    """152k tokens, and tags in place of some of the padding."""
    with GGUFFile.open(Path(__file__).parents[1] / "data/qwen2-vocab.gguf") as file:
        metadata = dict(file.metadata)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    for i, text in enumerate(("<think>", "</think>", "<tool_call>", "</tool_call>")):
        tokens[151665 + i] = text
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.tokens": tokens}, "qwen")
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)


THINK = {"opens": "<think>", "closes": "</think>"}


def test_thinking_is_free_and_what_follows_is_held(qwen: Grammars) -> None:
    grammar = Grammar(regex("[a-c]+"), thinking=True, **THINK)
    allowed = Allowed(qwen.constraint(grammar), qwen)
    allowed.says("Anything, even <think> or {")
    assert not allowed.all() & qwen.ends  # the answer is still to come
    allowed.says("</think>\n\nabc")
    assert allowed.all() >= qwen.ends
    assert all(
        not set(qwen.tokenizer.token_bytes(i)) - set(b"abc") for i in allowed.all() - qwen.ends
    )


def test_an_answer_may_begin_to_think_or_be_held_at_once(qwen: Grammars) -> None:
    grammar = Grammar(regex("[a-c]+"), thinking=None, **THINK)
    allowed = Allowed(qwen.constraint(grammar), qwen)
    before = allowed.all()
    allowed.says("ab")
    assert before - allowed.all() == {qwen.special["<think>"]}
    allowed = Allowed(qwen.constraint(grammar), qwen)
    allowed.says("<think>x</think>abc")


def test_calls_are_held_and_text_is_free(qwen: Grammars) -> None:
    text = 'start: "\\n" /[0-9]+/ "\\n" <tool_call_end>'.replace(
        "<tool_call_end>", f"<[{qwen.special['</tool_call>']}]>"
    )
    grammar = Grammar(text, thinking=None, call="<tool_call>", **THINK)
    constraint = qwen.constraint(grammar)
    allowed = Allowed(constraint, qwen)
    allowed.says("<think>\n<tool_call> no call\n</think>\n\nText <tool")
    assert constraint.free
    allowed.says("<tool_call>\n12")
    assert not constraint.free
    assert not allowed.all() & qwen.ends
    allowed.says("3\n</tool_call>")
    assert constraint.free
    allowed.says("\n<tool_call>\n4\n</tool_call> Text.")
    assert allowed.all() >= qwen.ends


def test_tags_that_are_no_tokens_are_found_in_text(grammars: Grammars, model: Model) -> None:
    grammar = Grammar('start: /\\s*/ "call(" /[0-9]/ ")"', call="<tool_call>")
    constraint = grammars.constraint(grammar)
    allowed = Allowed(constraint, grammars)
    allowed.says("a <tool_ <tool_call>call(")
    assert not constraint.free
    assert {model.tokenizer.decode([i]) for i in allowed.all()} <= {*"0123456789"} | {
        f"{i})" for i in range(10)
    }
    allowed.says("1) and")
    assert constraint.free
