"""Every field of every route, wrong in every way: a refusal names it as its interface does."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from isobit.server.anthropic.messages import Turn
from isobit.server.app import build
from isobit.server.batch.batch import post
from isobit.server.openapi import BODIES
from isobit.server.service import Service

MESSAGES = [{"role": "user", "content": "x"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, INPUT_TOKENS = "/v1/responses", "/v1/responses/input_tokens"
CLAUDE, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES, "max_tokens": 0},
    COMPLETIONS: {"prompt": "x", "max_tokens": 0},
    RESPONSES: {"input": "x", "max_output_tokens": 0},
    INPUT_TOKENS: {"input": "x"},
    CLAUDE: {"messages": MESSAGES, "max_tokens": 0},
    COUNT_TOKENS: {"messages": MESSAGES},
    "/v1/embeddings": {"input": "x"},
    "/generate": {"text": "x", "sampling_params": {"max_new_tokens": 0}},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
"""The shortest body of each route."""

WRONG: list[Any] = ["\0", -7, 10**30, float("nan"), True, [[]], {"\0": [[]]}]
IN_PLACE = {("/generate", "input_ids"), ("/generate", "text"), ("/tokenize", "messages")}
"""Fields in the place of the one that there is."""


def fields(kind: type[BaseModel], within: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the fields of a body are, those of objects in it too."""
    for name, field in kind.model_fields.items():
        yield (*within, name)
        for inside in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inside, type) and issubclass(inside, BaseModel) and inside is not Turn:
                yield from fields(inside, (*within, name))


def refused(path: str, answer: dict[str, Any]) -> str:
    """The field that a refusal is about."""
    error = answer["error"]
    assert error["type"] == "invalid_request_error"
    field = str(error["message"]).partition(":")[0].split(" ")[0]
    if path in (CLAUDE, COUNT_TOKENS):
        assert answer["type"] == "error"
    else:
        assert error["param"] == field, error
        assert "code" in error
    return field


@pytest.mark.parametrize("path", LEAST)
def test_a_field_of_another_type_is_refused_by_its_name(service: Service, path: str) -> None:
    async def run() -> None:
        app = build(service)
        for place in fields(BODIES[path]):
            name, some = ".".join(place), False
            for value in WRONG if name != "stream" else WRONG[:4]:
                body = json.loads(json.dumps(LEAST[path]))
                if (path, name) in IN_PLACE:
                    body.popitem() if path == "/tokenize" else body.pop("text")
                into = body
                for key in place[:-1]:
                    into = into.setdefault(key, {})
                into[place[-1]] = value
                status, answer = await post(app, path, body)
                assert status in (200, 400), (name, value, answer)
                if status == 400:
                    some, field = True, refused(path, answer)
                    assert f"{field}.".startswith((f"{name}.", f"{name}[")), (name, value, answer)
            assert some, name

    asyncio.run(run())


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def called(**function: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [{"function": function}]}, *MESSAGES]}


def block(role: str, **block: Any) -> dict[str, Any]:
    return {"messages": [*MESSAGES, {"role": role, "content": [block]}, *MESSAGES]}


def function(**more: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | more}]}


def schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def inside(levels: int) -> Any:
    return {} if levels == 1 else [inside(levels - 1)]


LONG = "hello " * 3000
ITSELF = {"$ref": "#"}
CLAUDES = {"name": "f", "input_schema": {}}
OPENAIS = {"type": "function", "name": "f"}
SAMPLED: list[tuple[str, Any]] = [
    ("temperature", -1),
    ("top_p", 0),
    ("top_k", 2**40),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("presence_penalty", 1e9),
    ("frequency_penalty", 1e9),
    ("logit_bias", {"5": 1e9}),
    ("logit_bias", {"99999": 1}),
    ("seed", 2**70),
    ("n", 0),
    ("n", 129),
    ("stop", ["x"] * 65),
    ("stop", "x" * 4097),
    ("stop_token_ids", [8192]),
    ("stop_token_ids", [-1]),
    ("regex", "("),
    ("json_schema", ITSELF),
]
"""What is out of range wherever it is taken."""

