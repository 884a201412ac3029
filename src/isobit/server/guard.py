"""What stands before every route: the key, how many may be inside, a count of what came out; and
the journal that a front sends before a request's body."""

from __future__ import annotations

import hmac
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isobit.errors import UsageError
from isobit.runtime.scheduler import QueueFull
from isobit.server.answer.journal import JOURNAL, Journal
from isobit.server.errors import ShuttingDown, answer, refusal

MOST_BYTES = 256 << 20  # of all bodies that are inside
MOST_JOURNAL = 64 << 20
FRONT, JOURNAL_BYTES = "isobit-front", "isobit-journal"
"""Headers of a front: its key, and the length of the journal that comes before the body."""

SEND = "isobit.send"
"""Where in a request's ASGI scope the server's own send is: once the head of an answer is sent,
nobody between looks at the rest."""


class Guarded(Protocol):
    """What a guard knows of what it stands before."""

    api_key: str | None
    draining: bool
    most_inside: int

    def count(self, route: str, status: int) -> None:
        """A request was answered."""


class Guard:
    """An ASGI application in front of another; ``public``: paths whose files need no key."""

    def __init__(self, app: ASGIApp, service: Guarded, public: frozenset[str]) -> None:
        self._app = app
        self._public = public
        self._service = service
        self._inside = 0
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = size = 0

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def received() -> Message:
            nonlocal size
            message = await receive()
            n = len(message.get("body", b""))
            size, self._bytes = size + n, self._bytes + n
            if self._bytes > MOST_BYTES:
                raise QueueFull(f"body: {MOST_BYTES} bytes of bodies are here: try again later")
            return message

        scope[SEND] = send
        request = Request(scope)
        refused = self._refusal(request)
        try:
            self._inside += 1
            if refused is not None:
                await refused(scope, receive, sent)
            else:
                await self._app(scope, received, sent)
        except Exception as error:
            if not status:  # else the client was told, and so was the log
                await answer(request, error)(scope, receive, sent)
        finally:
            self._inside -= 1
            self._bytes -= size
            route = getattr(scope.get("route"), "path", "none")
            self._service.count(route, status)

    def _refusal(self, request: Request) -> Response | None:
        key = self._service.api_key
        public = request.method in ("GET", "HEAD") and request.scope["path"] in self._public
        if key is not None and not public and not _has(request, key):
            message = "authorization: expected Bearer (or x-api-key) and the server's API key"
            kind, code = "authentication_error", "invalid_api_key"
            headers = {"www-authenticate": "Bearer"}
            return refusal(request, 401, message, kind, None, code, headers)
        if request.headers.get("upgrade", "").lower() == "websocket":
            message = "upgrade: expected HTTP, got a request for a websocket: use stream instead"
            return refusal(request, 400, message, "invalid_request_error")
        if self._service.draining and request.method == "POST":
            return answer(request, ShuttingDown())
        if self._inside >= self._service.most_inside and request.method == "POST":
            message = f"requests: expected at most {self._inside} at once: try again later"
            kind, code = "rate_limit_error", "rate_limit_exceeded"
            return refusal(request, 429, message, kind, None, code, {"retry-after": "1"})
        return None


class FromFront:
    """An ASGI application in front of another: takes the journal that a front sent off its body."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        """``key``: what fronts prove themselves by; None: there is none."""
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, with its journal in its scope."""
        request = Request(scope) if scope["type"] == "http" else None
        if request is None or FRONT not in request.headers:
            await self._app(scope, receive, send)
            return
        given, key = request.headers[FRONT].encode(), (self._key or "").encode()
        if not key or not hmac.compare_digest(given, key):
            message = "front: expected the key of this server's front, got another or none"
            kind, code = "authentication_error", "invalid_api_key"
            await refusal(request, 401, message, kind, None, code)(scope, receive, send)
            return
        size = request.headers.get(JOURNAL_BYTES)
        if size is None:
            await self._app(scope, receive, send)
            return
        n = int(size) if size.isdecimal() and len(size) < 12 else -1
        data = bytearray()
        more = 0 <= n <= MOST_JOURNAL
        while more and len(data) < n:
            got = await receive()
            data += got.get("body", b"")
            more = got.get("more_body", False)
        try:
            if len(data) < n or n < 0:
                raise ValueError
            scope[JOURNAL] = Journal.model_validate_json(bytes(data[:n]))
        except ValueError:
            error = UsageError(
                f"{JOURNAL_BYTES}: expected a journal of so many bytes before the body"
            )
            await answer(request, error)(scope, receive, send)
            return
        rest: list[Message] = [{"type": "http.request", "body": bytes(data[n:]), "more_body": more}]

        async def received() -> Message:
            return rest.pop() if rest else await receive()

        await self._app(scope, received, send)


def _has(request: Request, key: str) -> bool:
    """Whether a request carries the key; how long that takes does not depend on what it carries."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    plain = request.headers.get("x-api-key", "")
    first = hmac.compare_digest(bearer.encode("latin-1"), key.encode())
    second = hmac.compare_digest(plain.encode("latin-1"), key.encode())
    return (first and scheme.lower() == "bearer") | second
