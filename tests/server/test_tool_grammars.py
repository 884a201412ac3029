"""Whatever a model says within a grammar of calls is read as a call that fits its schema."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest

from isobit.errors import UsageError
from isobit.runtime.grammar import Constraint, Grammars
from isobit.runtime.model import Model
from isobit.server.parsing.events import gathered
from isobit.server.parsing.reading import AnswerReader
from isobit.server.parsing.thinking import Thinking
from isobit.server.request.formats import Format
from isobit.server.request.grammars import pattern_of
from isobit.server.tool_calls.dialects import Dialect, dialect_of
from isobit.server.tool_calls.harmony import Harmony
from isobit.server.tool_calls.llama import Llama
from isobit.server.tool_calls.tagged import Hermes, QwenXml
from isobit.server.tool_calls.tools import Choice, Tool

TOOLS = (
    Tool(
        "search",
        {
            "type": "object",
            "properties": {
                "text": {"type": "string", "maxLength": 30},
                "most": {"type": "integer", "minimum": 1, "maximum": 99},
                "kind": {"enum": ["a", "b c"]},
                "deep": {"type": "boolean"},
                "ids": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
                "by": {"$ref": "#/$defs/by"},
            },
            "required": ["text", "most"],
            "additionalProperties": False,
            "$defs": {"by": {"type": ["number", "null"]}},
        },
        strict=True,
    ),
    Tool("now"),
    Tool("free", {"type": "object", "properties": {"any": {}}, "required": ["any"]}),
)
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
DIALECTS = [Hermes(TOOLS), QwenXml(TOOLS), Llama(TOOLS), Harmony()]
ENDS = ["<|end|>", "\n</parameter>\n", '"', "}", "</tool_call>", "<|im_end|>"]


@pytest.fixture(scope="module")
def grammars(alone: Model) -> Grammars:
    return alone.grammars


def compiled(grammars: Grammars, **asked: Any) -> Constraint:
    asked = {"form": None, **asked}
    pattern = asyncio.run(pattern_of(SimpleNamespace(grammars=grammars), **asked))  # type: ignore
    assert pattern is not None
    return pattern.fresh()


def allowed(constraint: Constraint, grammars: Grammars) -> np.ndarray:
    row = np.zeros(-(-grammars.tokenizer.vocab_size // 32), np.uint32)
    constraint.fill(row)
    assert not constraint.error
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


def wander(constraint: Constraint, grammars: Grammars, rng: np.random.Generator) -> list[int]:
    """Tokens at random among those that are allowed; now and then one that leads to an end."""
    ids: list[int] = []
    while len(ids) < 600:
        if rng.random() < 0.3:
            wanted = grammars.tokenizer.encode(
                ENDS[rng.integers(len(ENDS))], special=True, bos=False
            )
            for token in wanted:
                if token in allowed(constraint, grammars):
                    ids.append(token)
                    constraint.append(token)
                    if token in grammars.ends:
                        return ids
                else:
                    break
        token = int(rng.choice(allowed(constraint, grammars)))
        ids.append(token)
        if token in grammars.ends:
            return ids
        constraint.append(token)
    return ids


def read(ids: list[int], grammars: Grammars, dialect: Dialect) -> Any:
    reader = AnswerReader({}, None, dialect)
    ended = bool(ids) and ids[-1] in grammars.ends
    text = grammars.tokenizer.decode(ids[:-1] if ended else ids, skip_special=True)
    return gathered([*reader.push(text), *reader.flush()]), text, ended


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: type(d).__name__)
def test_what_is_said_within_a_grammar_is_a_call_that_fits(
    dialect: Dialect, grammars: Grammars, rng: np.random.Generator
) -> None:
    whole = 0
    choice = Choice("required", TOOLS)
    for _ in range(25):
        constraint = compiled(grammars, dialect=dialect, choice=choice)
        answer, text, ended = read(wander(constraint, grammars, rng), grammars, dialect)
        assert answer.calls, text
        assert not ended or answer.text == "", text
        for call in answer.calls:
            if call.complete:
                whole += 1
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        assert not ended or answer.calls[-1].complete, text
    assert whole > 10


@pytest.mark.parametrize("dialect", [*DIALECTS[:2], DIALECTS[3]], ids=lambda d: type(d).__name__)
def test_calls_within_text(dialect: Dialect, grammars: Grammars, rng: np.random.Generator) -> None:
    choice, said = Choice("auto", TOOLS), "" if dialect.framed else "Text.\n"
    whole = 0
    for _ in range(25):
        constraint = compiled(grammars, dialect=dialect, choice=choice)
        begin = grammars.tokenizer.encode(said + dialect.call, special=True, bos=False)
        for token in begin:
            assert constraint.free
            constraint.append(token)
        assert not constraint.free
        ids = list(begin)
        while not constraint.free and len(ids) < 600:
            token = int(rng.choice(allowed(constraint, grammars)))
            if rng.random() < 0.3:
                for token in grammars.tokenizer.encode(
                    ENDS[rng.integers(len(ENDS))], special=True, bos=False
                ):
                    if token not in allowed(constraint, grammars) or constraint.free:
                        break
                    ids.append(token)
                    constraint.append(token)
                continue
            ids.append(token)
            constraint.append(token)
        answer, text, _ = read(ids, grammars, dialect)
        assert answer.text == said.strip(), text
        [call] = answer.calls
        assert call.complete == constraint.free, text
        if call.complete:
            whole += 1
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert whole > 5


def says(constraint: Constraint, grammars: Grammars, text: str) -> bool:
    """Whether all of a text, and an end after it, is allowed."""
    for token in grammars.tokenizer.encode(text, special=True, bos=False):
        if token not in allowed(constraint, grammars):
            return False
        constraint.append(token)
    return bool(set(allowed(constraint, grammars).tolist()) & grammars.ends)


def call(name: str, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


ONE = f"<tool_call>\n{call('search', text='x', most=3)}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        (ONE, True),
        (f"{ONE}\n{ONE}", True),
        (f"<tool_call>{call('search', text='x', most=3, deep=True, by=None)}</tool_call>", True),
        (f"<tool_call>\n{call('now')}\n</tool_call>", True),
        (f"<tool_call>\n{call('now', more=[1, {}])}\n</tool_call>", True),
        (f"<tool_call>\n{call('search', text='x')}\n</tool_call>", False),
        (f"<tool_call>\n{call('search', text='x', most=100)}\n</tool_call>", False),
        (f"<tool_call>\n{call('other')}\n</tool_call>", False),
        ("Text.", False),
        ("", False),
    ],
)
def test_what_hermes_may_say(text: str, possible: bool, grammars: Grammars) -> None:
    constraint = compiled(grammars, dialect=DIALECTS[0], choice=Choice("required", TOOLS))
    assert says(constraint, grammars, text) is possible
    one = Choice("required", TOOLS, parallel=False)
    constraint = compiled(grammars, dialect=DIALECTS[0], choice=one)
    assert says(constraint, grammars, text) is (possible and text.count("<tool_call>") == 1)
    named = Choice("required", TOOLS[1:2])
    constraint = compiled(grammars, dialect=DIALECTS[0], choice=named)
    assert says(constraint, grammars, text) is (possible and '"now"' in text)


LLAMA_ONE = '{"name": "search", "parameters": {"text": "}; {", "most": 3}}'


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("", True),
        ("Text, as {any}.", True),
        ('{"answer": 1}', True),
        ('{"name": "other", "parameters": 1}', True),
        ('{"name": "search', True),
        (f"Look: {LLAMA_ONE.replace('3', 'x')}", True),
        (LLAMA_ONE, True),
        (f"{LLAMA_ONE}; {LLAMA_ONE}\n", True),
        ('\n{ "type" : "function" ,\n"name":"now" , "arguments":{} }', True),
        (f"{LLAMA_ONE} and more", False),
        (LLAMA_ONE.replace("3", '"3"'), False),
        (LLAMA_ONE.replace("3", "300"), False),
        (f"{LLAMA_ONE};{LLAMA_ONE.replace('3', '300')}", False),
        ('{"name": "search"}', False),
        ('{"type": "function", "name": "search", "parameters": {"text": "x"}}', False),
        (' \t{ "name"\n:"search", "parameters": {"text": "x"}}', False),
    ],
)
def test_what_llama_may_say_of_its_own_accord(
    text: str, possible: bool, grammars: Grammars
) -> None:
    asked = {"dialect": DIALECTS[2], "choice": Choice("auto", TOOLS)}
    assert says(compiled(grammars, **asked), grammars, text) is possible
    thinking = Thinking("<think>", "</think>", begun=True)
    constraint = compiled(grammars, **asked, thinking=thinking)
    assert says(constraint, grammars, f"Hm.</think>{text}") is possible


def test_calls_of_llama_without_a_tag_are_held_whatever_leads_to_them(
    grammars: Grammars, rng: np.random.Generator
) -> None:
    """What is read as a call was held to its schema, however the beginning is spelt."""
    whole = texts = 0
    heads = ("{", '"name"', '"type"', ":", '"function"', ",", '"search"', '"now"', '"x"', " ", "\n")
    likely = ("{", " ", '"name"', " ", ":", '"search"')
    for n in range(60):
        constraint = compiled(grammars, dialect=DIALECTS[2], choice=Choice("auto", TOOLS))
        ids: list[int] = []
        parts = [p if rng.random() < 0.9 else heads[rng.integers(len(heads))] for p in likely]
        head = (LLAMA_ONE, "Look: ", "".join(parts))[min(n, 2)]  # one of each for certain
        for token in grammars.tokenizer.encode(head, special=False, bos=False):
            if token not in allowed(constraint, grammars):
                break
            ids.append(token)
            constraint.append(token)
        ids += wander(constraint, grammars, rng)
        answer, text, ended = read(ids, grammars, DIALECTS[2])
        texts += not answer.calls
        assert n > 1 or bool(answer.calls) == (n == 0)
        assert ended or len(ids) >= 600
        for call in answer.calls:
            if call.complete:
                whole += 1
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        assert not answer.calls or not answer.text, text
    assert whole
    assert texts


def xml(name: str, **arguments: str) -> str:
    each = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{each}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        (xml("now"), True),
        (xml("search", text="any \n</parameter> {", most="12"), True),
        (
            xml("search", text="x", most="12", kind="b c", deep="true", ids="[1, 2]", by="null"),
            True,
        ),
        (xml("search", text="x", most="12", kind="c"), False),
        (xml("search", text="x", most="twelve"), False),
        (xml("search", most="1"), False),
        (xml("search", text="x", most="1", by="text"), False),
        (xml("free", any="text"), True),
    ],
)
def test_what_qwen_coder_may_say(text: str, possible: bool, grammars: Grammars) -> None:
    constraint = compiled(grammars, dialect=DIALECTS[1], choice=Choice("required", TOOLS))
    assert says(constraint, grammars, text) is possible


def test_a_schema_beside_tools_is_for_the_answer(grammars: Grammars) -> None:
    form = Format("response_format", "json", {"type": "array", "items": {"type": "integer"}})
    for text, possible in (("[1, 2]", True), (ONE, True), ("[1.5]", False), ("Text", False)):
        asked = {"form": form, "dialect": DIALECTS[0], "choice": Choice("auto", TOOLS)}
        assert says(compiled(grammars, **asked), grammars, text) is possible
        asked["choice"] = Choice("required", TOOLS)
        assert says(compiled(grammars, **asked), grammars, text) is (possible and text == ONE)


def test_an_answer_with_a_head_in_a_form(grammars: Grammars) -> None:
    form = Format("guided_regex", "regex", "[0-9]{2}/")
    asked = {"form": form, "dialect": Harmony(), "choice": Choice("none", ())}
    final = "<|channel|>final<|message|>"
    think = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    for text, possible in (("12/", False), (f"{final}12/", True), (f"{think}{final}12/", True)):
        assert says(compiled(grammars, **asked), grammars, text) is possible
    asked |= {"choice": Choice("auto", TOOLS)}
    called = f'{think}<|channel|>commentary to=functions.now <|constrain|>json<|message|>{{"a": 1}}'
    for text, possible in ((f"{final}1/", False), (f"{think}{final}12/", True), (called, True)):
        assert says(compiled(grammars, **asked), grammars, text) is possible


def test_thinking_comes_before_what_is_held(grammars: Grammars) -> None:
    thinking = Thinking("<think>", "</think>", begun=True)
    form = Format("guided_choice", "choice", ["yes", "no"])
    constraint = compiled(grammars, form=form, thinking=thinking)
    assert says(constraint, grammars, "Hm, perhaps.\n</think>\n\nyes")
    constraint = compiled(grammars, form=form, thinking=replace(thinking, begun=False))
    assert says(constraint, grammars, "no")


def test_tools_that_cannot_be_enforced(grammars: Grammars) -> None:
    odd = Tool("odd", {"type": "object", "properties": {"a": {"pattern": "(?=a)"}}})
    asked = {"dialect": DIALECTS[0], "choice": Choice("required", (odd, TOOLS[0]))}
    constraint = compiled(grammars, **asked)
    assert says(constraint, grammars, f"<tool_call>\n{call('odd', b=1)}\n</tool_call>")
    strict = Choice("required", (replace(odd, strict=True), TOOLS[0]))
    with pytest.raises(UsageError, match=r"^tools: 'odd'"):
        compiled(grammars, dialect=DIALECTS[0], choice=strict)


def test_the_template_says_which_dialect_it_is() -> None:
    for template, kind in (
        ("{{ tools }} <tool_call> <function=x> <parameter=y>", QwenXml),
        ("{{ tools }} <tool_call>", Hermes),
        ("{{ messages }}", Hermes),
        ("{{ tools }} <|channel|> <|message|>", Harmony),
        ("{{ tools }} <|python_tag|>", Llama),
    ):
        assert type(dialect_of(template, TOOLS)) is kind
    with pytest.raises(UsageError, match="tools"):
        dialect_of("{{ tools }} [TOOL_CALLS]", TOOLS)