CASES: list[tuple[str, dict[str, Any], str]] = [
    *((path, {name: v}, name) for path in (CHAT, COMPLETIONS) for name, v in SAMPLED),
    *(
        ("/generate", {"sampling_params": {name: v}}, f"sampling_params.{name}")
        for name, v in SAMPLED
    ),
    *((RESPONSES, {name: v}, name) for name, v in SAMPLED[:4]),
    *((CLAUDE, {name: v}, name) for name, v in SAMPLED[:3]),
    (CHAT, {"max_tokens": -5}, "max_tokens"),
    (CHAT, {"max_completion_tokens": -5}, "max_completion_tokens"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"stream_options": {"include_usage": 5}}, "stream_options.include_usage"),
    (CHAT, {"chat_template_kwargs": {"messages": 5}}, "chat_template_kwargs"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (CHAT, user(5), "messages[0].content"),
    (CHAT, user(None), "messages[0].content"),
    (CHAT, {"messages": [{"role": "system"}]}, "messages[0].content"),
    (CHAT, user(["x", {"type": "image_url"}]), "messages[0].content[1]"),
    (CHAT, called(name=5), "messages[0].tool_calls[0].function.name"),
    (CHAT, called(name="f", arguments="x"), "messages[0].tool_calls[0].function.arguments"),
    (CHAT, {"continue_final_message": True}, "continue_final_message"),
    (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"prompt_logprobs": 1}, "prompt_logprobs"),
    (CHAT, {"reasoning_effort": "frob"}, "reasoning_effort"),
    (CHAT, {"logit_bias": {"5.7": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"a: b": 1}}, "logit_bias"),
    (CHAT, user(LONG), "messages"),
    (CHAT, {"messages": MESSAGES * 2000}, "messages"),
    (CHAT, function(name=5), "tools[0].function.name"),
    (CHAT, function(parameters=ITSELF, strict=True), "tools"),
    (CHAT, function() | {"tool_choice": {"name": "g"}}, "tool_choice"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"response_format": schema(ITSELF)}, "response_format"),
    (CHAT, {"response_format": {"type": "nope"}}, "response_format"),
    (CHAT, {"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    (CHAT, {"unknown": inside(201)}, "body"),
    (COMPLETIONS, {"prompt": LONG}, "prompt"),
    (COMPLETIONS, {"prompt": [8192]}, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 100, "n": 2}, "n"),
    (COMPLETIONS, {"best_of": 5}, "best_of"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (RESPONSES, {"metadata": {"a": [float("nan")]}}, "metadata.a[0]"),
    (RESPONSES, {"tools": [OPENAIS | {"x": 1e999}]}, "tools[0].x"),
    (RESPONSES, {"tools": [{"type": "namespace", "tools": [5]}]}, "tools"),
    (RESPONSES, {"input": [{"type": "additional_tools", "tools": 5}]}, "input[0].tools"),
    (RESPONSES, {"input": LONG}, "input"),
    (RESPONSES, {"input": []}, "input"),
    (RESPONSES, {"input": [{"type": ["x"]}]}, "input[0].type"),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    (RESPONSES, {"tool_choice": "required"}, "tool_choice"),
    (RESPONSES, {"background": True}, "background"),
    (RESPONSES, {"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "x"}]}]}, "input[0].content[0]"),
    (RESPONSES, {"input": [{"type": "function_call", "name": 5}]}, "input[0].name"),
    (
        RESPONSES,
        {"input": [{"type": "function_call", "name": "f", "arguments": "[1"}]},
        "input[0].arguments",
    ),
    (RESPONSES, {"tools": [OPENAIS | {"parameters": 5}]}, "tools"),
    (RESPONSES, {"tools": [OPENAIS], "tool_choice": OPENAIS | {"name": "g"}}, "tool_choice"),
    (RESPONSES, {"text": {"format": 5}}, "text.format"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": ITSELF}}}, "text.format"),
    (RESPONSES, {"reasoning": {"effort": 5}}, "reasoning.effort"),
    (RESPONSES, {"max_output_tokens": -1}, "max_output_tokens"),
    (RESPONSES, {"previous_response_id": "x"}, "previous_response_id"),
    (RESPONSES, {"prompt": {"id": "x"}}, "prompt"),
    (CLAUDE, user(LONG), "messages"),
    (CLAUDE, user(5), "messages.0.content"),
    (CLAUDE, {"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    (CLAUDE, block("user", type="image"), "messages.1.content.0"),
    (CLAUDE, block("assistant", type="tool_use", name=5), "messages.1.content.0.name"),
    (CLAUDE, block("assistant", type="tool_use", name="f", input=5), "messages.1.content.0.input"),
    (CLAUDE, {"system": [{"type": "image"}]}, "system"),
    (CLAUDE, {"tools": [{"name": "f"}]}, "tools.0.input_schema"),
    (CLAUDE, {"tools": [CLAUDES | {"name": 5}]}, "tools.0.name"),
    (CLAUDE, {"tools": [{"name": "f", "input_schema": 5}]}, "tools.0.input_schema"),
    (CLAUDE, {"tools": [CLAUDES], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
    (CLAUDE, {"output_config": {"format": {"type": "x"}}}, "output_config.format"),
    (CLAUDE, {"output_config": {"format": 5}}, "output_config.format"),
    (CLAUDE, {"output_format": {"type": "x"}}, "output_format"),
    (CLAUDE, {"thinking": {"type": 5}}, "thinking.type"),
    (CLAUDE, {"stop_sequences": ["x"] * 65}, "stop_sequences"),
    (CLAUDE, {"max_tokens": -1}, "max_tokens"),
    (COUNT_TOKENS, {"output_config": {"format": {"type": "x"}}}, "output_config.format"),
    ("/generate", {"text": LONG}, "text"),
    ("/generate", {"text": None}, "text"),
    ("/generate", {"input_ids": [5]}, "text"),
    ("/generate", {"text": None, "input_ids": []}, "input_ids"),
    ("/generate", {"sampling_params": {"structural_tag": "t"}}, "sampling_params.structural_tag"),
    ("/generate", {"text": None, "input_ids": [5] * 2000}, "input_ids"),
    ("/generate", {"text": None, "input_ids": [8192]}, "input_ids"),
    ("/generate", {"sampling_params": {"ebnf": "x"}}, "sampling_params.ebnf"),
    ("/generate", {"sampling_params": {"sampling_seed": 2**70}}, "sampling_params.sampling_seed"),
    ("/generate", {"sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
    ("/generate", {"logprob_start_len": -5}, "logprob_start_len"),
    ("/v1/embeddings", {"input": LONG}, "input"),
    ("/v1/embeddings", {"input": ""}, "input"),
    ("/v1/embeddings", {"input": []}, "input"),
    ("/v1/embeddings", {"input": [10**9]}, "input"),
    ("/v1/embeddings", {"dimensions": 10**9}, "dimensions"),
    ("/v1/embeddings", {"encoding_format": "int8"}, "encoding_format"),
    ("/v1/embeddings", {"input": ["x"] * 2049}, "input"),
    ("/v1/embeddings", {"dimensions": 0}, "dimensions"),
    ("/tokenize", {"prompt": None}, "prompt"),
    ("/tokenize", {"prompt": None, "messages": []}, "messages"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"prompt": None, "messages": [{}]}, "messages[0].role"),
    ("/detokenize", {"tokens": [8192]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
]


def test_what_is_out_of_range_is_refused_by_its_name(service: Service) -> None:
    async def run() -> None:
        app = build(service)
        for path, wrong, name in CASES:
            status, answer = await post(app, path, LEAST[path] | wrong)
            assert status == 400, (path, wrong, answer)
            assert refused(path, answer) == name, (path, wrong, answer)
            message = answer["error"]["message"]
            assert not re.search("non-verbose|start:|Value error|messages: expected it", message), (
                message
            )
            if "hello " in str(wrong) or wrong.get("messages") == MESSAGES * 2000:
                assert re.search(
                    r"at most 1024 tokens \(the context\), got (at least )?[2-6]0\d\d", message
                )
                if path != CLAUDE:
                    assert answer["error"]["code"] == "context_length_exceeded"

    asyncio.run(run())


def test_tokens_of_a_prompt_beyond_the_context_are_counted(service: Service) -> None:
    async def run() -> None:
        app = build(service)
        several = {"messages": MESSAGES * 2000}
        for path, asked, n in (
            (INPUT_TOKENS, {"input": LONG}, 6000),
            (COUNT_TOKENS, user(LONG), 6000),
            (COUNT_TOKENS, several, 12000),
            ("/tokenize", {"prompt": None} | user(LONG), 6000),
            ("/tokenize", {"prompt": LONG}, 6000),
        ):
            status, answer = await post(app, path, LEAST[path] | asked)
            assert status == 200, (path, answer)
            assert n <= answer.get("input_tokens", answer.get("count")) <= n + 20

    asyncio.run(run())


def test_of_a_text_far_too_long_little_is_tokenised(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, parts = service.model.tokenizer, list[str]()
    cut = tokenizer._parts
    monkeypatch.setattr(tokenizer, "_parts", lambda text: (parts.append(p) or p for p in cut(text)))
    lines = "a b\n" * 300_000

    async def run() -> None:
        app = build(service)
        for path, asked in (
            (CHAT, user(lines)),
            (COMPLETIONS, {"prompt": lines}),
            (RESPONSES, {"input": lines}),
            (CLAUDE, user(lines)),
            ("/v1/embeddings", {"input": lines}),
            ("/generate", {"text": lines}),
        ):
            status, answer = await post(app, path, LEAST[path] | asked)
            assert status == 400
            said = r"at most 1024 tokens \(the context\), got at least \d{4,}"
            assert re.search(said, answer["error"]["message"])
        for path, asked in (
            (INPUT_TOKENS, {"input": lines}),
            (COUNT_TOKENS, user(lines)),
            ("/tokenize", {"prompt": lines}),
            ("/tokenize", {"prompt": None} | user(lines)),
        ):
            status, answer = await post(app, path, LEAST[path] | asked)
            assert status == 400
            assert "1048576 characters to count, got 12000" in answer["error"]["message"]

    monkeypatch.setattr(tokenizer, "_longest", 1 << 20)  # or none would be
    asyncio.run(run())
    assert 0 < sum(map(len, parts)) < len(lines)
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer, "_encoded", None)
    assert asyncio.run(post(build(service), COMPLETIONS, {"prompt": lines}))[0] == 400


def test_a_body_may_have_two_hundred_levels_within_it(service: Service) -> None:
    body = LEAST[CHAT] | {"unknown": inside(200)}
    status, _ = asyncio.run(post(build(service), CHAT, body))
    assert status == 200
