"""The routes: from a request's JSON to the engine, and from its tokens to the answer's JSON."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from isobit import __version__
from isobit.errors import IsobitError, UsageError
from isobit.runtime.scheduler import QueueFull
from isobit.server.bodies import ChatShape, CompletionShape, error_body, usage
from isobit.server.chat import Chat, prepared
from isobit.server.choices import Choice, Choices, ClientGone, Piece
from isobit.server.requests import (
    MOST_CHOICES,
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from isobit.server.service import Service

MOST_BYTES = 16 << 20  # of a request

Shape = ChatShape | CompletionShape
Body = TypeVar("Body", bound=BaseModel)
Handler = Callable[[Request], Awaitable[Response]]


def build(service: Service) -> Starlette:
    """The application that serves it."""
    routes = Routes(service)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.guarded(routes.chat), methods=["POST"]),
            Route("/v1/completions", routes.guarded(routes.completions), methods=["POST"]),
            Route("/v1/models", routes.guarded(routes.models)),
            Route("/v1/models/{model:path}", routes.guarded(routes.models)),
            Route("/tokenize", routes.guarded(routes.tokenize), methods=["POST"]),
            Route("/detokenize", routes.guarded(routes.detokenize), methods=["POST"]),
            Route("/health", routes.guarded(routes.health)),
            Route("/metrics", routes.guarded(routes.metrics)),
            Route("/version", routes.guarded(routes.version)),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
    )


class Routes:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def guarded(self, handler: Handler) -> Handler:
        """A handler that checks the key first, and whose errors are OpenAI's."""

        async def handle(request: Request) -> Response:
            try:
                response = self._refusal(request) or await handler(request)
            except (IsobitError, ValidationError) as error:
                response = _error_response(error)
            path = request.scope["route"].path
            labels = f'{{path="{path}",status="{response.status_code}"}}'
            self.service.counts["isobit_requests_total", labels] += 1
            return response

        return handle

    def _refusal(self, request: Request) -> Response | None:
        if self.service.api_key is None:
            return None
        given = request.headers.get("authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {self.service.api_key}".encode()):
            return None
        message = "authorization: expected Bearer and the server's API key"
        body = error_body(message, "authentication_error", None, "invalid_api_key")
        return JSONResponse(body, 401, {"www-authenticate": "Bearer"})

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        asked = await _read(request, ChatRequest)
        measured, model = asked.measured, self.service.model
        chat = await prepared(model, asked)
        shape = ChatShape(model.tokenizer, logprobs=measured is not None)
        prompts = [chat.prompt]
        return await self._answer(request, asked, prompts, asked.most, measured, shape, chat)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        asked = await _read(request, CompletionRequest)
        model = self.service.model
        ids = await asyncio.to_thread(
            lambda: [
                model.checked(
                    model.tokenizer.encode(p, special=True, most=model.context)
                    if isinstance(p, str)
                    else p
                )
                for p in asked.prompts()
            ]
        )
        echo = [model.detokenize(i) for i in ids for _ in range(asked.n or 1)] if asked.echo else ()
        shape = CompletionShape(model.tokenizer, logprobs=asked.logprobs is not None, echo=echo)
        return await self._answer(request, asked, ids, asked.most, asked.logprobs, shape)

    async def _answer(
        self,
        request: Request,
        asked: Common,
        prompts: Sequence[list[int]],
        most: int | None,
        logprobs: int | None,
        shape: Shape,
        chat: Chat | None = None,
    ) -> Response:
        n = asked.n or 1
        if n * len(prompts) > MOST_CHOICES:
            raise UsageError(f"n: expected at most {MOST_CHOICES} choices in all")
        sampling, begun = asked.sampling, []
        try:
            for index in range(n * len(prompts)):
                choice = Choice(
                    self.service.engine,
                    index,
                    prompts[index // n],
                    most,
                    sampling,
                    number=index % n,
                    stops=asked.stops,
                    logprobs=logprobs,
                    of_prompt=isinstance(asked, CompletionRequest) and bool(asked.echo),
                    receipt=asked.isobit_receipt,
                    reader=chat.reader() if chat else None,
                )
                begun.append(choice)
        except BaseException:
            for choice in begun:
                choice.generation.cancel()
            raise
        choices = Choices(begun, request)
        prefix = "chatcmpl" if isinstance(shape, ChatShape) else "cmpl"
        head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.service.name,
            "system_fingerprint": self.service.fingerprint,
        }
        if asked.stream:
            events = self._events(head, asked, prompts, choices, shape)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
            )
        found: list[list[Piece]] = [[] for _ in begun]
        async for piece in choices.pieces():
            if piece is not None:
                found[piece.index].append(piece)
        whole = [shape.whole(index, pieces) for index, pieces in enumerate(found)]
        self._sign(choices, whole)
        counts = self._count(prompts, choices)
        return JSONResponse(head | {"object": shape.object, "choices": whole, "usage": counts})

    async def _events(
        self,
        head: dict[str, Any],
        asked: Common,
        prompts: Sequence[list[int]],
        choices: Choices,
        shape: Shape,
    ) -> AsyncIterator[str]:
        head = head | {"object": shape.chunk}
        try:
            async for piece in choices.pieces():
                if piece is None:
                    yield ": still here\n\n"
                    continue
                parts = shape.parts(piece)
                if piece.finish is not None:
                    self._sign(choices, parts[-1:])
                none = {"usage": None} if asked.usage_at_end else {}
                for part in parts:
                    yield _event(head | {"choices": [part]} | none)
        except ClientGone:
            return
        except Exception as error:  # the status is sent already
            yield _event(error_body(_message(error), "server_error"))
            return
        finally:
            counts = self._count(prompts, choices)
        if asked.usage_at_end:
            yield _event(head | {"choices": [], "usage": counts})
        yield "data: [DONE]\n\n"

    def _sign(self, choices: Choices, parts: Sequence[dict[str, Any]]) -> None:
        """Put a choice's receipt beside it, if it was asked for."""
        for part in parts:
            receipt = choices.choices[part["index"]].receipt
            if receipt is not None:
                part["isobit_receipt"] = asdict(receipt)

    def _count(self, prompts: Sequence[list[int]], choices: Choices) -> dict[str, Any]:
        used = choices.usage(sum(map(len, prompts)))
        self.service.counts["isobit_prompt_tokens_total", ""] += used.prompt
        self.service.counts["isobit_generated_tokens_total", ""] += used.generated
        return usage(used)

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``, and one of them."""
        entry = {
            "id": self.service.name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "isobit",
            "max_model_len": self.service.model.context,
        }
        asked = request.path_params.get("model")
        if asked is None:
            return JSONResponse({"object": "list", "data": [entry]})
        if asked != self.service.name:
            message = f"model: expected {self.service.name!r}, got {asked!r:.60}"
            body = error_body(message, "invalid_request_error", "model", "model_not_found")
            return JSONResponse(body, 404)
        return JSONResponse(entry)

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``: the ids of a text or a conversation."""
        asked = await _read(request, TokenizeRequest)
        model = self.service.model
        if (asked.prompt is None) == (asked.messages is None):
            raise UsageError("prompt: expected it or messages, one of them")
        if asked.messages is not None:
            ids = await asyncio.to_thread(model.chat_ids, asked.messages)
        else:
            special = asked.add_special_tokens
            ids = await asyncio.to_thread(
                model.tokenizer.encode, asked.prompt or "", special=True, bos=special
            )
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": model.context})

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``: the text of ids."""
        asked = await _read(request, DetokenizeRequest)
        return JSONResponse({"prompt": self.service.model.detokenize(asked.tokens)})

    async def health(self, _request: Request) -> Response:
        """``GET /health``."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, _request: Request) -> Response:
        """``GET /metrics``."""
        return PlainTextResponse(self.service.metrics(), media_type="text/plain; version=0.0.4")

    async def version(self, _request: Request) -> Response:
        """``GET /version``."""
        return JSONResponse({"version": __version__, "fingerprint": self.service.fingerprint})


