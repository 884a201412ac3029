"""Coding agents as they are: what Codex and Claude Code send, and what they must get back."""

import asyncio
import json
from typing import Any

import anthropic
import httpx
import openai
import pytest

from isobit.runtime.model import Model
from isobit.server.anthropic.messages import MessageRequest
from isobit.server.openai.response_tools import arguments_of, input_of
from isobit.server.openai.responses import ResponseRequest
from isobit.server.request.chat import prepared
from tests.server.test_server import url

ENUM = {"type": "object", "properties": {"q": {"enum": ["a", "b"]}}, "required": ["q"]}
ENUM |= {"additionalProperties": False}
PATCH = '*** Begin Patch\n*** Update File: a.py\n+x = "1"\n*** End Patch'
CODEX: dict[str, Any] = {
    "model": "sample",
    "instructions": "You are a coding agent in a terminal.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions>read-only</permissions>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "<environment_context>/src</…>"}],
        },
        {"type": "additional_tools", "role": "developer", "tools": [
            {"type": "function", "name": "later", "parameters": ENUM},
        ]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it"}]},
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "I search."}],
            "content": None,
            "encrypted_content": None,
        },
        {
            "type": "function_call",
            "name": "search",
            "namespace": "mcp__web",
            "arguments": '{"q":"a"}',
            "call_id": "call_1",
        },
        {
            "type": "function_call_output",
            "call_id": "call_1",
            "output": [{"type": "input_text", "text": "Nothing found."}],
        },
        {"type": "custom_tool_call", "call_id": "call_2", "name": "apply_patch", "input": PATCH},
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": "Done!"},
    ],
    "tools": [
        {"type": "function", "name": "exec_command", "strict": False, "parameters": ENUM},
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "Edits files.",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: begin_patch"},
        },
        {
            "type": "namespace",
            "name": "mcp__web",
            "description": "The web.",
            "tools": [{"type": "function", "name": "search", "defer_loading": True, "strict": False,
                       "description": "Searches.", "parameters": ENUM}],
        },
        {"type": "web_search", "external_web_access": False},
        {"type": "tool_search", "execution": "client", "parameters": {}},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto", "context": "all_turns"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "text": {"verbosity": "low"},
    "client_metadata": {"x": "y"},
    "service_tier": "auto",
}  # fmt: skip
CLAUDE: dict[str, Any] = {
    "model": "sample",
    "max_tokens": 32000,
    "system": [
        {"type": "text", "text": "x-billing: a=b;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>Notes.</system-reminder>"},
                {"type": "text", "text": "Fix it", "cache_control": {"type": "ephemeral"}},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"q": "a"}},
                {"type": "tool_use", "id": "toolu_2", "name": "Read", "input": {"q": "b"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "1\tdef f()"},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "No such file."}],
                },
                {"type": "text", "text": "Go on"},
            ],
        },
    ],
    "tools": [
        {
            "name": "Read",
            "description": "Reads.",
            "input_schema": ENUM,
            "eager_input_streaming": True,
        },
        {"name": "Now", "input_schema": {"$schema": "x", "type": "object", "properties": {}}},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "metadata": {"user_id": "u"},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}  # fmt: skip


def prompt(model: Model, asked: Any) -> str:
    return model.detokenize(asyncio.run(prepared(model, asked.chat())).prompt)


def test_all_that_codex_says_is_in_the_prompt(alone: Model) -> None:
    said = prompt(alone, ResponseRequest.model_validate(CODEX))
    for text in (
        "You are a coding agent in a terminal.",
        "<permissions>read-only</permissions>",
        "<environment_context>/src</…>",
        "Nothing found.",
        "Done!",
        "Edits files.",
        "start: begin_patch",
        "exec_command",
        "mcp__web__search",
        "later",
        json.dumps(PATCH)[1:-1],
    ):
        assert text in said, text
    assert "defer_loading" not in said


