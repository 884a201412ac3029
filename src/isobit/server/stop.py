"""``POST /stop``: an answer that streams ends now, as at its limit, with its receipt and usage.

A client that leaves ends it too, but is told no more of it.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isobit.server.body import read
from isobit.server.request.prompts import RequestBody
from isobit.server.service import Service

PATH = "/stop"


class StopRequest(RequestBody):
    """What may be asked."""

    id: str
    """The answer's, as its pieces carry it."""


class Stop:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Where it is."""
        return [Route(PATH, self.stop, methods=["POST"])]

    async def stop(self, request: Request) -> Response:
        """``POST /stop``: end the answer of an id."""
        asked = await read(request, StopRequest)
        end = self._service.streams.get(asked.id[-32:])  # after what its interface puts before it
        if end is None:
            wrong = f"id: expected that of an answer that streams now, got {asked.id!r:.80}"
            raise HTTPException(404, wrong)
        end()
        return JSONResponse({"id": asked.id})
