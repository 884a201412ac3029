"""What a client is told when something is wrong: a status, and a body in its interface's shape."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from isobit.errors import IsobitError, UsageError
from isobit.runtime.scheduler import QueueFull

WORDS = "isobit.words"
"""Where in a request's ASGI scope the interface's names are of what the engine and the chats that
other interfaces are made into call otherwise."""

# Parts of a place in a body that name a way to read it and no field: "str", "list[int]".
_KIND = re.compile(r".*[\[\](){}].*|(constrained-)?(str|int|float)|bool|none|dict|[A-Z]\w*")
_ANTHROPIC = {  # of others it is invalid_request_error below 500, else api_error
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Any:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class BodyTooLarge(UsageError):
    """More bytes than a request may have."""


class BodyTooSlow(UsageError):
    """Bytes of a request that did not come."""


class ShuttingDown(IsobitError):
    """The server ends, and takes no more."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class ClientGone(IsobitError):
    """The client left before its answer was complete."""


class NoReplica(IsobitError):
    """No server behind a front answers."""

    def __init__(self) -> None:
        super().__init__("replicas: expected one that answers, found none: try again later")


class Differs(IsobitError):
    """Another replica gave another token."""

    def __init__(self, index: int, before: int, here: int | None) -> None:
        super().__init__(
            f"replicas: expected token {index} to be {before} here too, got {here}: they do not "
            "serve the same model with the same settings"
        )


_STATUS: dict[type[Exception], int] = {BodyTooLarge: 413, BodyTooSlow: 408}


def answer(request: Request, error: Exception) -> Response:
    """The answer that tells of an error. Of a fault in the server it says no more than that."""
    status, headers = 500, None  # type: int, Mapping[str, str] | None
    kind, param, code = "server_error", None, None
    if isinstance(error, ValidationError):
        error = _of_field(error)
    message = client_message(error)
    if isinstance(error, HTTPException):
        status, kind, headers = error.status_code, "invalid_request_error", error.headers
        message = error.detail
        if message == HTTPStatus(status).phrase:  # no words of ours
            asked = f"{request.method} {request.scope['path']}"
            message = f"path: expected a route of /openapi.json, got {asked!r:.90}"
    elif isinstance(error, QueueFull):
        status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"
        headers = {"retry-after": "1"}
    elif isinstance(error, NoReplica):
        status, headers = 503, {"retry-after": "5"}
    elif isinstance(error, ShuttingDown):  # who asks again should not come by this connection
        status, headers = 503, {"retry-after": "5", "connection": "close"}
    elif isinstance(error, ClientGone):
        return Response(status_code=499)
    elif isinstance(error, UsageError):
        status, kind = _STATUS.get(type(error), 400), "invalid_request_error"
        field, colon, rest = message.partition(":")
        field = in_words(field, request.scope.get(WORDS, {}))
        if _for_anthropic(request):
            field = re.sub(r"\[(\d+)\]", r".\1", field)
        message, param = f"{field}{colon}{rest}", re.split("[: ]", field)[0]
        if "(the context)" in message or "(the KV cache)" in message:
            code = "context_length_exceeded"
    return refusal(request, status, message, kind, param, code, headers)


def in_words(field: str, words: Mapping[str, str]) -> str:
    """What an error calls a field, in the words of an interface.

    One that has another name has other indices, too: ``messages[3]`` may be no message there.
    """

    def word(found: re.Match[str]) -> str:
        name = found[1]
        return f"{words[name]}: {name}" if " " in name else words[name]  # no field but a thing

    return re.sub(rf"(?<![\w.])({'|'.join(words) or '(?!)'})(?![\w.])(\[\S*)?", word, field)


def _of_field(error: ValidationError) -> UsageError:
    """The same of one field, by its name."""
    first = _nearest(error)
    place = ""
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not _KIND.fullmatch(part):
            if not part.isidentifier():  # a key of the client's
                break
            place += f".{part}"
    said = first["msg"].removeprefix("Value error, ")
    if "recursion limit" in said:
        said = "expected at most 200 lists and objects within one another, found more"
    return UsageError(f"{place[1:] or 'body'}: {said}")


def _nearest(error: ValidationError) -> ErrorDetails:
    """What is wrong with the first field that is: of several types that it may have, of the one
    that it has."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    mine = [e for e in found if e["loc"][:1] == found[0]["loc"][:1]]
    return next((e for e in mine if not e["type"].endswith("_type")), found[0])


HANDLERS: dict[Any, Any] = dict.fromkeys(
    (HTTPException, IsobitError, ValidationError, Exception), answer
)
"""Of an application: :func:`answer` for whatever a route raises."""


def refusal(
    request: Request,
    status: int,
    message: str,
    kind: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error's body in the shape of the interface that was asked."""
    if _for_anthropic(request):
        named = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
        return JSONResponse(anthropic_body(message, named), status, headers)
    return JSONResponse(error_body(message, kind, param, code), status, headers)


def _for_anthropic(request: Request) -> bool:
    return is_anthropic(request.scope["path"]) or "anthropic-version" in request.headers


def is_anthropic(path: str) -> bool:
    """Whether a route is Anthropic's, where errors have its shape (as they do for its clients)."""
    return path.startswith("/v1/messages")


def anthropic_body(message: str, kind: str = "api_error") -> dict[str, object]:
    """An error in Anthropic's shape."""
    return {"type": "error", "error": {"type": kind, "message": message}}


def client_message(error: BaseException) -> str:
    """What a client is told; a fault in the server goes to its log, without what it was about.

    The log has the exception's type and its place: its text might quote a prompt.
    """
    if isinstance(error, (IsobitError, ValidationError, HTTPException)):
        return str(error)
    where = "".join(traceback.format_tb(error.__traceback__))
    logging.getLogger("isobit.server").error("%s, at\n%s", type(error).__name__, where)
    return "internal error; the server's log says more"
