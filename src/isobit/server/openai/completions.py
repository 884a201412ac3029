"""OpenAI's two older interfaces: ``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isobit.server.answer.answers import Answers, event
from isobit.server.answer.choices import Piece
from isobit.server.body import read
from isobit.server.errors import error_body
from isobit.server.openai.bodies import ChatShape, CompletionShape, usage
from isobit.server.parsing.events import Text, Usage
from isobit.server.request.chat import held, prepared
from isobit.server.request.fields import ChatRequest, Common, CompletionRequest
from isobit.server.request.prompts import encoded
from isobit.server.service import Service

Shape = ChatShape | CompletionShape


class Completions:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Where they are."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``: the answer to a conversation."""
        asked = await read(request, ChatRequest)
        service, measured = self._service, asked.measured
        chat = await prepared(service.model, asked)
        shape = ChatShape(service.model.tokenizer, logprobs=measured is not None)
        prompts, most = [chat.prompt], asked.most
        answers = Answers(service, request, asked, prompts, most=most, logprobs=measured, chat=chat)
        return await self._answer(asked, answers, shape)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``: what follows a text, or several."""
        asked = await read(request, CompletionRequest)
        service, logprobs, echo = self._service, asked.logprobs, bool(asked.echo)
        ids = await encoded(service.model, asked.prompts())
        texts = [service.model.detokenize(i) for i in ids for _ in range(asked.n or 1) if echo]
        shape = CompletionShape(service.model.tokenizer, logprobs=logprobs is not None, echo=texts)
        chat, most = await held(service.model, asked), asked.most
        answers = Answers(
            service, request, asked, ids, most=most, logprobs=logprobs, echo=echo, chat=chat
        )
        return await self._answer(asked, answers, shape)

    async def _answer(self, asked: Common, answers: Answers, shape: Shape) -> Response:
        head = {
            "id": f"{shape.prefix}-{answers.journal.name()}",
            "created": int(answers.journal.created),
            "model": self._service.name,
            "system_fingerprint": self._service.fingerprint,
        }
        if asked.stream:
            return answers.stream(
                CompletionChunks(head, shape, answers, usage_at_end=asked.usage_at_end)
            )
        found, used = await answers.whole()
        choices = [
            shape.whole(index, pieces) | answers.receipt(index)
            for index, pieces in enumerate(found)
        ]
        body = {"object": shape.object, "choices": choices, "usage": usage(used)}
        return JSONResponse(head | body)


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_CUT = "\0"


class CompletionChunks:
    """The stream of both: chunks that each have the answer's head."""

    def __init__(
        self, head: dict[str, Any], shape: Shape, answers: Answers, *, usage_at_end: bool
    ) -> None:
        self._head = _json(head | {"object": shape.chunk})[:-1]  # written once, without the "}"
        self._shape = shape
        self._answers = answers
        self._usage = usage_at_end
        self._frames: dict[int, tuple[str, str]] = {}
        """By choice, what stands before and after the text of a chunk of nothing but text."""

    def begin(self) -> Iterator[str]:
        """Nothing."""
        yield from ()

    def piece(self, piece: Piece) -> Iterable[str]:
        """A chunk for each of its parts; the last of a choice has its receipt."""
        text = self._shape.plain(piece)
        if text is None:
            return self.parts(piece)
        frame = self._frames.get(piece.index)
        if frame is None:  # written once, with a text that is then cut out
            [part] = self._shape.parts(Piece(piece.index, [Text(_CUT)], [[]]))
            before, _, after = self._chunk([part], None).rpartition(_json(_CUT))
            frame = self._frames[piece.index] = before, after
        return (f"{frame[0]}{_json(text)}{frame[1]}",)

    def parts(self, piece: Piece) -> Iterator[str]:
        """:meth:`piece`, written anew."""
        parts = self._shape.parts(piece)
        if piece.finish is not None:
            parts[-1] |= self._answers.receipt(piece.index)
        for part in parts:
            yield self._chunk([part], None)

    def ping(self) -> str:
        """A comment."""
        return ": still here\n\n"

    def end(self, used: Usage) -> Iterator[str]:
        """The usage if it was asked for, and the word that ends it."""
        if self._usage:
            yield self._chunk([], usage(used))
        yield event("[DONE]")

    def error(self, message: str) -> Iterator[str]:
        """An error in place of a chunk."""
        yield event(json.dumps(error_body(message, "server_error")))

    def _chunk(self, choices: list[dict[str, Any]], used: dict[str, Any] | None) -> str:
        body: dict[str, Any] = {"choices": choices}
        if self._usage:
            body["usage"] = used
        return event(f"{self._head},{_json(body)[1:]}")
