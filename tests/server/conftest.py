"""A server on loopback with the sample model, and the official client."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from starlette.types import ASGIApp

import isobit
from isobit.runtime.model import Model
from isobit.server.app import build
from isobit.server.service import Service
from isobit.server.wire import ChunkWriter, Http

Serve = Callable[..., AbstractContextManager[tuple[Service, openai.OpenAI]]]


@pytest.fixture(scope="session", autouse=True)
def one_context() -> Iterator[None]:
    """httpx reads all certificates of a system, in 30 ms, for every request without a client."""
    with pytest.MonkeyPatch.context() as patch:
        made = cache(httpx.create_ssl_context)
        patch.setattr("httpx._transports.default.create_ssl_context", made)
        yield


def free_port() -> int:
    """Below those that a system gives out by itself, so that nobody is given it meanwhile."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


@contextmanager
def serve(
    model: Model, wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app, **settings: Any
) -> Iterator[tuple[Service, openai.OpenAI]]:
    """A service of a model, and a client of it; wrap: what stands before the application."""
    limits = model.generations.scheduler.limits
    with socket.socket() as listener, Service(model, **settings) as service:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        app = ChunkWriter(wrap(build(service)))
        server = uvicorn.Server(uvicorn.Config(app, http=Http, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        key = settings.get("api_key") or "none"
        try:
            with openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=120
            ) as client:
                yield service, client
        finally:
            server.should_exit = True
            thread.join()
            model.generations.limit(limits)  # others are to use it, too


class Gate:
    """Stands before a model's passes: all but so many wait until it is opened."""

    def __init__(self, model: Model, patch: pytest.MonkeyPatch, passes: int) -> None:
        self.left = passes
        self.opened = threading.Event()
        self._run = model.run_batch
        patch.setattr(model, "run_batch", self._pass)

    def _pass(self, *given: Any) -> Any:
        self.left -= 1
        assert self.left >= 0 or self.opened.wait(60)
        return self._run(*given)


@pytest.fixture(scope="session")
def served_model() -> Iterator[Model]:
    with isobit.load("sample", backend="cpu", context=1024, sequences=4, threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def alone() -> Iterator[Model]:
    with isobit.load("sample", backend="cpu", context=1024, sequences=1, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def served(served_model: Model) -> Iterator[tuple[Service, openai.OpenAI]]:
    with serve(served_model, name="sample") as both:
        yield both


@pytest.fixture
def service(served: tuple[Service, openai.OpenAI]) -> Service:
    return served[0]


@pytest.fixture
def client(served: tuple[Service, openai.OpenAI]) -> openai.OpenAI:
    return served[1]
