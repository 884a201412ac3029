"""Tool calls and forms of answers, as the official client has them from the real engine.

The sample model has learnt nothing of either: what it says is right because it is held to it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

import isobit
from isobit.runtime.model import Model
from isobit.server.service import Service
from isobit.verify.receipt import Receipt, replay
from tests.server.conftest import serve
from tests.server.test_server import MESSAGES, url

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOTE = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "maxLength": 20}},
            "required": ["text"],
            "additionalProperties": False,
        },
    },
}
SCHEMAS = {t["function"]["name"]: t["function"]["parameters"] for t in (WEATHER, NOTE)}


def ask(client: openai.OpenAI, **settings: Any) -> Any:
    settings = {"messages": MESSAGES, "max_tokens": 400, "seed": 3, **settings}
    return client.chat.completions.create(model="sample", **settings)


def streamed(client: openai.OpenAI, **settings: Any) -> list[dict[str, Any]]:
    """The choices of a stream, put together from its deltas as clients do."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in ask(client, stream=True, **settings):
        for choice in chunk.choices:
            said = choice.delta.model_dump(exclude={"role"})
            assert any(said.values()) or choice.index not in found or choice.finish_reason
            into = found.setdefault(
                choice.index,
                {"content": "", "reasoning": "", "calls": [], "finish": None, "tokens": []},
            )
            into["tokens"] += choice.logprobs.content if choice.logprobs else []
            assert into["finish"] is None
            into["finish"] = choice.finish_reason
            into["content"] += choice.delta.content or ""
            into["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for delta in choice.delta.tool_calls or ():
                if delta.id is not None:
                    assert delta.index == len(into["calls"])
                    assert delta.type == "function"
                    into["calls"].append([delta.function.name, ""])
                into["calls"][delta.index][1] += delta.function.arguments or ""
    return [found[i] for i in sorted(found)]


def whole(client: openai.OpenAI, **settings: Any) -> list[dict[str, Any]]:
    return [
        {
            "content": choice.message.content or "",
            "reasoning": getattr(choice.message, "reasoning_content", None) or "",
            "calls": [
                [c.function.name, c.function.arguments] for c in choice.message.tool_calls or ()
            ],
            "finish": choice.finish_reason,
            "tokens": choice.logprobs.content if choice.logprobs else [],
        }
        for choice in ask(client, **settings).choices
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "note"}}], ids=["any", "named"]
)
def test_calls_that_must_come_fit_their_schemas(
    client: openai.OpenAI, choice: Any, temperature: float
) -> None:
    settings = {"tools": [WEATHER, NOTE], "tool_choice": choice, "temperature": temperature}
    settings |= {"n": 3, "parallel_tool_calls": False}
    answers = whole(client, **settings)
    for answer in answers:
        assert answer["content"] == ""
        assert answer["finish"] == "tool_calls"
        [[name, arguments]] = answer["calls"]
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        assert choice == "required" or name == "note"
    assert streamed(client, **settings) == answers


def test_parallel_calls(client: openai.OpenAI) -> None:
    settings = {"tools": [NOTE], "tool_choice": "required", "temperature": 1.0, "max_tokens": 100}
    answers = whole(client, **settings)
    for answer in answers:
        for name, arguments in answer["calls"][:-1]:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        assert len(answer["calls"]) > 1
    assert streamed(client, **settings) == answers


def test_a_call_that_max_tokens_cuts_leaves_no_markup(client: openai.OpenAI) -> None:
    settings = {"tools": [NOTE], "tool_choice": "required", "temperature": 1.0, "logprobs": True}
    for most in range(1, 30):
        [answer] = streamed(client, **settings, max_tokens=most)
        assert [answer] == whole(client, **settings, max_tokens=most)
        assert answer["content"] == ""
        assert answer["finish"] == "length"
        for _, arguments in answer["calls"]:
            assert not re.search("</?tool|name.:", arguments)


def test_offered_tools_are_in_the_prompt_and_the_model_may_answer(
    client: openai.OpenAI, service: Service
) -> None:
    free = whole(client, tools=[WEATHER], max_tokens=20)
    none = whole(client, tools=[WEATHER], tool_choice="none", max_tokens=20)
    assert none == whole(client, max_tokens=20)
    assert free != none
    assert not free[0]["calls"]
    assert free[0]["finish"] == "length"


