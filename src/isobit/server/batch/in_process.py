"""Requests to an application in this process, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message


async def messages(
    app: ASGIApp,
    method: str,
    target: bytes,
    headers: Iterable[tuple[bytes, bytes]],
    content: bytes,
) -> AsyncGenerator[Message]:
    """What it sends, parts of a body that have come together as one; who stops reading has left.

    Raises what the application does.
    """
    left = asyncio.Event()
    asked: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
    sent = asyncio.Queue[Message | None]()

    async def receive() -> Message:
        if asked:
            return asked.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    path, _, query = target.partition(b"?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote_to_bytes(path).decode(errors="replace"),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in headers],
        "server": None,
        "client": None,
    }
    answering = asyncio.ensure_future(app(scope, receive, sent.put))
    answering.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            body = message.get("body")
            while body is not None and not sent.empty() and (more := sent.get_nowait()):
                body += more.get("body", b"")
            yield message if body is None else {**message, "body": body}
            if answering.done() and sent.empty():
                break
        await answering
    finally:
        left.set()
        await asyncio.wait([answering])
