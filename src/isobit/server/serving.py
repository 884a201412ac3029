"""The application on a socket, from start to a shutdown that tells every client."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from isobit.server.app import build
from isobit.server.service import Service
from isobit.server.wire import ChunkWriter, Http

_TELLING = 5.0  # seconds in which streams that are cut can be told


class Serving(Protocol):
    """What a server knows of what it serves."""

    draining: bool

    async def end(self) -> None:
        """End what is being answered: whoever reads it is told."""


class Server(uvicorn.Server):
    """Answers until it is told to end; then what runs may go on for a while, and no more begins."""

    def __init__(self, service: Serving, config: uvicorn.Config, grace: float) -> None:
        super().__init__(config)
        self._service = service
        self._grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the door, wait, then end the generations that are left: their streams say so."""
        self._service.draining = True
        ending = asyncio.create_task(self._end())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(self._grace)
        await self._service.end()


def run(service: Service, sockets: Sequence[socket.socket], grace: float) -> None:
    """Serve until SIGINT or SIGTERM, at sockets that listen."""
    server = prepared(service, build(service), grace)
    # The model and the modules stay: to look through them for garbage stops every stream for long.
    gc.collect()
    gc.freeze()
    server.run(list(sockets))


def prepared(service: Serving, app: ASGIApp, grace: float) -> Server:
    """A server, to be run in the thread that calls this."""
    with suppress(OSError, ValueError):  # a client that says nothing takes a file of these
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    config = uvicorn.Config(
        ChunkWriter(app),
        http=Http,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(grace + _TELLING),
    )
    # uvicorn raises the signals that it saw again when all is done; this one has done its work.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return Server(service, config, grace)
