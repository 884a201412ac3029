"""A request's body, within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from isobit.server.errors import WORDS, BodyTooLarge, BodyTooSlow, ClientGone
from isobit.server.request.prompts import RequestBody

MOST_BYTES = 16 << 20
BODY_SECONDS = 60.0  # until it is there

Body = TypeVar("Body", bound=RequestBody)
Result = TypeVar("Result")


async def read(request: Request, kind: type[Body]) -> Body:
    """What was asked; what is refused from here on is refused in its words.

    Raises ValidationError for what it must not be, BodyTooLarge, BodyTooSlow, ClientGone.
    """
    data = await body_of(request)
    if len(data) < 1 << 16:
        asked = kind.model_validate_json(data)
    else:
        asked = await asyncio.to_thread(kind.model_validate_json, data)
    request.scope[WORDS] = asked.words
    return asked


async def body_of(request: Request) -> bytes:
    """A request's body. Raises BodyTooLarge, BodyTooSlow, ClientGone."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > MOST_BYTES:
                    raise BodyTooLarge(f"body: expected at most {MOST_BYTES} bytes, got more")
    except TimeoutError:
        raise BodyTooSlow(f"body: expected within {BODY_SECONDS:.0f} s, got a part of it") from None
    except ClientDisconnect:
        raise ClientGone("client: expected to stay, but left") from None
    return bytes(data)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives; cancelled, with ClientGone, if the client leaves before.

    The request's body must have been read.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("client: expected to stay for the answer, but left")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
