"""OpenAI's responses and Anthropic's messages, as their own clients see them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from isobit.cli import main
from isobit.runtime.model import Model
from isobit.server.anthropic.messages import MessageRequest
from isobit.server.openai.responses import ResponseRequest
from isobit.server.request.chat import Chat
from isobit.verify.receipt import Receipt, replay
from tests.server.scripted import ARGUMENTS, SAID, THOUGHT, ScriptedReader
from tests.server.test_server import url

ASK = "Write a loop."
FREE = {"seed": 3, "isobit_receipt": True}


@pytest.fixture
def claude(client: openai.OpenAI) -> Iterator[anthropic.Anthropic]:
    base = url(client, "/").rstrip("/")
    with anthropic.Anthropic(base_url=base, api_key="none", max_retries=0, timeout=120) as found:
        yield found


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chat, "reader", lambda *_: ScriptedReader())


def receipt_of(done: Any, folder: Path) -> Receipt:
    path = folder / "receipt.json"
    path.write_text(json.dumps(done.isobit_receipt))
    return Receipt.load(path)


def alone_says(alone: Model, n: int = 24) -> str:
    ids = alone.chat_ids([{"role": "user", "content": ASK}])
    return alone.generate(ids, max_tokens=n, temperature=1, seed=3).text


def test_a_response_is_the_chat_alone(client: openai.OpenAI, alone: Model, tmp_path: Path) -> None:
    done = client.responses.create(model="sample", input=ASK, max_output_tokens=24, extra_body=FREE)
    assert done.output_text == alone_says(alone)
    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert done.usage.input_tokens == len(alone.chat_ids([{"role": "user", "content": ASK}]))
    assert done.usage.output_tokens == 24
    counted = client.responses.input_tokens.count(model="sample", input=ASK)
    assert counted.input_tokens == done.usage.input_tokens
    assert replay(receipt_of(done, tmp_path), alone) is None


def test_a_message_is_the_chat_alone(
    claude: anthropic.Anthropic, alone: Model, tmp_path: Path
) -> None:
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": ASK}]}]
    done = claude.messages.create(model="sample", messages=messages, max_tokens=24, extra_body=FREE)
    assert [block.text for block in done.content] == [alone_says(alone)]
    assert (done.stop_reason, done.stop_sequence) == ("max_tokens", None)
    ids = alone.chat_ids([{"role": "user", "content": ASK}])
    assert done.usage.input_tokens + done.usage.cache_read_input_tokens == len(ids)
    assert replay(receipt_of(done, tmp_path), alone) is None
    counted = claude.messages.count_tokens(model="sample", messages=messages)
    assert counted.input_tokens == len(ids)
    said = alone_says(alone)
    stop = next(said[i : i + 3] for i in range(3, 99) if said.find(said[i : i + 3]) == i)
    cut = claude.messages.create(
        model="sample",
        messages=messages,
        max_tokens=24,
        stop_sequences=[stop],
        extra_body=FREE,
    )
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].text == said.split(stop)[0]


@pytest.mark.parametrize("most", [2, 5, 14, 400])
def test_responses_stream_what_they_are(client: openai.OpenAI, scripted: None, most: int) -> None:
    settings: dict[str, Any] = {"model": "sample", "input": ASK, "max_output_tokens": most}
    settings["extra_body"] = {"seed": 3, "top_k": 40}
    whole = client.responses.create(**settings)
    events = list(client.responses.create(**settings, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert comparable(last.response.output) == comparable(whole.output)
    assert last.response.usage == whole.usage
    items = [e.item for e in events if e.type == "response.output_item.done"]
    assert comparable(items) == comparable(whole.output)
    deltas = ["" for _ in items]
    for event in events:
        if event.type.endswith(".delta"):
            assert event.item_id == items[event.output_index].id
            deltas[event.output_index] += event.delta
    said = [i.arguments if i.type == "function_call" else i.content[0].text for i in items]
    assert deltas == said
    if most == 400:
        kinds = [item.type for item in items]
        assert kinds == ["reasoning", "message", "function_call", "function_call"]
        assert [len(text) for text in said[:2]] == [THOUGHT, SAID]
        assert [item.arguments for item in items[2:]] == [ARGUMENTS] * 2
        assert (whole.status, items[3].call_id, items[3].name) == ("completed", "call_1", "tool1")
        assert whole.usage.output_tokens_details.reasoning_tokens > 0
        with client.responses.stream(**settings) as stream:  # the client's own gathering
            assert comparable(stream.get_final_response().output) == comparable(whole.output)
    else:
        assert items[-1].status == "incomplete"


def comparable(items: Any) -> list[Any]:
    """What was said, without the ids and what the client's own gathering adds."""
    return [
        plain([item])[0] | {"id": None, "content": plain(getattr(item, "content", ()))}
        for item in items
    ]


