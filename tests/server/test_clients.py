"""Requests as clients send them: accepted, and all that they say reaches the model."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

import isobit
from isobit.errors import UsageError
from isobit.runtime.model import Model
from isobit.server.request.chat import prepared
from isobit.server.request.fields import ChatRequest
from tests.server.client_bodies import BODIES, call
from tests.server.test_server import url

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
OWN = "the sample's own"


class Templated:
    """The sample model with the chat template of another: a file's name, or its source."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._vocabulary = model.tokenizer.vocabulary

    def __call__(self, name: str) -> Model:
        source: str | None = name
        if name == OWN:
            source = self._vocabulary.chat_template
        elif "{" not in name:
            source = (TEMPLATES / f"{name}.jinja").read_text()
        vocabulary = replace(self._vocabulary, chat_template=source)
        self._model.tokenizer.vocabulary = vocabulary
        return self._model


@pytest.fixture(scope="module")
def templated() -> Iterator[Templated]:
    with isobit.load("sample", backend="cpu", context=4096, sequences=1) as model:
        yield Templated(model)


def said(body: dict[str, Any]) -> Iterator[str]:
    for message in body["messages"]:
        content = message.get("content") or ""
        for part in [content] if isinstance(content, str) else content:
            yield part if isinstance(part, str) else part["text"]
        for each in message.get("tool_calls") or ():
            yield each["function"]["name"]
            for value in json.loads(each["function"]["arguments"] or "{}").values():
                yield from value if isinstance(value, list) else [json.dumps(value).strip('"')]


def shown(model: Model, body: dict[str, Any]) -> str:
    chat = asyncio.run(prepared(model, ChatRequest.model_validate(body)))
    return model.detokenize(chat.prompt)


def occurs(text: str, prompt: str) -> bool:
    return text.strip() in prompt or json.dumps(text, ensure_ascii=False)[1:-1] in prompt


@pytest.mark.parametrize("template", [OWN, "thinking", "coder", "llama"])
@pytest.mark.parametrize("client", BODIES)
def test_all_that_a_client_says_is_in_the_prompt(
    client: str, template: str, templated: Templated
) -> None:
    body = BODIES[client]
    prompt = shown(templated(template), body)
    for text in said(body):
        assert occurs(text, prompt), text
    for tool in body.get("tools") or ():
        assert tool["function"]["name"] in prompt
        assert tool["function"].get("description", "") in prompt


@pytest.mark.parametrize("name", BODIES)
def test_clients_get_an_answer(client: openai.OpenAI, name: str) -> None:
    body = BODIES[name] | {"max_tokens": 4, "max_completion_tokens": 4}
    answer = httpx.post(url(client, "/v1/chat/completions"), json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"
    else:
        assert answer.json()["choices"][0]["finish_reason"]


USER = {"role": "user", "content": "Hello there"}


CALLS = {"role": "assistant", "content": None, "tool_calls": [call("f", "{}")]}
LAST_TWO = "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("source", "messages", "index"),
    [
        (LAST_TWO, [USER, {"role": "user", "content": "No"}, USER, USER], 1),
        (LAST_TWO, [{"role": "system", "content": "Rule."}, USER, USER], 0),
        ("{{ messages[0].content }}", [USER, {"role": "tool", "content": "left out"}], 1),
        ("tool_calls {{ messages[0].content }}", [USER, CALLS], 1),
    ],
)  # fmt: skip
def test_a_text_that_a_template_leaves_out_is_refused_with_its_index(
    source: str, messages: list[dict[str, Any]], index: int, templated: Templated
) -> None:
    with pytest.raises(UsageError, match=rf"messages\[{index}\]"):
        shown(templated(source), {"messages": messages})


def test_thinking_that_a_template_leaves_out_of_history_is_no_loss(templated: Templated) -> None:
    messages = [
        USER,
        {
            "role": "assistant",
            "content": "<think>\nHm.\n</think>\n\nHi.",
            "reasoning_content": None,
        },
        USER,
        {"role": "assistant", "content": "Again.", "reasoning_content": "Well."},
        USER,
    ]
    prompt = shown(templated("thinking"), {"messages": messages})
    assert "Hm." not in prompt
    assert "Hi." in prompt


def test_several_system_messages_become_one_where_a_template_knows_one(
    templated: Templated,
) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    model = templated(source)
    systems = [{"role": "system", "content": "First."}, {"role": "developer", "content": "Second."}]
    assert "First.\n\nSecond." in shown(model, {"messages": [*systems, USER]})
    with pytest.raises(UsageError, match="at the beginning"):
        shown(model, {"messages": [USER, *systems]})


def test_variables_reach_the_template(templated: Templated) -> None:
    model = templated("thinking")
    for more in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
    ):
        assert shown(model, {"messages": [USER], **more}).endswith("<think>\n\n</think>\n\n")
    both = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
    assert not shown(model, {"messages": [USER], **both}).endswith("</think>\n\n")


def test_a_whole_number_may_be_written_with_a_point() -> None:
    text = '{"messages": [{}], "max_tokens": 40.0, "top_k": 5.0, "seed": 1e3, "temperature": 1.0}'
    asked = ChatRequest.model_validate_json(text)
    assert (asked.max_tokens, asked.top_k, asked.seed) == (40, 5, 1000)
    assert asked.sampling.temperature == 1
    for other in ("4.5", '"4"', "true", "1e999"):
        with pytest.raises(ValidationError):
            ChatRequest.model_validate_json(text.replace("40.0", other))