def test_codex_gets_calls_by_the_names_it_knows(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {k: v for k, v in CODEX.items() if k != "stream"}
    settings |= {"max_output_tokens": 60, "temperature": 0.9, "parallel_tool_calls": False}
    settings["extra_body"] = {"seed": 4, "client_metadata": settings.pop("client_metadata")}
    for choice, kind, name, namespace in (
        ({"type": "function", "name": "exec_command"}, "function_call", "exec_command", None),
        (
            {"type": "function", "namespace": "mcp__web", "name": "search"},
            "function_call",
            "search",
            "mcp__web",
        ),
        (
            {"type": "custom", "name": "apply_patch"},
            "custom_tool_call",
            "apply_patch",
            None,
        ),
        (
            {"type": "allowed_tools", "mode": "required",
             "tools": [{"type": "function", "name": "later"}]},
            "function_call",
            "later",
            None,
        ),
    ):  # fmt: skip
        whole = client.responses.create(**settings | {"tool_choice": choice})
        [call] = whole.output
        assert (call.type, call.name, call.namespace) == (kind, name, namespace)
        events = list(client.responses.create(**settings | {"tool_choice": choice}, stream=True))
        [done] = [e.item for e in events if e.type == "response.output_item.done"]
        deltas = "".join(e.delta for e in events if e.type.endswith(".delta"))
        if kind == "custom_tool_call":
            assert done.input == deltas == call.input
        else:
            assert json.loads(call.arguments)["q"] in ("a", "b")
            assert done.arguments == deltas == call.arguments
        again = [*settings["input"], call.to_dict()]
        again.append({"type": f"{kind}_output", "call_id": call.call_id, "output": "Fine."})
        after = client.responses.create(**settings | {"input": again})
        assert after.usage.input_tokens > whole.usage.input_tokens
    kinds = [tool.type for tool in whole.tools]
    assert kinds == ["function", "custom", "namespace", "function"]


@pytest.mark.parametrize("text", ["", 'a "b"\n\\ {', "ä\u0007\U0001f600", PATCH])
def test_the_input_of_a_custom_tool(text: str) -> None:
    arguments = arguments_of(text)
    assert input_of(arguments) == text
    for cut in range(len('{"input": "'), len(arguments)):
        assert text.startswith(input_of(arguments[:cut]))
        assert text.startswith(input_of(json.dumps({"input": text})[:cut]).rstrip("\ud83d"))
    for other in ("", "{", "null", "[]", '{"x": 1}'):
        assert input_of(other) == ""


def test_all_that_claude_code_says_is_in_the_prompt(alone: Model) -> None:
    said = prompt(alone, MessageRequest.model_validate(CLAUDE))
    for text in (
        "You are an agent.",
        "<system-reminder>Notes.</system-reminder>",
        "Looking.",
        "def f()",
        "No such file.",
        "Go on",
        '"Read"',
        '"Now"',
        "Reads.",
    ):
        assert text in said, text


def test_claude_code_has_a_conversation(client: openai.OpenAI) -> None:
    base = url(client, "/").rstrip("/")
    assert httpx.head(base).status_code == 200  # whether somebody is there
    choice = {"type": "tool", "name": "Read", "disable_parallel_tool_use": True}
    seeded = {"extra_body": {"temperature": 0.9, "seed": 4}}
    body = CLAUDE | {"max_tokens": 300, "tool_choice": choice} | seeded
    with anthropic.Anthropic(base_url=base, auth_token="t", max_retries=0, timeout=120) as claude:
        count = {k: body[k] for k in ("model", "messages", "system", "tools", "thinking")}
        counted = claude.beta.messages.count_tokens(**count, betas=["token-counting-2024-11-01"])
        settings = {k: v for k, v in body.items() if k != "stream"}
        with claude.beta.messages.stream(**settings, betas=["interleaved-thinking"]) as stream:
            done = stream.get_final_message()
        assert counted.input_tokens > 50
        assert done.stop_reason == "tool_use"
        [call, *_] = [block for block in done.content if block.type == "tool_use"]
        assert call.name == "Read"
        assert call.input["q"] in ("a", "b")
        title = claude.beta.messages.create(
            model="other",
            max_tokens=200,
            messages=[{"role": "user", "content": "Fix it"}],
            extra_body={"temperature": 0},
            output_config={"format": {"type": "json_schema", "schema": ENUM}},
            betas=["structured-outputs-2025-12-15"],
        )
        assert json.loads(title.content[0].text)["q"] in ("a", "b")