async def _read(request: Request, kind: type[Body]) -> Body:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise UsageError(f"body: expected at most {MOST_BYTES} bytes, got more")
    return await asyncio.to_thread(kind.model_validate_json, bytes(data))


def _event(body: object) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _error_response(error: IsobitError | ValidationError) -> Response:
    kind = "invalid_request_error"
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"])) or "body"
        return JSONResponse(error_body(f"{param}: {first['msg']}", kind, param), 400)
    message = str(error)
    if isinstance(error, QueueFull):
        body = error_body(message, "rate_limit_error", None, "rate_limit_exceeded")
        return JSONResponse(body, 429, {"retry-after": "1"})
    if isinstance(error, ClientGone):
        return Response(status_code=499)
    if isinstance(error, UsageError):
        param = message.split(":", maxsplit=1)[0].split(maxsplit=1)[0]
        code = "context_length_exceeded" if "(the context)" in message else None
        return JSONResponse(error_body(message, kind, param, code), 400)
    return JSONResponse(error_body(message, "server_error"), 500)


def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = error_body(error.detail, "invalid_request_error")
    return JSONResponse(body, error.status_code, error.headers)


def _internal_error(_request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(_message(error), "server_error"), 500)


def _message(error: Exception) -> str:
    """What a client is told; of a fault in the server nothing else."""
    if isinstance(error, IsobitError):
        return str(error)
    logging.getLogger("isobit.server").error("a request failed", exc_info=error)
    return "internal error; the server's log says more"
