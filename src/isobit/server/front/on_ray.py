"""An application of Ray Serve: servers of one model on a cluster, and our front as their ingress.

Ray places the servers, starts them again when they die, adds and removes them with the load and
replaces them one by one in an update; requests get to them through its handles. The front
(:mod:`isobit.server.front.front`) keeps a journal of every stream: another server goes on with what
one of them was answering when it ended.

``serve run isobit.server.front.on_ray:app model=model.gguf replicas=2``; :class:`AppSettings` has
the rest.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from isobit.config import EngineConfig, bits_of
from isobit.errors import IsobitError, UsageError
from isobit.runtime.model import Model
from isobit.runtime.scheduler import Limits
from isobit.server.app import build
from isobit.server.batch.in_process import messages
from isobit.server.front.affinity import PrefixAffinity, prefix_hashes
from isobit.server.front.front import Front
from isobit.server.front.replicas import Replica, Replicas, patience
from isobit.server.service import Service

try:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
except ImportError as error:
    raise UsageError(f"{error.name}: not installed: pip install '.[ray]'") from None

_KEY = "ray"  # what comes through a handle is the front's: clients' headers of the name are dropped
_FRONT_SECONDS = 600  # that streams have when a front is replaced

_log = logging.getLogger("isobit.ray")


class AppSettings(BaseModel):
    """What an application may be told; ``deployments:`` of Serve's own file says the rest."""

    model_config = ConfigDict(extra="forbid")

    model: str = "sample"
    """On every machine at the same place, or to be fetched: ``hf://…``."""
    name: str | None = None
    backend: str = "auto"
    hosts: str = ""
    """Stages that each server's layers run in, as ``--hosts`` has them."""
    activation_bits: int | None = None
    """None: 16."""
    activation_planes: int | None = None
    """Its former name: 2 (16 bits) or 1 (8); for a release."""
    context: int | None = None
    threads: PositiveInt = 1
    """Of a server, and the processors that it is given."""
    gpus: float = 0
    """That a server is given."""
    sequences: int = EngineConfig.max_sequences
    waiting: PositiveInt = Limits.waiting
    replicas: PositiveInt = 1
    most_replicas: PositiveInt | None = None
    """So many, if there is so much to do."""
    target: float = Field(32, gt=0)
    """Requests in a server, from which on there should be more servers."""
    grace: float = Field(10, ge=0)
    """Seconds that streams have in a server that is being replaced before others go on with
    them."""
    api_key_env: str | None = None
    origins: list[str] = []


class Where(NamedTuple):
    """Which servers a request should go to."""

    blocks: list[bytes]
    avoid: list[str]


class Server:
    """A server of the model, asked through a handle."""

    def __init__(self, asked: AppSettings) -> None:
        """Raises what opening the model does."""
        engine = EngineConfig(
            activation_bits=bits_of(asked.activation_bits, asked.activation_planes),
            threads=asked.threads,
            context=asked.context,
            max_sequences=asked.sequences,
            stages=tuple(filter(None, asked.hosts.split(","))),
        )
        self._model = Model(asked.model, asked.backend, engine, _log.warning)
        limits = Limits.of(engine, asked.waiting)
        self._service = Service(self._model, name=asked.name, front_key=_KEY, limits=limits)
        self._service.engine.start()
        self._app = build(self._service)
        self._id = serve.get_replica_context().replica_tag

    async def answer(
        self,
        method: str,
        target: bytes,
        headers: list[tuple[bytes, bytes]],
        content: bytes,
        *,
        where: Where,  # noqa: ARG002  # the router's
    ) -> AsyncIterator[Any]:
        """Its name, then the status and headers of an answer, then the body's parts."""
        yield self._id
        async for message in messages(self._app, method, target, headers, content):
            if message["type"] == "http.response.start":
                yield message["status"], message["headers"]
            elif body := message.get("body"):
                yield body

    def check_health(self) -> None:
        """Raises if it is to be started again."""
        if not self._service.ready:
            raise IsobitError("engine: expected it to run, it has ended")

    def __del__(self) -> None:
        """Free the memory; Ray calls it when streams have ended or their time is over."""
        with suppress(AttributeError):
            self._model.close()


