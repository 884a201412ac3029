"""Between the application and uvicorn: the chunks of a stream go to the socket in one step.

A token is a chunk of its own, and h11 takes as long over one as all that made its text. Heads, ends
and what is not in chunks are h11's as ever, and so is all that must wait for the client to read.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

_TRANSPORT = "isobit.transport"


class Http(H11Protocol):
    """uvicorn's; its requests say which transport they came by."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, _TRANSPORT: transport}

    def _should_upgrade(self) -> bool:
        """Never: the guard refuses what asks for websockets, and others go on as they are."""
        return False


class ChunkWriter:
    """An ASGI application in front of another."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through."""
        transport: asyncio.Transport | None = scope.get("state", {}).get(_TRANSPORT)
        may = scope["type"] == "http" and scope["http_version"] == "1.1"
        if transport is None or not may or scope["method"] == "HEAD":
            await self._app(scope, receive, send)
            return
        in_chunks = False

        async def sent(message: Message) -> None:
            nonlocal in_chunks
            if "headers" in message:
                in_chunks = all(name != b"content-length" for name, _ in message["headers"])
            chunk = in_chunks and message.get("more_body") and message.get("body")
            if chunk and not (transport.get_write_buffer_size() or transport.is_closing()):
                transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            else:
                await send(message)

        await self._app(scope, receive, sent)
