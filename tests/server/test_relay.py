"""A front before servers in this process, whose streams are cut at a line that a test names."""

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isobit.runtime.model import Model
from isobit.server.answer.journal import LINES
from isobit.server.front import front as server_front
from isobit.server.front import replicas as server_replicas
from isobit.server.front.front import Front
from isobit.server.front.replicas import Replicas
from isobit.server.guard import FRONT
from isobit.server.webpage import HEADERS
from isobit.verify.receipt_file import receipts_in
from tests.server.conftest import Gate, free_port, serve
from tests.server.gathering import gathered
from tests.server.stopping import LINE, stopping
from tests.server.test_front import KEY as ENVIRONMENT
from tests.server.test_front import (
    at,
    continued,
    many,
    ready,
    running,
    states,
    stream,
    streams,
)
from tests.server.test_server import MESSAGES, PROMPT, url, wait_for

KEY = ENVIRONMENT["ISOBIT_FRONT_KEY"]


class Cutter:
    """Stands before applications, and breaks their connections."""

    def __init__(self) -> None:
        self.after: list[int] = []
        """Lines of a stream, until it is cut; one number for each stream in turn."""
        self.busy: list[int] = []
        """What streams are refused with after that."""
        self.lines = self.cuts = 0
        """Lines of the last stream; streams that were cut."""

    def __call__(self, app: ASGIApp) -> ASGIApp:
        async def cut(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            if not self.after and self.busy:
                await JSONResponse({}, self.busy.pop(0))(scope, receive, send)
                return
            most = self.after.pop(0) if self.after else None
            self.lines = 0

            async def sent(message: Message) -> None:
                lines = message.get("body", b"").splitlines(True)
                if most is not None and self.lines + len(lines) > most:
                    kept = b"".join(lines[: most - self.lines])
                    await send(message | {"body": kept, "more_body": True})
                    self.cuts += 1
                    raise ConnectionError("cut")
                self.lines += len(lines)
                await send(message)

            await app(scope, receive, sent)

        return cut


@contextmanager
def fronted(*urls: str) -> Iterator[str]:
    """The address of a front."""
    replicas = Replicas(urls, lambda _: None, {FRONT: KEY})
    app = Front(replicas, KEY, None).app()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))

        async def run() -> None:
            async with replicas:
                await server.serve([listener])

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def cutter() -> Cutter:
    return Cutter()


@pytest.fixture(scope="module")
def replicas(served_model: Model, alone: Model, cutter: Cutter) -> Iterator[list[str]]:
    settings = {"name": "sample", "front_key": KEY}
    with serve(served_model, cutter, **settings) as (_, a), serve(alone, cutter, **settings) as b:
        yield [str(client.base_url.copy_with(path="")) for client in (a, b[1])]


@pytest.fixture(scope="module")
def front(replicas: list[str]) -> Iterator[str]:
    with fronted(*replicas) as url:
        wait_for(lambda: all(s["up"] for s in states(url)))
        yield url


