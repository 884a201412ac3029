"""A request's body, within limits."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from isobit.errors import UsageError
from isobit.server.errors import WORDS, BodyTooLarge, BodyTooSlow, ClientGone
from isobit.server.request.prompts import RequestBody

MOST_BYTES = 16 << 20
BODY_SECONDS = 60.0  # until it is there

_LARGE = re.compile(rb"NaN|Infinity|[eE]\+?\d{3}|\d{309}")
"""What a body with a number has that is none, or more than 1.8e308."""

Body = TypeVar("Body", bound=RequestBody)
Result = TypeVar("Result")


async def read(request: Request, kind: type[Body]) -> Body:
    """What was asked; what is refused from here on is refused in its words.

    Raises ValidationError and UsageError for what it must not be, BodyTooLarge, BodyTooSlow,
    ClientGone.
    """
    data = await body_of(request)
    if len(data) < 1 << 16:
        asked = _validated(kind, data)
    else:
        asked = await asyncio.to_thread(_validated, kind, data)
    request.scope[WORDS] = asked.words
    return asked


def _validated(kind: type[Body], data: bytes) -> Body:
    asked = kind.model_validate_json(data)
    if _LARGE.search(data):  # the library takes what no answer could repeat in JSON
        for place, value in _numbers(from_json(data)):
            if not math.isfinite(value):
                raise UsageError(
                    f"{place[1:]:.200}: expected a number that JSON can hold, got {value}"
                )
    return asked


def _numbers(value: object, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{place}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _numbers(item, f"{place}[{i}]")


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