def test_a_call_that_was_cut_can_be_sent_back(client: openai.OpenAI) -> None:
    for arguments in ('{"text": "to be cont', '{"te', "{", ""):
        call = {"id": "c", "type": "function"}
        call["function"] = {"name": "note", "arguments": arguments}  # type: ignore[assignment]
        messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
        messages.append({"role": "tool", "tool_call_id": "c", "content": "cut"})
        assert ask(client, messages=messages, tools=[NOTE], max_tokens=1).choices


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forms_have_no_blanks_without_end(client: openai.OpenAI, temperature: float) -> None:
    schema = WEATHER["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}}
    for answer in whole(client, response_format=form, temperature=temperature, n=8, max_tokens=90):
        assert answer["content"] == json.dumps(json.loads(answer["content"]), ensure_ascii=False)


def test_a_tool_by_name_is_called_once(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "note"}}
    for answer in whole(client, tools=[NOTE], tool_choice=named, temperature=1.0, n=4):
        assert len(answer["calls"]) == 1


def test_a_conversation_with_calls_goes_on(client: openai.OpenAI) -> None:
    called = ask(client, tools=[NOTE], tool_choice="required", parallel_tool_calls=False)
    message = called.choices[0].message
    messages = [
        *MESSAGES,
        message,
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "noted"},
    ]
    assert ask(client, messages=messages, tools=[NOTE], max_tokens=8).choices[0].message.content


class Person(BaseModel):
    name: str
    age: int


def test_an_answer_in_the_form_of_a_class(client: openai.OpenAI) -> None:
    schema = Person.model_json_schema()
    schema["properties"]["name"]["maxLength"] = 20
    schema["properties"]["age"] |= {"minimum": 0, "maximum": 200}
    answer = ask(
        client,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": schema}},
    )
    Person.model_validate_json(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ({"guided_regex": "[0-9]{4}-[0-9]{2}"}, r"\d{4}-\d{2}"),
        ({"regex": "ab+c{2}/"}, "ab+cc/"),
        ({"guided_choice": ["yes", 'n"o']}, 'yes|n"o'),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"structured_outputs": {"regex": "[a-f]{8}"}}, "[a-f]{8}"),
        ({"guided_grammar": 'start: "a" NUMBER\nNUMBER: /[0-9]{3}/'}, r"a\d{3}"),
        ({"grammar": 'root ::= "x" [0-9] [0-9] | "y"'}, r"x\d\d|y"),
        ({"guided_json": {"type": "integer", "minimum": 0, "maximum": 99}}, r"\d{1,2}"),
        ({"guided_json": '{"enum": ["a", "b"]}'}, '"a"|"b"'),
        ({"json_schema": {"const": 12}}, "12"),
        ({"response_format": {"type": "json_object", "schema": {"const": True}}}, "true"),
        ({"response_format": {"type": "regex", "pattern": "q{2,3}"}}, "q{2,3}"),
        ({"response_format": {"type": "grammar", "grammar": 'start: "z"'}}, "z"),
    ],
)
def test_forms_of_every_field(client: openai.OpenAI, field: dict[str, Any], pattern: str) -> None:
    for temperature in (0, 1):
        answer = ask(client, extra_body=field, temperature=temperature).choices[0]
        assert re.fullmatch(pattern, answer.message.content), answer.message.content
        assert answer.finish_reason == "stop"
    text = client.completions.create(
        model="sample", prompt="def f", max_tokens=100, extra_body=field
    )
    assert re.fullmatch(pattern, text.choices[0].text)


def test_receipts_hold_the_grammar(client: openai.OpenAI, alone: Model, tmp_path: Path) -> None:
    done = ask(
        client,
        tools=[WEATHER],
        tool_choice="required",
        temperature=0.9,
        parallel_tool_calls=False,
        extra_body={"isobit_receipt": True},
    )
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(done.choices[0].isobit_receipt))
    receipt = Receipt.load(path)
    assert receipt.sampling["grammar"]["text"].startswith("start: ")
    assert replay(receipt, alone) is None


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}


