"""What stands before every route: the key, how many may be inside, and a count of what came out."""

from __future__ import annotations

import hmac

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isobit.runtime.scheduler import QueueFull
from isobit.server.errors import ShuttingDown, answer, refusal, told
from isobit.server.service import Service

MOST_BYTES = 256 << 20  # of all bodies that are inside


class Guard:
    """An ASGI application in front of another; ``public``: paths whose files need no key."""

    def __init__(self, app: ASGIApp, service: Service, public: frozenset[str]) -> None:
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

        refused = self._refusal(Request(scope))
        try:
            self._inside += 1
            if refused is not None:
                await refused(scope, receive, sent)
            else:
                await self._app(scope, received, sent)
        except Exception as error:
            if not status:  # else the client was told, and so was the log
                told(error)
        finally:
            self._inside -= 1
            self._bytes -= size
            route = getattr(scope.get("route"), "path", "none")
            self._service.metrics.requests.labels(route, str(status)).inc()

    def _refusal(self, request: Request) -> Response | None:
        key = self._service.api_key
        public = request.method in ("GET", "HEAD") and request.url.path in self._public
        if key is not None and not public and not _has(request, key):
            message = "authorization: expected Bearer (or x-api-key) and the server's API key"
            kind, code = "authentication_error", "invalid_api_key"
            headers = {"www-authenticate": "Bearer"}
            return refusal(request, 401, message, kind, None, code, headers)
        if self._service.draining and request.method == "POST":
            return answer(request, ShuttingDown())
        if self._inside >= self._service.most_inside and request.method == "POST":
            message = f"requests: expected at most {self._inside} at once: try again later"
            kind, code = "rate_limit_error", "rate_limit_exceeded"
            return refusal(request, 429, message, kind, None, code, {"retry-after": "1"})
        return None


def _has(request: Request, key: str) -> bool:
    """Whether a request carries the key; how long that takes does not depend on what it carries."""
    bearer = request.headers.get("authorization", "").encode()
    plain = request.headers.get("x-api-key", "").encode()
    first = hmac.compare_digest(bearer, f"Bearer {key}".encode())
    return hmac.compare_digest(plain, key.encode()) | first