def plain(parts: Any) -> list[dict[str, Any]]:
    added = ("parsed", "parsed_output", "parsed_arguments")
    return [{k: v for k, v in part.to_dict().items() if k not in added} for part in parts or ()]


@pytest.mark.parametrize("most", [2, 5, 14, 400])
def test_messages_stream_what_they_are(
    claude: anthropic.Anthropic, scripted: None, most: int
) -> None:
    settings: dict[str, Any] = {
        "model": "sample",
        "messages": [{"role": "user", "content": ASK}],
        "max_tokens": most,
        "extra_body": {"seed": 3, "top_k": 40},
    }
    whole = claude.messages.create(**settings)
    with claude.messages.stream(**settings) as stream:
        kinds = [event.type for event in stream]
        gathered = stream.get_final_message()
    assert plain(gathered.content) == plain(whole.content)
    assert gathered.stop_reason == whole.stop_reason
    assert gathered.usage.output_tokens == whole.usage.output_tokens
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")
    if most == 400:
        blocks = whole.content
        assert [b.type for b in blocks] == ["thinking", "text", "tool_use", "tool_use"]
        assert len(blocks[0].thinking) == THOUGHT
        assert len(blocks[1].text) == SAID
        assert [b.input for b in blocks[2:]] == [json.loads(ARGUMENTS)] * 2
        assert whole.stop_reason == "tool_use"
    else:
        assert whole.stop_reason == "max_tokens"


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}}


def test_a_responses_conversation_as_a_chat() -> None:
    asked = ResponseRequest.model_validate(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "developer", "content": "D"},
                {"role": "user", "content": [{"type": "input_text", "text": "U"}]},
                {"type": "reasoning", "id": "r", "summary": [], "content": [{"text": "R"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
                {"type": "function_call_output", "call_id": "c1", "output": "O"},
                {"type": "message", "role": "assistant", "content": "B"},
            ],
            "tools": [{"type": "function", "strict": None} | FUNCTION, {"type": "web_search"}],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
            "reasoning": {"effort": "none"},
            "max_output_tokens": 7,
        }
    )
    chat = asked.chat()
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "reasoning_content": "R", "content": "A", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "O"},
        {"role": "assistant", "content": "B"},
    ]
    assert chat.tools == [{"type": "function", "function": FUNCTION}]
    assert chat.tool_choice == {"type": "function", "function": {"name": "f"}}
    assert chat.variables == {"enable_thinking": False, "reasoning_effort": "none"}
    assert chat.most == 7
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}
    assert chat.response_format == form