class Router(RequestRouter):  # type: ignore[misc]
    """Sends requests that begin alike to the same server, unless it has far more to do."""

    def initialize_state(self) -> None:
        """See RequestRouter."""
        self._affinity = PrefixAffinity[str]()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest = None
    ) -> list[list[RunningReplica]]:
        """The server that a request should go to, then the others, then those to be avoided."""
        where: Where = pending_request.kwargs["where"]
        every = {r.replica_id.unique_id: r for r in candidate_replicas}
        good = {name: r for name, r in every.items() if name not in where.avoid} or every
        known = self.replica_queue_len_cache
        load = {name: known.get(r.replica_id) or 0 for name, r in good.items()}
        first = self._affinity.find(where.blocks, load)
        rest = [r for name, r in good.items() if name != first]
        return [[good[first]], rest, [r for name, r in every.items() if name not in good]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, _: Any) -> None:
        """See RequestRouter."""
        self._affinity.learn(pending_request.kwargs["where"].blocks, replica_id.unique_id)


class _Answer(httpx.AsyncByteStream):
    """What a server gives to one request, as it comes."""

    def __init__(self, parts: Any, seconds: float | None) -> None:
        """``seconds``: between two parts."""
        self._parts = parts
        self._seconds = seconds

    async def next(self, seconds: float | None) -> Any:
        """The next part. Raises httpx.TransportError, StopAsyncIteration."""
        try:
            async with asyncio.timeout(seconds):
                return await anext(self._parts)
        except TimeoutError:
            raise httpx.ReadTimeout("the server is silent") from None
        except (RayError, RayServeException) as error:
            raise httpx.ReadError(f"the server has ended: {type(error).__name__}") from error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with suppress(StopAsyncIteration):
            while True:
                yield await self.next(self._seconds)

    async def aclose(self) -> None:
        """Whoever asked has left, or has it all."""
        self._parts.cancel()


class _Chosen(Replica, httpx.AsyncBaseTransport):
    """The server that Ray chooses for a request."""

    def __init__(self, handle: Any, where: Where, seconds: float) -> None:
        """``seconds``: until a server takes it."""
        self._handle, self._where, self._wait = handle, where, seconds
        self.name = ""
        super().__init__("http://ray", {})

    def _new_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url, transport=self, timeout=patience(), trust_env=False
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx.AsyncBaseTransport."""
        seconds = request.extensions["timeout"]["read"]
        content, target = await request.aread(), request.url.raw_path
        answer = _Answer(
            self._handle.answer.remote(
                request.method, target, list(request.headers.raw), content, where=self._where
            ),
            seconds,
        )
        try:
            self.name = await answer.next(self._wait)
            status, headers = await answer.next(seconds)
        except BaseException as error:
            await answer.aclose()
            if isinstance(error, StopAsyncIteration):
                raise httpx.ReadError("the server said nothing") from None
            raise
        return httpx.Response(status, headers=headers, stream=answer)


class _OnRay(Replicas):
    """The servers of a deployment, whose lives are Ray's concern."""

    def __init__(self, handle: Any) -> None:
        super().__init__((), _log.warning, {})
        self._handle = handle.options(stream=True)

    async def suspect(self, replica: Replica) -> None:
        """Ray asks for itself."""

    async def choose(
        self, body: Any, seconds: float, tried: Collection[Replica] = ()
    ) -> Replica | None:
        """See Replicas."""
        avoid = [r.name for r in tried if isinstance(r, _Chosen)]
        return _Chosen(self._handle, Where(prefix_hashes(body), avoid), seconds)


class _Front(Front):
    async def ready(self, request: Request) -> Response:
        """``GET /ready``: a server says so."""
        return await self.relay(request)

    async def replicas(self, request: Request) -> Response:
        """There is no such route: ``serve status`` knows."""
        return await self.relay(request)


def app(asked: AppSettings) -> serve.Application:
    """The application. Raises UsageError."""
    api_key = os.environ.get(asked.api_key_env) if asked.api_key_env else None
    if asked.api_key_env and not api_key:
        raise UsageError(f"{asked.api_key_env}: expected a key in it, got nothing")
    scaling: dict[str, Any] = {"num_replicas": asked.replicas}
    if asked.most_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": asked.replicas,
                "max_replicas": asked.most_replicas,
                "target_ongoing_requests": asked.target,
            }
        }
    server = serve.deployment(
        Server,
        name="Server",
        max_ongoing_requests=max(Limits.running, asked.sequences) + asked.waiting,
        graceful_shutdown_timeout_s=asked.grace,
        ray_actor_options={"num_cpus": asked.threads, "num_gpus": asked.gpus},
        request_router_config={"request_router_class": Router},
        **scaling,
    )

    def front() -> ASGIApp:
        handle = serve.get_deployment_handle("Server", serve.get_replica_context().app_name)
        return _Front(_OnRay(handle), _KEY, api_key, asked.origins).app()

    ingress = serve.deployment(
        serve.ingress(front)(),
        name="Front",
        max_ongoing_requests=Front.most_inside,
        graceful_shutdown_timeout_s=_FRONT_SECONDS,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(server.bind(asked))
