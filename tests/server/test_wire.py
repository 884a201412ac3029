"""What a client gets is byte for byte what uvicorn and h11 alone would write."""

import asyncio
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import h11_impl

from isobit.server.wire import ChunkWriter, Http

MOST = 3 << 20  # more than what sockets and transports hold

Answer = tuple[list[bytes], list[tuple[bytes, bytes]]]


class InParts:
    """An application that answers each path with its parts, after its headers."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self._answers = answers
        self.ended = threading.Event()

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        parts, headers = self._answers[scope["path"]]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self.ended.set()


@contextmanager
def serving(app: ASGIApp, http: Any) -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(app, http=http, date_header=False, log_level="error", lifespan="off")
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def asked(port: int, method: str, path: str, version: str, pause: float = 0.0) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = f"{method} {path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n\r\n"
        client.sendall(head.encode())
        time.sleep(pause)  # what is sent meanwhile has to wait
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def test_the_bytes_are_those_of_h11() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    parts = [rng.randbytes(rng.choice([0, 1, 15, 16, 255, 256, 5000])) for _ in range(40)]
    kind = (b"content-type", b"text/event-stream")
    length = (b"content-length", b"%d" % sum(map(len, parts)))
    app = InParts(
        {
            "/parts": (parts, [kind]),
            "/sized": (parts, [kind, length]),
            "/large": ([b"x", rng.randbytes(MOST), *parts], [kind]),
        }
    )
    with serving(app, "h11") as alone, serving(ChunkWriter(app), Http) as ours:
        for path, pause in (("/parts", 0.0), ("/sized", 0.0), ("/large", 0.05)):
            for version in ("1.1", "1.0"):
                for method in ("GET", "HEAD"):
                    expected = asked(alone, method, path, version)
                    assert expected.startswith(b"HTTP/1.1 200")
                    assert asked(ours, method, path, version, pause) == expected


def test_chunks_do_not_pass_through_h11(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Message] = []
    send = h11_impl.RequestResponseCycle.send

    async def noted(self: h11_impl.RequestResponseCycle, message: Any) -> None:
        given.append(message)
        await send(self, message)

    monkeypatch.setattr(h11_impl.RequestResponseCycle, "send", noted)
    with serving(ChunkWriter(InParts({"/": ([b"a", b"b"], [])})), Http) as port:
        assert asked(port, "GET", "/", "1.1").endswith(b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n")
    assert [message["type"] for message in given] == ["http.response.start", "http.response.body"]


def test_an_answer_to_a_client_that_left_ends() -> None:
    app = InParts({"/": ([b"x" * 1000] * 2000, [])})
    with serving(ChunkWriter(app), Http) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            client.recv(10)
        assert app.ended.wait(20)
