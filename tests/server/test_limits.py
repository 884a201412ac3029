"""What hostile, slow and leaving clients get, and that nobody else pays for it."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest

from isobit.errors import ModelRefused
from isobit.runtime import detokenizer as pieces
from isobit.runtime.model import Model
from isobit.runtime.tokens import Generation
from isobit.server import body as incoming
from isobit.server import guard, serving
from isobit.server.answer import answers, choices
from isobit.server.app import build
from isobit.server.openai import completions, embeddings
from isobit.server.request.fields import Common
from isobit.server.service import Service
from tests.server.conftest import Gate, free_port, serve
from tests.server.test_server import MESSAGES, PROMPT, head, raw, url, wait_for

CHAT = {"model": "m", "messages": MESSAGES, "max_tokens": 8, "stream": True}
STREAMS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 8, "stream": True},
    "/v1/responses": {"input": "x", "max_output_tokens": 8, "stream": True},
    "/v1/messages": CHAT,
    "/generate": {"text": "x", "sampling_params": {"max_new_tokens": 8}, "stream": True},
}


def answers_still(client: openai.OpenAI) -> None:
    done = client.completions.create(model="m", prompt=PROMPT, max_tokens=2, temperature=0)
    assert done.choices[0].finish_reason == "length"


def streamed(client: openai.OpenAI, path: str) -> Iterator[str]:
    with httpx.stream("POST", url(client, path), json=STREAMS[path], timeout=120) as answer:
        assert answer.status_code == 200
        yield from filter(None, answer.iter_lines())


def test_a_host_is_no_path(alone: Model) -> None:
    with serve(alone, name="m", api_key="secret") as (_, client):
        for host in ("a/?", "a/#", "[", ""):
            answer = httpx.get(url(client, "/v1/models"), headers={"host": host}, timeout=60)
            assert answer.status_code == 401, host


def test_no_route_answers_without_the_key(alone: Model) -> None:
    with serve(alone, name="m", api_key="secret") as (_, client):
        key = {"authorization": "Bearer secret"}
        document = httpx.get(url(client, "/openapi.json"), headers=key).json()
        paths = [p.replace("{model}", "m") for p in document["paths"]]
        for path in [*paths, "/openapi.json", "/nowhere", "/v1"]:
            for method in ("GET", "POST", "OPTIONS", "DELETE"):
                for wrong in ({}, {"authorization": "Bearer secre"}, {"x-api-key": "sécret"}):
                    given = {k: v.encode() for k, v in wrong.items()}
                    answer = httpx.request(method, url(client, path), headers=given)
                    assert answer.status_code == 401, (method, path)
        base = url(client, "/").rstrip("/")
        with anthropic.Anthropic(base_url=base, api_key="secret", max_retries=0) as claude:
            assert claude.models.list().data[0].id == "m"
        with (
            anthropic.Anthropic(base_url=base, api_key="other", max_retries=0) as claude,
            pytest.raises(anthropic.AuthenticationError),
        ):
            claude.models.list()


def test_bodies_that_are_too_large_too_deep_or_no_json(client: openai.OpenAI) -> None:
    large = b'{"prompt":"' + b"x" * incoming.MOST_BYTES + b'"}'
    answer = httpx.post(url(client, "/v1/completions"), content=large, timeout=60)
    assert answer.status_code == 413
    deep: Any = "x"
    for _ in range(150):  # not so deep that no JSON parser takes it
        deep = [deep]
    for body in (
        {"messages": [{"role": "user", "content": deep}], "max_tokens": 1},
        {"messages": MESSAGES, "tools": [{"type": "function", "function": {"x": deep}}]},
        {"messages": MESSAGES, "chat_template_kwargs": {"x": deep}, "max_tokens": 1},
        {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": deep}},
    ):
        for path in ("/v1/chat/completions", "/v1/messages"):
            answer = httpx.post(url(client, path), json=body, timeout=60)
            assert answer.status_code in (200, 400), (path, answer.text)
    for data in (b"\x00", b'"', b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"\xff" * 99):
        answer = httpx.post(url(client, "/v1/completions"), content=data)
        assert answer.status_code == 400
    answers_still(client)


def test_clients_that_stall_leave_or_send_garbage(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raw(client) as quiet, raw(client) as half, raw(client) as noise, raw(client) as gone:
        half.sendall(head("/v1/completions", 1000) + b'{"prompt"')
        gone.sendall(head("/v1/completions", 1000) + b'{"prompt"')
        gone.close()
        noise.sendall(bytes(range(256)) * 40)
        assert noise.recv(100).startswith(b"HTTP/1.1 400")
        quiet.sendall(b"POST /v1/comp")
        answers_still(client)
        with monkeypatch.context() as patch, raw(client) as slow:
            patch.setattr(incoming, "BODY_SECONDS", 0.2)
            slow.sendall(head("/v1/completions", 1000) + b'{"prompt"')
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        answers_still(client)
    wait_for(lambda: not service.engine.scheduler.blocks.held)


def submitted(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[Generation]:
    """The generations that begin from here on."""
    begun, submit = list[Generation](), service.engine.submit

    def noted(*given: Any, **settings: Any) -> Generation:
        begun.append(submit(*given, **settings))
        return begun[-1]

    monkeypatch.setattr(service.engine, "submit", noted)
    return begun


def test_a_reader_that_stops_reading_holds_no_pages(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = submitted(service, monkeypatch)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 60, "stream": True, "n": 4}).encode()
    with raw(client) as connection:
        connection.sendall(head("/v1/completions", len(body)) + body)
        wait_for(lambda: len(begun) == 4)
        answers_still(client)
        wait_for(lambda: all(g.ended for g in begun))  # it was never read
        assert not service.engine.load().held


def test_embeddings_end_when_the_client_leaves(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "_AT_ONCE", 2)
    begun = submitted(service, monkeypatch)
    body = json.dumps({"input": [f"{i} {PROMPT}" for i in range(9)]}).encode()
    with service.engine.turn(), raw(client) as connection:  # no pass runs until it has left
        connection.sendall(head("/v1/embeddings", len(body)) + body)
        wait_for(lambda: len(begun) == 2)
        connection.close()
        wait_for(lambda: all(g.ended for g in begun))
    answers_still(client)
    assert len(begun) == 2 + 1  # and that of the last request
    assert not service.engine.load().held


@pytest.mark.parametrize("path", ["/", "/health", "/v1/chat/completions", "/v1/realtime"])
def test_websockets_are_refused_and_no_log_speaks_of_them(
    client: openai.OpenAI, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("uvicorn.error")
    log.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, log.name):
        asks = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
        answer = httpx.get(url(client, path), headers=asks)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("upgrade: expected HTTP")
        other = httpx.get(url(client, "/health"), headers=asks | {"upgrade": "h2c"})
        assert other.status_code == 200  # as some clients ask with every request
    log.removeHandler(caplog.handler)
    assert not caplog.records


def test_more_than_may_be_inside_are_told_to_come_again(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "most_inside", 0)
    assert httpx.get(url(client, "/health")).status_code == 200
    answer = httpx.post(url(client, "/tokenize"), json={"prompt": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"


def test_bodies_have_so_much_room_together(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    for most, status in ((40, 429), (1000, 200), (40, 429)):  # what one took is given back
        monkeypatch.setattr(guard, "MOST_BYTES", most)
        for _ in range(3):
            body = {"prompt": "x" * 200}
            assert httpx.post(url(client, "/tokenize"), json=body).status_code == status


def test_the_log_says_nothing_of_prompts(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "the launch code is 0000"

    def fail(*_: object, **__: object) -> None:
        raise ValueError(f"cannot read {secret}")

    monkeypatch.setattr(answers, "Choice", fail)
    with caplog.at_level(logging.DEBUG):
        for path, body in STREAMS.items():
            answer = httpx.post(url(client, path), json=body)
            assert answer.status_code == 500
            assert secret not in answer.text
    assert "ValueError" in caplog.text
    assert secret not in caplog.text


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_that_waits_is_told_so(
    client: openai.OpenAI, service: Service, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "PING_SECONDS", 0.05)
    wanted, pings = "event: ping" if path == "/v1/messages" else ": still here", 0
    with ExitStack() as stack:
        stack.enter_context(service.engine.turn())  # as in a long prefill
        for line in streamed(client, path):
            pings += line == wanted
            if pings == 2:
                stack.close()
    assert pings >= 2


@pytest.mark.parametrize("path", STREAMS)
def test_an_error_in_a_stream_is_an_event_and_the_last(
    client: openai.OpenAI, service: Service, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(service.model, monkeypatch, 50)
    run = service.model.run_batch

    def fails_later(*given: Any) -> Any:
        if gate.opened.is_set():
            raise ModelRefused("weights: expected good ones, got others")
        return run(*given)

    monkeypatch.setattr(service.model, "run_batch", fails_later)
    monkeypatch.setattr(Common, "ends", lambda *_: frozenset())
    body = STREAMS[path] | {"max_tokens": 900, "max_output_tokens": 900}
    body["sampling_params"] = {"max_new_tokens": 900}
    lines = []
    with httpx.stream("POST", url(client, path), json=body, timeout=120) as answer:
        for line in filter(None, answer.iter_lines()):
            lines.append(line)
            gate.opened.set()
    monkeypatch.undo()
    last = json.loads(lines[-1].removeprefix("data: "))
    error = last["response"]["error"] if path == "/v1/responses" else last["error"]
    assert error["message"] == "weights: expected good ones, got others"
    assert len(lines) > 1
    if path == "/v1/messages":
        assert (lines[-2], last["type"]) == ("event: error", "error")
    answers_still(client)
    wait_for(lambda: not service.engine.scheduler.blocks.held)


def test_a_fault_of_the_server_is_no_riddle_for_the_client(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(service.model, "run_batch", fails)
    answer = httpx.post(url(client, "/v1/completions"), json={"prompt": PROMPT}, timeout=60)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    monkeypatch.undo()
    answers_still(client)


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    command = [sys.executable, "-m", "isobit", "serve", "--backend", "cpu", "--context", "1024"]
    command += ["--port", str(port), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            base = f"http://127.0.0.1:{port}"
            wait_for(lambda: running.poll() is not None or ready(base))
            yield running, base
        finally:
            running.kill()


def ready(base: str) -> bool:
    try:
        return httpx.get(f"{base}/ready").status_code == 200
    except httpx.TransportError:
        return False


LONG = {"prompt": PROMPT, "max_tokens": 1000, "stream": True, "ignore_eos": True, "n": 32}


def ends_well(running: subprocess.Popen[str]) -> str:
    """What it said; nothing of it is a fault."""
    assert running.wait(60) == 0
    assert running.stderr is not None
    said = running.stderr.read()
    assert re.fullmatch(r"(isobit: .*\n|a stream ends: the server is shutting down\n)*", said), said
    return said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_may_end_before_the_server_does(number: signal.Signals) -> None:
    with process("--grace", "60") as (running, base):
        body = LONG | {"n": 1, "max_tokens": 200}
        with httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.send_signal(number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert "1 request may go on for 60 s; another Ctrl-C ends it now" in ends_well(running)


@pytest.mark.parametrize("replicas", [[], ["--replicas", "1"]], ids=["server", "front"])
def test_a_server_that_ends_says_so_and_a_second_ctrl_c_does_not_wait(replicas: list[str]) -> None:
    with process("--grace", "600", *replicas) as (running, base):
        with httpx.stream("POST", f"{base}/v1/completions", json=LONG, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.send_signal(signal.SIGINT)
            wait_for(lambda: httpx.get(f"{base}/ready").status_code == 503)  # and not: refused
            refused = httpx.post(f"{base}/v1/completions", json=LONG)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert refused.headers["connection"] == "close"
            running.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert "the server is shutting down" in rest[-1]
        ends_well(running)


@contextmanager
def without_grace(
    model: Model, caplog: pytest.LogCaptureFixture
) -> Iterator[tuple[serving.Server, threading.Thread, tuple[str, int]]]:
    """A server of this process that has no time left once it is to end, its thread, its address."""
    with socket.socket() as listener, Service(model, name="m") as service:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = serving.prepared(service, build(service), 0, caplog.messages.append)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield server, thread, listener.getsockname()


def test_a_reader_that_stops_reading_does_not_keep_the_server(
    monkeypatch: pytest.MonkeyPatch, alone: Model, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "_TELLING", 0.2)
    with without_grace(alone, caplog) as (server, thread, at):
        body = json.dumps({"prompt": PROMPT, "max_tokens": 900, "n": 64, "stream": True}).encode()
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.connect(at)
            s.sendall(head("/v1/completions", len(body)) + body)
            wait_for(lambda: any(c.transport.get_write_buffer_size() for c in connections(server)))
            server.handle_exit(signal.SIGTERM, None)
            thread.join(60)
            assert not thread.is_alive()
    assert "Traceback" not in caplog.text
    assert "ASGI" not in caplog.text


def test_a_request_that_is_not_read_yet_does_not_keep_the_server(
    monkeypatch: pytest.MonkeyPatch, alone: Model, caplog: pytest.LogCaptureFixture
) -> None:
    begun = threading.Event()

    async def forever(*_: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(serving, "_TELLING", 0.2)
    monkeypatch.setattr(completions, "encoded", forever)
    with (
        without_grace(alone, caplog) as (server, thread, at),
        socket.create_connection(at) as s,
    ):
        s.sendall(head("/v1/completions", 14) + b'{"prompt":"x"}')
        assert begun.wait(60)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(60)
        assert not thread.is_alive()
    assert "Traceback" not in caplog.text


def connections(server: serving.Server) -> list[Any]:
    return list(server.server_state.connections)


def test_killed_and_started_again_it_serves() -> None:
    for _ in range(2):
        with process() as (running, base):
            body = {"prompt": PROMPT, "max_tokens": 3}
            answer = httpx.post(f"{base}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200
            os.kill(running.pid, signal.SIGKILL)
            assert running.wait(60) == -signal.SIGKILL


def test_what_all_choices_share_is_made_once(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    borders = pieces._borders
    monkeypatch.setattr(pieces, "_borders", lambda s: made.append(s) or borders(s))
    stops = [("ab" * 2048)[: 4096 - i] for i in range(4)]
    done = client.completions.create(
        model="m", prompt=PROMPT, max_tokens=2, n=16, stop=stops, temperature=0
    )
    assert len(done.choices) == 16
    assert sorted(made) == sorted(stops)


def test_more_messages_than_a_context_has_tokens_are_not_rendered(
    client: openai.OpenAI, served_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_model, "chat_prompt", None)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=[*MESSAGES] * 2000)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