def test_a_front_gives_what_dashboards_read_of_each_server(
    front: str, replicas: list[str], served_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(base: str) -> dict[str, str]:
        lines = httpx.get(base + "/metrics", timeout=60).text.splitlines()
        found = [line for line in lines if "vllm:" in line]
        assert len(found) == len(set(found))
        return dict(line.rsplit(" ", 1) for line in found)

    def of_each() -> dict[str, str]:
        return {
            name.replace("}", f',url="{base}"}}'): value
            for base in replicas
            for name, value in said(base).items()
        }

    def running() -> list[str]:
        return [v for name, v in said(front).items() if name.startswith("vllm:num_requests_run")]

    gate, ask = Gate(served_model, monkeypatch, 0), {"prompt": PROMPT, "max_tokens": 1}
    with ThreadPoolExecutor() as pool:
        pool.submit(httpx.post, replicas[0] + "/v1/completions", json=ask, timeout=60)
        try:
            wait_for(lambda: running() == ["1.0", "0.0"])
            assert said(front) == of_each()
        finally:
            gate.opened.set()


def test_streams_that_are_cut_anywhere_go_on(
    front: str, cutter: Cutter, rng: np.random.Generator
) -> None:
    for path, body in many(rng, 20):
        wanted = stream(front, path, body)
        lines = cutter.lines
        for cuts in ([0], [1], [lines - 1], rng.integers(lines, size=1).tolist(), [2, 0, 3]):
            cutter.after = list(cuts)  # of n lines: two choices may come in one or in two
            assert stream(front, path, body) == wanted, cuts
            assert continued(front) == cutter.cuts, cuts
    assert cutter.cuts >= 4 * 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("fronted", [False, True])
def test_a_stream_is_stopped(
    path: str,
    fronted: bool,
    front: str,
    replicas: list[str],
    served_model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, url = Gate(served_model, monkeypatch, 4), front if fronted else replicas[0]
    asked = "input" if path == "/v1/responses" else "messages"
    most = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {asked: MESSAGES, most: 99, "model": "m", "stream": True, "isobit_receipt": True}
    if path == "/v1/chat/completions":
        body |= {"stream_options": {"include_usage": True}}
    with httpx.stream("POST", url + path, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))
        name = {"id": (first.get("response") or first.get("message") or first)["id"]}
        assert httpx.post(url + "/stop", json=name, timeout=60).json() == name
        gate.opened.set()
        text = "\n".join(lines)
    [(_, receipt)] = receipts_in(text.encode(), "the stream")
    assert len(receipt.tokens) < 10
    n = f'"{"completion" if path == "/v1/chat/completions" else "output"}_tokens":'
    assert n + str(len(receipt.tokens)) in text.replace(" ", "")
    ends = '"length"', '"max_tokens"', '"max_output_tokens"'
    assert any(end in text for end in ends)
    refused = httpx.post(url + "/stop", json=name, timeout=60)
    assert refused.status_code == 404
    expected = "id: expected that of an answer that streams now, got "
    assert refused.json()["error"]["message"].startswith(expected)


def test_a_fourth_replica_is_not_lost(front: str, cutter: Cutter) -> None:
    body = {"prompt": PROMPT, "max_tokens": 5, "stream": True}
    cutter.after = [0, 0, 0, 100]
    answer = httpx.post(front + "/v1/completions", json=body, timeout=60)
    assert cutter.after == [100]
    cutter.after = []
    assert "found none" in answer.text


@pytest.mark.parametrize("status", [429, 503])
def test_a_stream_waits_for_a_replica_that_is_busy(
    front: str, cutter: Cutter, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_front, "PING_SECONDS", 0.01)
    path, body = "/v1/completions", {"prompt": PROMPT, "max_tokens": 9, "seed": 2, "stream": True}
    whole = httpx.post(front + path, json=body, timeout=60).text
    cutter.after, cutter.busy = [1], [status]
    text = httpx.post(front + path, json=body, timeout=60).text
    assert not cutter.busy
    assert ": still here" in text.splitlines()
    assert gathered(path, text)[1] == gathered(path, whole)[1]


def test_a_client_that_leaves_while_another_replica_is_found_keeps_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_front, "PING_SECONDS", 0)
    closed = list[str]()

    class Answer:
        def __init__(self, kind: str = LINES) -> None:
            self.headers = {"content-type": kind}

        async def aiter_lines(self) -> AsyncIterator[str]:
            raise httpx.ReadError("lost")
            yield

        async def aclose(self) -> None:
            closed.append("closed")

    async def leaves(*, found: Answer | None) -> None:
        streams = found is not None and found.headers["content-type"] == LINES
        lost, other = SimpleNamespace(running=1), SimpleNamespace(running=1)
        going_on = asyncio.Event()

        async def survivor(_barren: int) -> Any:
            await going_on.wait()
            return other, found

        async def suspect(_replica: Any) -> None: ...

        front: Any = SimpleNamespace(suspect=suspect)
        relayed: Any = server_front._Relayed(front, Request({"type": "http"}), b"", None)
        relayed._survivor = survivor
        stream = relayed._stream(lost, Answer())
        assert await anext(stream) == ": still here\n\n"
        if found is not None:
            going_on.set()
            await asyncio.sleep(0)
        await stream.aclose()
        await asyncio.sleep(0)
        assert (lost.running, other.running, len(closed)) == (0, not streams, 1 + streams)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        closed.clear()

    for found in (None, Answer(), Answer("application/json")):
        asyncio.run(leaves(found=found))