def test_a_messages_conversation_as_a_chat() -> None:
    tool = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
    asked = MessageRequest.model_validate(
        {
            "max_tokens": 7,
            "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "U"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "R", "signature": "x"},
                        {"type": "text", "text": "A"},
                        {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "c1",
                            "content": [{"type": "text", "text": "O"}],
                        },
                        {"type": "text", "text": "next"},
                    ],
                },
            ],
            "tools": [tool, {"type": "web_search_20250305", "name": "web_search"}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        }
    )
    chat = asked.chat()
    assert chat.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "reasoning_content": "R", "content": "A", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "O"},
        {"role": "user", "content": "next"},
    ]
    assert chat.tools == [{"type": "function", "function": FUNCTION}]
    assert chat.tool_choice == "required"
    assert chat.variables == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "max_tokens"),
        ({"messages": [], "max_tokens": 1}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}], "max_tokens": 1}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}], "max_tokens": 1}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1},
            "messages.0.content.0",
        ),
    ],
)
def test_messages_refused(claude: anthropic.Anthropic, body: Any, named: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.post("/v1/messages", body=body, cast_to=object)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.body["error"]["message"].startswith(f"{named}:")


def test_models_for_both(claude: anthropic.Anthropic) -> None:
    [model] = claude.models.list()
    assert (model.id, model.type) == ("sample", "model")
    assert claude.models.retrieve("sample").display_name == "sample"
    with pytest.raises(anthropic.NotFoundError):
        claude.models.retrieve("another")


@pytest.mark.parametrize(
    ("path", "body", "n"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ASK}], "n": 2}, 2),
        ("/v1/completions", {"prompt": [ASK, "x"]}, 2),
        ("/v1/responses", {"input": ASK, "max_output_tokens": 6}, 1),
        ("/v1/messages", {"messages": [{"role": "user", "content": ASK}]}, 1),
        ("/generate", {"text": ASK, "sampling_params": {"max_new_tokens": 6}}, 1),
        ("/generate", {"text": [ASK, "x"], "sampling_params": {"max_new_tokens": 6}}, 2),
    ],
)
def test_an_answer_can_be_checked_elsewhere(
    client: openai.OpenAI,
    path: str,
    body: Any,
    n: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    body = {"max_tokens": 6, "isobit_receipt": True, "temperature": 1} | body
    file = tmp_path / "answer.json"
    file.write_text(httpx.post(url(client, path), json=body, timeout=60).text)
    assert len(Receipt.load_all(file)) == n
    assert main(["replay", str(file), "sample", "--backend", "reference"]) == 0
    assert capsys.readouterr().out.startswith("identical: ")
    with httpx.stream("POST", url(client, path), json=body | {"stream": True}) as answer:
        stream = answer.read()
    saved = tmp_path / "stream"
    for made in (stream, stream.replace(b"\n", b"\r\n"), stream.rstrip(b"\n")):
        saved.write_bytes(made)
        assert len(Receipt.load_all(saved)) == n
    assert main(["replay", str(saved), "sample"]) == 0
    saved.write_bytes(stream[: stream.index(b"isobit_receipt")])
    capsys.readouterr()
    assert main(["replay", str(saved), "sample"]) == 3
    assert "line " in capsys.readouterr().err
    text = file.read_text()  # another token than the one that was chosen
    file.write_text(re.sub(r'"token": ?(\d+)', lambda m: f'"token":{int(m[1]) ^ 1}', text, count=1))
    assert main(["replay", str(file), "sample"]) == 1
    file.write_text(json.dumps({"choices": []}))
    assert main(["replay", str(file), "sample"]) == 3
    assert '(to requests with "isobit_receipt": true' in capsys.readouterr().err


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}},
    "required": ["kind"],
    "additionalProperties": False,
}


def test_calls_and_forms_are_held_to_in_both(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    tool: dict[str, Any] = {"type": "function", "name": "pick", "parameters": SCHEMA}
    done = client.responses.create(
        model="sample",
        input=ASK,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=200,
        temperature=0,
    )
    assert done.status == "completed"
    assert {(item.type, item.name) for item in done.output} == {("function_call", "pick")}
    assert all(json.loads(item.arguments)["kind"] in ("a", "b") for item in done.output)
    again: list[Any] = [{"role": "user", "content": ASK}, *done.output]
    again += [
        {"type": "function_call_output", "call_id": item.call_id, "output": "fine"}
        for item in done.output
    ]
    form: dict[str, Any] = {"type": "json_schema", "name": "n", "schema": SCHEMA}
    said = client.responses.create(
        model="sample", input=again, text={"format": form}, max_output_tokens=200, temperature=0
    )
    assert json.loads(said.output_text)["kind"] in ("a", "b")
    message = claude.messages.create(
        model="sample",
        messages=[{"role": "user", "content": ASK}],
        tools=[{"name": "pick", "input_schema": SCHEMA}],
        tool_choice={"type": "tool", "name": "pick", "disable_parallel_tool_use": True},
        max_tokens=200,
        extra_body={"temperature": 0},
    )
    assert message.stop_reason == "tool_use"
    [call] = message.content
    assert (call.type, call.name) == ("tool_use", "pick")
    assert call.input["kind"] in ("a", "b")
