"""A stream that another replica goes on with is the stream that would have come without it."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from isobit.runtime.model import Model
from isobit.runtime.wakeup import LoopWaker
from isobit.server import guard
from isobit.server.answer import choices
from isobit.server.answer.journal import LINES, Journal, Line
from isobit.server.guard import FRONT, JOURNAL_BYTES
from isobit.server.service import Service
from tests.server.conftest import serve
from tests.server.gathering import gathered
from tests.server.test_calls import NOTE, WEATHER
from tests.server.test_server import MESSAGES, PROMPT

KEY = "the front's"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 30}}}
SCHEMA |= {"required": ["a"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "f", "schema": SCHEMA}}
TOOLS = {"tools": [WEATHER, NOTE], "tool_choice": "required"}
FUNCTIONS = [{"type": "function"} | tool["function"] for tool in (WEATHER, NOTE)]
ASKED = {"messages": MESSAGES, "max_tokens": 40}
WILD = {"temperature": 3.0, "logprobs": 2}  # many characters of several tokens
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
USAGE = {"stream_options": {"include_usage": True}}
GENERATE = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}

CASES = {
    "text": ("/v1/completions", {"prompt": PROMPT, "max_tokens": 40, **WILD, **USAGE}),
    "two of each": (
        "/v1/completions",
        {"prompt": [PROMPT, "import"], "n": 2, "max_tokens": 12, **PENALTIES, **USAGE},
    ),
    "echo": ("/v1/completions", {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 9}),
    "echo alone": (
        "/v1/completions",
        {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0},
    ),
    "greedy": ("/v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}),
    "receipt": ("/v1/completions", {"prompt": PROMPT, "isobit_receipt": True, "max_tokens": 9}),
    "chat": ("/v1/chat/completions", ASKED | PENALTIES | USAGE | {"n": 2, "logprobs": True}),
    "form": ("/v1/chat/completions", ASKED | {"response_format": FORM, "temperature": 2.0}),
    "calls": ("/v1/chat/completions", ASKED | TOOLS | USAGE | {"max_tokens": 120}),
    "messages": ("/v1/messages", ASKED | {"temperature": 1.0}),
    "responses": ("/v1/responses", {"input": "Write.", "max_output_tokens": 30, "top_logprobs": 2}),
    "response's calls": (
        "/v1/responses",
        {"input": "Write.", "max_output_tokens": 90, "tools": FUNCTIONS, "tool_choice": "required"},
    ),
    "generate": ("/generate", {"text": PROMPT, **GENERATE, "return_routed_experts": True}),
}


@pytest.fixture(scope="module")
def replica(served_model: Model) -> Iterator[tuple[Service, openai.OpenAI]]:
    with serve(served_model, name="sample", front_key=KEY) as both:
        yield both


@pytest.fixture(scope="module")
def url(replica: tuple[Service, openai.OpenAI]) -> str:
    return str(replica[1].base_url.copy_with(path=""))


def lines(url: str, path: str, body: Any, journal: Journal) -> list[Line]:
    data = journal.model_dump_json().encode()
    headers = {FRONT: KEY, JOURNAL_BYTES: str(len(data))}
    content = data + json.dumps(body | {"stream": True}).encode()
    answer = httpx.post(url + path, content=content, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == LINES
    return [Line.model_validate_json(text) for text in answer.text.splitlines()]


def keep(journal: Journal, some: list[Line]) -> str:
    """As a front does."""
    for line in some:
        journal.take(line)
    return text(some)


def text(some: list[Line]) -> str:
    return "".join(line.text for line in some)


@pytest.mark.parametrize("case", CASES)
def test_a_stream_cut_anywhere_goes_on(case: str, url: str, rng: np.random.Generator) -> None:
    path, body = CASES[case]
    if path == "/generate":
        params = {"max_new_tokens": 20, "sampling_seed": int(rng.integers(1 << 32))}
        body = body | {"sampling_params": params, "rid": "one"}
    elif rng.integers(2) and path != "/v1/messages":
        body = body | {"seed": int(rng.integers(1 << 32))}
    key = Journal()
    lines(url, path, body, key)  # so that the cache has the prompt, and all count the same as found
    whole = lines(url, path, body, key)
    assert [line.end for line in whole] == [False] * (len(whole) - 1) + [True]
    wanted = gathered(path, text(whole))
    cuts = rng.choice(len(whole), min(len(whole), 3), replace=False).tolist()
    for cut in {0, *cuts, len(whole) - 1}:
        journal = key.model_copy(deep=True)
        got = keep(journal, whole[:cut])
        more = lines(url, path, body, journal)
        got += keep(journal, more[: len(more) // 2])  # and this replica is lost, too
        got += text(lines(url, path, body, journal))
        assert gathered(path, got) == wanted, f"cut at {cut}"


def test_a_stop_string_over_the_cut(url: str) -> None:
    path, body = "/v1/completions", {"prompt": PROMPT, "max_tokens": 40, "seed": 5}
    said = gathered(path, text(lines(url, path, body, Journal())))[1][0]["said"]["text"]
    stop = said[12:21]
    body |= {"stop": ["never said", stop], "logprobs": 1}
    key = Journal()
    whole = lines(url, path, body, key)
    wanted = gathered(path, text(whole))
    assert wanted[1][0]["said"]["text"] == said[: said.index(stop)]
    for cut in range(0, len(whole), 3):
        journal = key.model_copy(deep=True)
        got = keep(journal, whole[:cut]) + text(lines(url, path, body, journal))
        assert gathered(path, got) == wanted, f"cut at {cut}"


def test_another_models_tokens_are_told_from_its_own(url: str) -> None:
    path, body = "/v1/completions", {"prompt": PROMPT, "max_tokens": 9, "seed": 5}
    journal = Journal()
    keep(journal, lines(url, path, body, journal)[:4])
    last = journal.said[0].tokens[-1]
    journal.said[0].tokens[-1] = last._replace(id=last.id + 1)
    [line] = lines(url, path, body, journal)
    assert (
        f"expected token {len(journal.said[0].tokens) - 1} to be {last.id + 1} here too"
        in line.text
    )
    assert line.end
    data = Journal(by="isobit-of-another-file").model_dump_json().encode()
    headers = {FRONT: KEY, JOURNAL_BYTES: str(len(data))}
    refused = httpx.post(url + path, content=data + json.dumps(body).encode(), headers=headers)
    assert refused.status_code == 400
    assert "got one of 'isobit-of-another-file'" in refused.text


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({FRONT: "another"}, b"{}", 401),
        ({FRONT: KEY, JOURNAL_BYTES: "9"}, b"{}", 400),
        ({FRONT: KEY, JOURNAL_BYTES: "x"}, b"{}", 400),
        ({FRONT: KEY, JOURNAL_BYTES: "-1"}, b"{}", 400),
        ({FRONT: KEY, JOURNAL_BYTES: "99999999999"}, b"{}", 400),
        ({FRONT: KEY, JOURNAL_BYTES: "2"}, b"[]", 400),
        ({FRONT: KEY, JOURNAL_BYTES: "13"}, b'{"said": "no"}', 400),
        (
            {FRONT: KEY, JOURNAL_BYTES: "51"},
            b'{"said": {"0": {"tokens": [[-1, null, []]]}}}     {}',
            400,
        ),
    ],
)
def test_journals_are_checked(url: str, headers: Any, body: bytes, status: int) -> None:
    answer = httpx.post(url + "/v1/completions", headers=headers, content=body, timeout=60)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_without_a_key_no_front_is_believed(
    replica: tuple[Service, openai.OpenAI], served_model: Model
) -> None:
    with serve(served_model, name="sample") as (_, client):
        url = str(client.base_url.copy_with(path="/v1/completions"))
        assert httpx.post(url, headers={FRONT: ""}, content=b"{}", timeout=60).status_code == 401
    replica[0].engine.start()  # one service's end stops the engine that both have


def test_a_journal_of_tokens_that_there_are_not(url: str) -> None:
    for tokens in ([[1 << 40, None, []]] * 2, [[5, None, []]] * 30):
        data = json.dumps({"said": {"0": {"tokens": tokens}}}).encode()
        headers = {FRONT: KEY, JOURNAL_BYTES: str(len(data))}
        body = json.dumps({"prompt": PROMPT, "max_tokens": 20, "stream": True}).encode()
        answer = httpx.post(
            url + "/v1/completions", headers=headers, content=data + body, timeout=60
        )
        assert answer.status_code == 400, answer.text


def test_what_is_computed_again_for_a_receipt_is_told_so(
    replica: tuple[Service, openai.OpenAI], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, body = CASES["receipt"]
    journal = Journal()
    whole = lines(url, path, body, journal)
    keep(journal, whole[:5])

    stack, waits = ExitStack(), 0

    async def at_once(*_: object) -> bool:  # as where every pass is news, and none a piece
        nonlocal waits
        waits += 1
        if waits == 3:
            stack.close()
        await asyncio.sleep(0.001)
        return True

    monkeypatch.setattr(LoopWaker, "wait", at_once)
    monkeypatch.setattr(choices, "PING_SECONDS", 0)
    stack.enter_context(replica[0].engine.turn())
    first, *_, last = lines(url, path, body, journal)
    assert (first.text, first.tokens, first.end) == (": still here\n\n", [], False)
    assert last.end


def test_too_many_bytes_with_a_journal_are_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MOST_BYTES", 9)
    headers = {FRONT: KEY, JOURNAL_BYTES: "20"}
    answer = httpx.post(url + "/v1/completions", headers=headers, content=b"{}" * 10, timeout=60)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
