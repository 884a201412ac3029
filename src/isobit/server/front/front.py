"""A front before several servers of one model: a client's stream outlives the server that began it.

Requests go to the replica that knows their beginning, else to the one that has least to do. Of
every stream the front keeps a journal (:mod:`isobit.server.answer.journal`); if its replica is
lost, another goes on with it, with the same bits. What is answered at once is asked for again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import string
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from isobit.errors import UsageError
from isobit.server import errors, stop, webpage
from isobit.server.answer.answers import event
from isobit.server.answer.choices import PING_SECONDS
from isobit.server.answer.journal import BY, LINES, Journal, Line
from isobit.server.app import for_pages
from isobit.server.body import body_of, unless_gone
from isobit.server.errors import NoReplica
from isobit.server.front.replicas import Replica, Replicas, patience
from isobit.server.guard import FRONT, JOURNAL_BYTES, Guard

_WAIT_SECONDS = 60.0  # for a replica, where none is up
_SILENCE = 45.0  # seconds without a byte of a stream: three pings that did not come
_PING = ": still here\n\n"  # a comment, in every interface's stream
_TRIES = 3  # replicas that a request may lose in turn
_BUSY = (429, 503)
_KEPT = ("content-type", "etag", "retry-after", "www-authenticate", *webpage.HEADERS)
"""Headers of a replica's answer that a client gets."""
_OWN = {  # headers of the connection, and those that the front writes itself
    *("connection", "content-length", "host", "keep-alive", "transfer-encoding", "upgrade", "te"),
    *("trailer", "proxy-authenticate", "proxy-authorization", "expect", "accept-encoding"),
    *(FRONT, JOURNAL_BYTES),
}

_log = logging.getLogger("isobit.front")


