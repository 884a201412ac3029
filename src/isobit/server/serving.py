"""The application on a socket, from start to a shutdown that tells every client."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from isobit.server.app import build
from isobit.server.service import Service
from isobit.server.wire import ChunkWriter, Http

_TELLING = 5.0  # seconds in which streams that are cut can be told
_LOOK = 0.1  # seconds until a second signal is noticed
Say = Callable[[str], None]
"""Shows a line to whoever started it."""


class Serving(Protocol):
    """What a server knows of what it serves."""

    draining: bool

    async def end(self) -> None:
        """End what is being answered: whoever reads it is told."""


class Server(uvicorn.Server):
    """Answers until SIGINT or SIGTERM; then what runs may go on for a while, and no more begins."""

    def __init__(self, service: Serving, config: uvicorn.Config, grace: float, say: Say) -> None:
        super().__init__(config)
        self._service = service
        self._grace = grace
        self._say = say
        self._hurry = False

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """The first signal begins the end, which is no failure; a second SIGINT does not wait for
        who is being answered, a third for nothing."""
        if self.should_exit and sig == signal.SIGINT:
            self._hurry = True
            signal.signal(sig, signal.SIG_DFL)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what is being answered, then end the generations that are left: their streams
        say so. Until then the door is open: whoever comes is told to ask elsewhere."""
        self._service.draining = True
        until = time.monotonic() + self._grace
        running = set(self.server_state.tasks)
        if running:
            what = f"{len(running)} {'request' if len(running) == 1 else 'requests'}"
            self._say(f"{what} may go on for {self._grace:g} s; another Ctrl-C ends it now")
        while running and not self._hurry and time.monotonic() < until:
            running = (await asyncio.wait(running, timeout=_LOOK))[1]
        await self._service.end()
        asyncio.get_running_loop().call_later(_TELLING, self._cut)
        await super().shutdown(sockets)

    def _cut(self) -> None:
        """Leave those who do not read what they are told, and what has not been answered yet."""
        self.force_exit = True
        for connection in self.server_state.connections:
            connection.transport.abort()


def run(service: Service, sockets: Sequence[socket.socket], grace: float, say: Say) -> None:
    """Serve until SIGINT or SIGTERM, at sockets that listen."""
    server = prepared(service, build(service), grace, say)
    # The model and the modules stay: to look through them for garbage stops every stream for long.
    gc.collect()
    gc.freeze()
    server.run(list(sockets))


def prepared(service: Serving, app: ASGIApp, grace: float, say: Say) -> Server:
    """A server, to be run in the thread that calls this."""
    with suppress(OSError, ValueError):  # a client that says nothing takes a file of these
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    config = uvicorn.Config(
        ChunkWriter(app),
        http=Http,
        log_level="warning",
        access_log=False,
    )
    return Server(service, config, grace, say)