OFF = {"uniqueItems": True, "x-guidance": {"lenient": True}}
CUT = [{"function": {"name": "f", "arguments": "no JSON"}}]
STRICT = {"name": "s", "strict": True, "parameters": {"type": "object", "not": {}}}
LIST = {"name": "s", "strict": True, "parameters": {"type": "array"}}
FUNCTION = {"type": "function", "function": {"name": "f"}}
OTHER = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"response_format": {"type": "nosuch"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": schema({"not": {}})}, "response_format"),
        ({"response_format": schema({"type": "x"})}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": OFF}}, "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "start: nosuch"}, "guided_grammar"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": "root ::= " + "(" * 5000}, "grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools[1]"),
        ({"tools": [{"type": "function", "function": STRICT}]}, "tools"),
        ({"tools": [{"type": "function", "function": LIST}]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": "nosuch"}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": OTHER}, "tool_choice"),
        ({"tools": [FUNCTION], "guided_grammar": 'start: "a"'}, "guided_grammar"),
        ({"functions": [{"name": "f"}]}, "functions"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [*MESSAGES, {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [*MESSAGES, {"content": "x"}]}, "messages[1].role"),
        (
            {"messages": [{"role": "assistant", "tool_calls": CUT}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(
    client: openai.OpenAI, settings: dict[str, Any], field: str
) -> None:
    body = {"model": "sample", "messages": MESSAGES, "max_tokens": 3, **settings}
    answer = httpx.post(url(client, "/v1/chat/completions"), json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500


def test_a_tool_that_cannot_be_enforced_does_not_stop_the_others(client: openai.OpenAI) -> None:
    odd = {
        "name": "odd",
        "parameters": {"type": "object", "properties": {"a": {"pattern": "(?=a)"}}},
    }
    tools = [{"type": "function", "function": odd}, NOTE]
    for choice in ("auto", "required"):
        answer = ask(client, tools=tools, tool_choice=choice, max_tokens=60)
        assert answer.usage.completion_tokens


@pytest.fixture(scope="module")
def thinker() -> Iterator[openai.OpenAI]:
    """A model that thinks between tokens of its own, if it is asked to."""
    path = Path(__file__).parents[1] / "data/pyhybrid-moe-34m-Q4_K_M.gguf"
    with (
        isobit.load(path, backend="cpu", context=512, sequences=2) as model,
        serve(model, name="sample") as (_, client),
    ):
        yield client


THINK = {"chat_template_kwargs": {"enable_thinking": True}}
CLOSES = {"4": 11}  # makes </think> likely: after 10 tokens with seed 5, after 9 with seed 6


@pytest.mark.parametrize("form", [{}, {"guided_choice": ["yes", "no"]}])
def test_thinking_is_told_apart_and_free(thinker: openai.OpenAI, form: dict[str, Any]) -> None:
    settings = {"max_tokens": 60, "temperature": 1.0, "logit_bias": CLOSES, "n": 2, "seed": 5}
    settings["extra_body"] = {**THINK, **form}
    answers = whole(thinker, **settings)
    for answer in answers:
        assert answer["reasoning"]
        assert "</think>" not in answer["reasoning"] + (answer["content"] if form else "")
        assert not form or answer["content"] in ("yes", "no")
    assert streamed(thinker, **settings) == answers
    usage = ask(thinker, **settings).usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    settings["extra_body"] = form
    assert not any(answer["reasoning"] for answer in whole(thinker, **settings))


def test_calls_come_after_thinking(thinker: openai.OpenAI) -> None:
    settings = {"max_tokens": 120, "temperature": 1.0, "logit_bias": CLOSES, "extra_body": THINK}
    settings |= {"seed": 5} | {
        "tools": [NOTE],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    [answer] = whole(thinker, **settings)
    assert answer["reasoning"]
    [[name, arguments]] = answer["calls"]
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert streamed(thinker, **settings) == [answer]


class Note(BaseModel):
    """A short note."""

    text: str = Field(max_length=15)


def test_the_clients_own_helpers_understand_the_answers(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Note)
    settings = {"model": "sample", "messages": MESSAGES, "max_tokens": 200, "temperature": 1.0}
    settings |= {"seed": 3, "parallel_tool_calls": False}
    called = {"tools": [tool], "tool_choice": "required", **settings}
    done = client.chat.completions.parse(**called)
    [call] = done.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Note)
    kinds = set()
    with client.chat.completions.stream(**called) as stream:
        for event in stream:
            kinds.add(event.type)
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    [again] = final.choices[0].message.tool_calls
    assert again.function.parsed_arguments == call.function.parsed_arguments
    done = client.chat.completions.parse(response_format=Note, **settings)
    assert isinstance(done.choices[0].message.parsed, Note)