class Front:
    """The handlers, and what a server of them needs."""

    most_inside = 4096

    def __init__(
        self, replicas: Replicas, key: str, api_key: str | None, origins: Sequence[str] = ()
    ) -> None:
        """``key``: what the replicas know it by. ``api_key``: what clients give."""
        self.key = key
        self.api_key = api_key
        self.origins = tuple(origins)
        self.draining = False
        """Whether it takes no more requests, as it is being shut down."""
        self._replicas = replicas
        self._there: set[str] = set()
        """Paths that a replica has answered: a count of requests is kept of each."""
        self.suspect = replicas.suspect
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "isobit_requests",
            "Requests by route and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self.continued = Counter(
            "isobit_front_continued",
            "Streams that a replica went on with when another was lost.",
            registry=self._registry,
        )
        for name, what in (("up", "Whether it is used."), ("running", "Requests in it.")):
            gauge = Gauge(f"isobit_front_replica_{name}", what, ["url"], registry=self._registry)
            for r in replicas.all:
                gauge.labels(r.url).set_function(partial(getattr, r, name))
        self._relayed = _RelayedMetrics()
        self._registry.register(self._relayed)

    async def end(self) -> None:
        """End what is being answered."""
        await self._replicas.close()

    async def choose(self, body: Any, tried: list[Replica]) -> Replica | None:
        """Where a request goes."""
        return await self._replicas.choose(body, _WAIT_SECONDS, tried)

    def app(self) -> ASGIApp:
        """The application; its replicas must be watched while it runs."""
        routes = [
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/replicas", self.replicas),
            Route(stop.PATH, self.stop, methods=["POST"]),
            Route("/{path:path}", self.relay, methods=["GET", "POST"]),
        ]
        page = frozenset(route.path for route in webpage.routes())
        guard = Guard(Starlette(routes=routes, exception_handlers=errors.HANDLERS), self, page)
        return for_pages(guard, self.origins)

    def count(self, route: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    async def health(self, _request: Request) -> Response:
        """``GET /health``: the front answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """``GET /ready``: and so does a replica."""
        if self.draining or not any(r.up and not r.draining for r in self._replicas.all):
            return errors.answer(request, errors.ShuttingDown() if self.draining else NoReplica())
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``: the front's own, and the replicas' that routers of requests read."""
        asked, up = _Relayed(self, request, b"", None), [r for r in self._replicas.all if r.up]
        self._relayed.take(zip(up, await asyncio.gather(*map(asked.of, up)), strict=True))
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(generate_latest(self._registry), headers={"content-type": kind})

    async def replicas(self, _request: Request) -> Response:
        """``GET /replicas``: how each is."""
        names = ("url", "up", "running", "why")
        return JSONResponse([{n: getattr(r, n) for n in names} for r in self._replicas.all])

    async def stop(self, request: Request) -> Response:
        """``POST /stop``: of the replica that knows the answer, so each is asked."""
        asked = _Relayed(self, request, await body_of(request), None)
        for replica in [r for r in self._replicas.all if r.up]:
            found = await asked.of(replica)
            if found is not None and found.status_code != HTTPStatus.NOT_FOUND:
                return found
        return await asked.answer()

    async def relay(self, request: Request) -> Response:
        """Any other: a replica's answer."""
        body = await body_of(request)
        asked = None
        with suppress(ValueError, RecursionError):
            asked = json.loads(body)
        answer = await unless_gone(request, _Relayed(self, request, body, asked).answer())
        path = request.url.path
        if answer.status_code < HTTPStatus.BAD_REQUEST:
            self._there.add(path)
        if path in self._there:  # else anybody could have it count under any name
            request.scope["route"] = Route(path, self.relay)
        return answer


class _RelayedMetrics(Collector):
    """What replicas said last under ``vllm:`` names, with the URL of each as a label."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}

    def take(self, said: Iterable[tuple[Replica, Response | None]]) -> None:
        """These are their answers; None of one that gave none."""
        self._families = {}
        for replica, answer in said:
            if answer is None or answer.status_code != HTTPStatus.OK:
                continue
            for found in text_string_to_metric_families(bytes(answer.body).decode()):
                if found.name.startswith("vllm:"):
                    family = Metric(found.name, found.documentation, found.type)
                    family = self._families.setdefault(found.name, family)
                    for s in found.samples:
                        family.add_sample(s.name, s.labels | {"url": replica.url}, s.value)

    def collect(self) -> Iterator[Metric]:
        """Each family once, with the samples of all replicas."""
        return iter(self._families.values())


class _Relayed:
    """One request on its way."""

    def __init__(self, front: Front, request: Request, body: bytes, asked: Any) -> None:
        self._front = front
        self._request = request
        self._body = body
        self._asked = asked
        self._journal = Journal()
        self._tried: list[Replica] = []

    async def answer(self) -> Response:
        """What a client is told. Raises NoReplica."""
        replica, response = await self._ask()
        if _streams(response):
            self._journal.by = response.headers.get(BY, "")
            stream = self._stream(replica, response)
            first = await anext(stream, "")  # from here on it ends well, whoever leaves

            async def whole() -> AsyncIterator[str]:
                yield first
                async for text in stream:
                    yield text

            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(whole(), media_type="text/event-stream", headers=headers)
        return _whole(response)

    async def of(self, replica: Replica) -> Response | None:
        """What this replica says, at once; None if it does not."""
        with suppress(httpx.TransportError):
            response = await self._send(replica)
            await response.aread()
            return _whole(response)
        return None

    async def _ask(self) -> tuple[Replica, httpx.Response]:
        """A replica's answer: read, unless it is a stream; then the replica is counted as busy."""
        busy: tuple[Replica, httpx.Response] | None = None
        failed = 0
        while failed < _TRIES and not self._front.draining:
            replica = await self._front.choose(self._asked, self._tried)
            if replica is None or (busy and replica in self._tried):
                break
            self._tried.append(replica)
            replica.running += 1
            streams = False
            try:
                response = await self._send(replica)
                streams = _streams(response)
                if not streams:
                    await response.aread()
                if response.status_code not in _BUSY:
                    return replica, response
                busy = replica, response
            except httpx.TransportError:
                failed += 1
                await self._front.suspect(replica)
            finally:
                replica.running -= not streams
        if busy is not None:
            return busy
        raise NoReplica

    async def _send(self, replica: Replica) -> httpx.Response:
        request, content = self._request, self._body
        # As bytes: whatever a client sent, the replica is to judge.
        headers = [(k, v) for k, v in request.headers.raw if k.decode("latin-1") not in _OWN]
        timeout = patience()
        if request.method == "POST":
            journal = self._journal.model_dump_json().encode()
            own = {FRONT: self._front.key, JOURNAL_BYTES: str(len(journal))}
            headers += [(k.encode(), v.encode()) for k, v in own.items()]
            content = journal + content
            if isinstance(self._asked, dict) and self._asked.get("stream") is True:
                timeout.read = _SILENCE
        base, path = replica.client.base_url, request.scope["raw_path"]
        if query := request.scope["query_string"]:
            path += b"?" + query
        target = base.raw_path[:-1] + quote(path, safe=string.punctuation).encode()
        try:
            url = base.copy_with(raw_path=target)
        except httpx.InvalidURL as error:
            raise UsageError(f"path: expected one of a URL: {error}") from None
        asked = replica.client.build_request(
            request.method, url, headers=headers, content=content, timeout=timeout
        )
        return await replica.client.send(asked, stream=True)

    async def _stream(self, replica: Replica, response: httpx.Response) -> AsyncIterator[str]:
        """The lines of one replica after another, until the stream has ended."""
        barren = 0  # replicas that were lost in turn without a token more
        while True:
            try:
                async for text in response.aiter_lines():
                    line = Line.model_validate_json(text)
                    self._journal.take(line)
                    barren = 0 if line.tokens else barren
                    yield line.text
                    if line.end:
                        return
            except (httpx.TransportError, ValidationError):
                await self._front.suspect(replica)
            finally:
                await _left(replica, response)
            barren += 1
            self._tried = [replica]
            going_on = asyncio.create_task(self._survivor(barren))
            try:
                while not (await asyncio.wait((going_on,), timeout=PING_SECONDS))[0]:
                    yield _PING
                replica, response = going_on.result()
            except NoReplica as error:
                yield self._error(str(error))
                return
            except BaseException:  # the client leaves
                if not going_on.cancel() and going_on.exception() is None:
                    replica, response = going_on.result()
                    if _streams(response):
                        await _left(replica, response)
                raise
            if not _streams(response):
                yield self._error(f"a replica would not go on: {response.text[:300]}")
                return
            self._front.continued.inc()

    async def _survivor(self, barren: int) -> tuple[Replica, httpx.Response]:
        """The answer of another replica, which goes on with the stream. Raises NoReplica."""
        if barren >= _TRIES:
            raise NoReplica
        replica, response = await self._ask()
        until = time.monotonic() + _WAIT_SECONDS
        while response.status_code in _BUSY and time.monotonic() < until:
            await asyncio.sleep(1)
            self._tried = []
            replica, response = await self._ask()
        return replica, response

    def _error(self, message: str) -> str:
        if self._front.draining:
            message = str(errors.ShuttingDown())
        _log.error("a stream ends: %s", message)
        if errors.is_anthropic(self._request.scope["path"]):
            return event(json.dumps(errors.anthropic_body(message)), "error")
        return event(json.dumps(errors.error_body(message, "server_error")))


def _whole(response: httpx.Response) -> Response:
    """An answer that was read, for a client."""
    kept = {name: response.headers[name] for name in _KEPT if name in response.headers}
    return Response(response.content, response.status_code, kept)


def _streams(response: httpx.Response) -> bool:
    """Whether it is written for a front, which counts its replica as busy until it is read."""
    return bool(response.headers.get("content-type") == LINES)


async def _left(replica: Replica, response: httpx.Response) -> None:
    """A stream of it was read, as far as it will be."""
    replica.running -= 1
    with suppress(httpx.HTTPError):
        await response.aclose()