def test_a_replica_that_hangs_is_lost_and_another_goes_on(
    alone: Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_replicas, "_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(server_front, "_SILENCE", 1e6)  # it is seen before a stream's time is over
    argv = ("serve", "sample", "--name", "sample", "--backend", "cpu", "--threads", "1")
    port, asked, stops = free_port(), many(rng, 20), stopping(LINE, int(rng.integers(1, 3)))
    with (
        running(*argv, "--context", "1024", port=port, own=stops) as hangs,
        serve(alone, name="sample", front_key=KEY) as (_, client),
    ):
        other = url(client, "")
        wanted = [stream(other, *each) for each in asked]
        wait_for(lambda: ready(at(port)))
        with fronted(at(port), other) as front:
            wait_for(lambda: all(s["up"] for s in states(front)))

            def hasten() -> None:  # not before: on a busy machine whoever works is slow too
                os.waitid(os.P_PID, hangs.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                monkeypatch.setattr(server_replicas, "_ANSWER_SECONDS", 2.0)

            assert streams(front, asked, 1, hasten) == wanted
            assert continued(front) >= 1
            assert [s["up"] for s in states(front)] == [False, True]
            hangs.send_signal(signal.SIGCONT)
            wait_for(lambda: states(front)[0]["up"])
            assert stream(front, *asked[0]) == wanted[0]


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
def test_the_page_has_its_headers(front: str, replicas: list[str], path: str) -> None:
    here, there = (httpx.get(url + path, timeout=60) for url in (front, replicas[0]))
    assert here.content == there.content
    for name in ("content-type", "etag", *HEADERS):
        assert here.headers[name] == there.headers[name]
    tag = {"if-none-match": here.headers["etag"]}
    assert httpx.get(front + path, headers=tag, timeout=60).status_code == 304


@pytest.mark.parametrize(
    ("path", "status"),
    [("//x", 404), ("/a%0Ab", 404), ("/%ff?q=%ff", 404), ("/?" + "x" * 70000, 400), ("/..//", 404)],
)
def test_any_path_is_answered(front: str, path: str, status: int) -> None:
    target = httpx.URL(front).copy_with(raw_path=b"/")
    with socket.create_connection((target.host, target.port), timeout=60) as connection:
        head = f"GET {path} HTTP/1.1\r\nhost: x\r\nx-a: \u00ff\r\nconnection: close\r\n\r\n"
        connection.sendall(head.encode("latin-1"))
        assert connection.recv(99).split()[1] == str(status).encode()


def test_bodies_that_are_nested_deeply(front: str) -> None:
    for depth in (*range(900, 1000, 7), 10**5):
        body = b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"
        answer = httpx.post(front + "/v1/completions", content=body, timeout=60)
        assert answer.status_code == 400, answer.text
        assert json.loads(answer.text)["error"]["message"]


def test_a_front_is_ready_while_a_replica_is(front: str) -> None:
    assert ready(front)
    with fronted("http://127.0.0.1:1") as none:
        answer = httpx.get(none + "/ready", timeout=30)  # at once: others wait for a minute
        assert answer.status_code == 503


def test_only_servers_of_one_kind_are_used(alone: Model, replicas: list[str]) -> None:
    with serve(alone, name="other", front_key=KEY) as (_, client):
        other = str(client.base_url.copy_with(path=""))
        with fronted(replicas[0], other) as front:
            wait_for(lambda: any(s["up"] for s in states(front)))
            wait_for(lambda: any("model" in s["why"] for s in states(front)))
            assert sorted(s["up"] for s in states(front)) == [False, True]


def test_a_front_counts_the_requests_of_each_route(front: str) -> None:
    """Of those that a server has: no client can have it keep counts of others."""

    def counted(path: str, status: int) -> bool:
        lines = httpx.get(front + "/metrics", timeout=60).text.splitlines()
        name = f'isobit_requests_total{{path="{path}",status="{status}"}} '
        return any(line.startswith(name) for line in lines)

    for body, status in (({"prompt": PROMPT, "max_tokens": 1}, 200), ({"prompt": 3.5}, 400)):
        assert httpx.post(front + "/v1/completions", json=body, timeout=60).status_code == status
        assert counted("/v1/completions", status)
    assert httpx.get(front + "/nowhere", timeout=60).status_code == 404
    assert counted("/{path:path}", 404)
    assert not counted("/nowhere", 404)
