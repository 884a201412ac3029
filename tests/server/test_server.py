"""The server as the official client sees it; what it answers is what the library gives alone."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from isobit.runtime.model import Model
from isobit.runtime.scheduler import Limits
from isobit.server.service import Service
from isobit.verify.receipt import Receipt, replay
from tests.server.conftest import Gate, serve

PROMPT = "def fibonacci(n):\n"
MESSAGES = [{"role": "user", "content": "Write a loop."}]


def url(client: openai.OpenAI, path: str) -> str:
    return str(client.base_url.copy_with(path=path))


def wait_for(holds: Callable[[], object]) -> None:
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("waited for a minute")


@contextmanager
def raw(client: openai.OpenAI) -> Iterator[socket.socket]:
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address, timeout=60) as connection:
        yield connection


def head(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n".encode()


def test_a_completion_is_what_the_model_gives_alone(client: openai.OpenAI, alone: Model) -> None:
    done = client.completions.create(model="sample", prompt=PROMPT, max_tokens=20, temperature=0)
    wanted = alone.generate(PROMPT, max_tokens=20)
    assert done.choices[0].text == wanted.text
    assert done.choices[0].finish_reason == wanted.finish_reason
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(alone.tokenize(PROMPT))
    assert done.usage.completion_tokens == 20
    assert done.system_fingerprint is not None
    assert done.system_fingerprint.startswith("isobit-n")


def test_a_chat_with_its_settings(client: openai.OpenAI, alone: Model) -> None:
    done = client.chat.completions.create(
        model="sample",
        messages=[{"role": "developer", "content": "Be brief."}, *MESSAGES],
        max_completion_tokens=16,
        temperature=0.8,
        top_p=0.9,
        seed=-7,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={"11": -100},
        n=3,
        logprobs=True,
        top_logprobs=2,
    )
    ids = alone.chat_ids([{"role": "system", "content": "Be brief."}, *MESSAGES])
    for n, choice in enumerate(done.choices):
        wanted = alone.generate(
            ids,
            max_tokens=16,
            temperature=0.8,
            top_p=0.9,
            seed=-7 + n,
            presence_penalty=0.3,
            frequency_penalty=0.2,
            logit_bias={11: -100},
            logprobs=2,
        )
        assert choice.message.content == wanted.text
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert wanted.logprobs is not None
        values = [float(f"{v:.9g}") for v in wanted.logprobs.tokens]
        got = [float(f"{entry.logprob:.9g}") for entry in choice.logprobs.content]
        assert got == values[: len(got)]
        assert len(got) == len([t for t in wanted.token_ids if t not in alone.stop_ids])
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


@pytest.mark.parametrize("stop", [None, "\n", ["return", "):"]])
def test_a_stream_is_the_answer_in_pieces(
    client: openai.OpenAI, stop: str | list[str] | None
) -> None:
    settings = {"model": "sample", "messages": MESSAGES, "max_tokens": 24, "temperature": 1, "n": 2}
    settings |= {"seed": 5, "stop": stop, "logprobs": True}
    whole = client.chat.completions.create(**settings)
    texts, reasons, measured, usage = ["", ""], [[], []], [[], []], None
    for chunk in client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    ):
        assert usage is None
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
            measured[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [[choice.finish_reason] for choice in whole.choices]
    assert measured == [choice.logprobs.content for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.total_tokens == whole.usage.total_tokens


def test_answers_beside_others_carry_receipts_that_replay(
    client: openai.OpenAI, alone: Model, tmp_path: Path
) -> None:
    def ask(n: int) -> dict:
        done = client.completions.create(
            model="sample",
            prompt=PROMPT * (n % 3 * 10 + 1),
            max_tokens=5 + n,
            temperature=n % 2,
            seed=n,
            extra_body={"isobit_receipt": True},
        )
        return done.choices[0].isobit_receipt

    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(ask, range(16)))
    for n, data in enumerate(receipts):
        path = tmp_path / "receipt.json"
        path.write_text(json.dumps(data))
        receipt = Receipt.load(path)
        assert receipt.prompt == alone.tokenize(PROMPT * (n % 3 * 10 + 1))
        assert replay(receipt, alone) is None


def test_a_receipt_ends_where_the_answer_does(client: openai.OpenAI, alone: Model) -> None:
    said = alone.generate(PROMPT, max_tokens=40).text
    done = client.completions.create(
        model="sample",
        prompt=PROMPT,
        max_tokens=40,
        temperature=0,
        stop=said[len(said) // 2 :][:3],  # the engine goes on until it hears of it
        extra_body={"isobit_receipt": True},
    )
    assert len(done.choices[0].isobit_receipt["tokens"]) == done.usage.completion_tokens < 40


def test_prompts_in_every_form(client: openai.OpenAI, alone: Model) -> None:
    ids = alone.tokenize(PROMPT)
    settings = {"model": "sample", "max_tokens": 6, "temperature": 0}
    one = client.completions.create(prompt=PROMPT, **settings).choices[0].text
    for prompt in (ids, [PROMPT], [ids]):
        assert client.completions.create(prompt=prompt, **settings).choices[0].text == one
    both = client.completions.create(prompt=[PROMPT, "import "], n=2, echo=True, **settings)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert [c.text for c in both.choices[:2]] == [PROMPT + one] * 2
    assert both.choices[3].text.startswith("import ")


def test_log_probabilities_of_parts_of_characters(client: openai.OpenAI, alone: Model) -> None:
    """Tokens that are no whole characters have names of their own, and the places of these."""
    ids, text = alone.tokenize("# 日本語 добрый = x"), "# 日本語 добрый = x"
    done = client.completions.create(
        model="sample", prompt=ids, echo=True, logprobs=20, max_tokens=0, temperature=0
    )
    found = done.choices[0].logprobs
    assert done.choices[0].text == text
    assert any(name.startswith("bytes:\\x") for name in found.tokens)
    for name, value, top in list(
        zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True)
    )[1:]:
        assert len(top) == 20
        assert top.get(name, value) == value
        assert max(top.values()) >= value
    before = b"".join(map(alone.tokenizer.token_bytes, ids))
    ends = np.cumsum([0, *(len(alone.tokenizer.token_bytes(i)) for i in ids)])
    at = [len(before[:end].decode(errors="ignore")) for end in ends[:-1]]
    assert found.text_offset == at


@pytest.mark.parametrize("most", [0, 1, 4])
def test_an_echo_with_the_prompts_log_probabilities(
    client: openai.OpenAI, alone: Model, most: int
) -> None:
    ids = (alone.tokenize(PROMPT) * 40)[:200]  # more rows than a pass gives
    done = client.completions.create(
        model="sample", prompt=ids, echo=True, logprobs=2, max_tokens=most, temperature=0
    )
    found, text = done.choices[0].logprobs, done.choices[0].text
    wanted = alone.generate(ids, max_tokens=most, logprobs=2)
    assert text == alone.detokenize(ids) + wanted.text
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    scores = alone.score(ids[:1], ids[1:] + wanted.token_ids)
    np.testing.assert_array_equal(np.array(found.token_logprobs[1:], np.float32), scores)
    assert all(len(top) == 2 for top in found.top_logprobs[1:])
    assert "".join(found.tokens) == text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
    assert done.usage.completion_tokens == most


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": PROMPT, "temperature": -1}, "temperature"),
        ({"prompt": PROMPT, "temperature": "warm"}, "temperature"),
        ({"prompt": PROMPT, "logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"prompt": PROMPT, "seed": 1 << 70}, "seed"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[5], "x"]}, "prompt"),
        ({"prompt": PROMPT, "n": 0}, "n"),
        ({"prompt": PROMPT, "suffix": "x"}, "suffix"),
        ({"prompt": PROMPT, "stop": ["x"] * 65}, "stop"),
        ({"prompt": PROMPT, "stop": 5}, "stop"),
        ({}, "prompt"),
        ([], "body"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    client: openai.OpenAI, body: object, param: str
) -> None:
    answer = httpx.post(url(client, "/v1/completions"), json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param
    assert not re.search("constrained|list", error["param"])
    assert error["message"]


def test_hostile_bodies(client: openai.OpenAI) -> None:
    for data in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"prompt":' * 50_000):
        assert httpx.post(url(client, "/v1/completions"), content=data).status_code == 400
    too_many = client.completions.with_raw_response
    with pytest.raises(openai.BadRequestError) as caught:
        too_many.create(model="sample", prompt=PROMPT * 1000)
    assert caught.value.code == "context_length_exceeded"
    for more in ({"tools": [{"type": "function"}]}, {"response_format": {"type": "nosuch"}}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="sample", messages=MESSAGES, **more)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    nowhere = httpx.get(url(client, "/nowhere"))
    assert nowhere.status_code == 404
    assert "'GET /nowhere'" in nowhere.json()["error"]["message"]
    assert httpx.get(url(client, "/v1/completions")).status_code == 405
    done = client.completions.create(model="sample", prompt=PROMPT, max_tokens=2, temperature=0)
    assert done.choices[0].text


def test_models_health_metrics_tokens(client: openai.OpenAI, alone: Model) -> None:
    assert [m.id for m in client.models.list()] == ["sample"]
    assert client.models.retrieve("sample").owned_by == "isobit"
    assert httpx.get(url(client, "/health")).json() == {"status": "ok"}
    ids = alone.tokenize(PROMPT)
    found = httpx.post(url(client, "/tokenize"), json={"prompt": PROMPT}).json()
    assert (found["tokens"], found["count"]) == (ids, len(ids))
    found = httpx.post(url(client, "/tokenize"), json={"messages": MESSAGES}).json()
    assert found["tokens"] == alone.chat_ids(MESSAGES)
    text = httpx.post(url(client, "/detokenize"), json={"tokens": ids}).json()
    assert text == {"prompt": alone.detokenize(ids)}
    client.completions.create(model="sample", prompt=PROMPT, max_tokens=3)
    lines = httpx.get(url(client, "/metrics")).text.splitlines()
    assert "isobit_requests_running 0.0" in lines
    assert any(line.startswith('isobit_requests_total{path="/v1/completions"') for line in lines)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(
    client: openai.OpenAI, service: Service, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, submit = [], service.engine.submit
    monkeypatch.setattr(
        service.engine, "submit", lambda *a, **k: begun.append(submit(*a, **k)) or begun[-1]
    )
    gate = Gate(service.model, monkeypatch, 49)
    body = {"prompt": PROMPT, "max_tokens": 1000, "stream": stream, "temperature": 0}
    body |= {"logit_bias": {str(i): -1000 for i in service.model.stop_ids}}
    data = json.dumps(body).encode()
    with raw(client) as leaving:
        leaving.sendall(head("/v1/completions", len(data)) + data)
        wait_for(lambda: gate.left < 0)  # it is in a pass
        assert not stream or leaving.recv(99)
    wait_for(lambda: begun[0].cancelled)
    gate.opened.set()
    wait_for(lambda: begun[0].ended)
    assert begun[0].finish_reason == "interrupted"
    assert begun[0].request.generated == 50
    assert not service.engine.load().held


def test_keys_and_queue(alone: Model) -> None:
    limits = Limits(running=1, waiting=1)
    with serve(alone, name="m", api_key="secret", limits=limits) as (service, client):
        for headers in ({}, {"authorization": "Bearer wrong"}):
            answer = httpx.get(url(client, "/health"), headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for wrong in ("Basic secret", "bearersecret", "bearer  secret", "secret"):
            assert httpx.get(url(client, "/health"), headers={"authorization": wrong}).is_error
        for right in ({"authorization": "bearer secret"}, {"x-api-key": "secret"}):
            assert httpx.get(url(client, "/health"), headers=right).is_success
        ask = {"model": "m", "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
        with service.engine.turn():  # no pass runs, so nothing leaves the queue
            first = client.completions.create(**ask, n=2, stream=True)
            with pytest.raises(openai.RateLimitError, match="2 requests wait") as caught:
                client.completions.create(**ask)
        assert caught.value.response.headers["retry-after"] == "1"
        assert [c.finish_reason for piece in first for c in piece.choices].count("length") == 2
        assert len(client.completions.create(**ask, n=2).choices) == 2


@pytest.mark.parametrize("waiting", [1, 3])
def test_what_the_queue_never_takes_is_refused_with_the_number(alone: Model, waiting: int) -> None:
    most = 1 + waiting
    with serve(alone, name="m", limits=Limits(running=1, waiting=waiting)) as (_, client):
        ask = {"model": "m", "prompt": PROMPT, "max_tokens": 1}
        for more in ({"n": most}, {"n": most, "best_of": most}, {"prompt": [PROMPT] * most}):
            assert len(client.completions.create(**ask | more).choices) == most
        for more in ({"n": most + 1}, {"prompt": [PROMPT] * (most + 1)}):
            said = (
                f"at most {most} choices in all .1 at once and --waiting {waiting}., got {most + 1}"
            )
            with pytest.raises(openai.BadRequestError, match=said):
                client.completions.create(**ask | more)
        inputs = ["x"] * (2 * most + 1)  # as many at once as fit
        assert len(client.embeddings.create(model="m", input=inputs).data) == len(inputs)
