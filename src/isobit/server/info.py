"""The routes that tell of the server and its model, and give text its tokens."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isobit import __version__
from isobit.errors import UsageError
from isobit.server.body import read
from isobit.server.errors import ShuttingDown, answer, refusal
from isobit.server.request.chat import counted
from isobit.server.request.fields import ChatRequest, DetokenizeRequest, TokenizeRequest
from isobit.server.service import Service


class Info:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Where they are."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/version", self.version),
        ]

    async def models(self, _request: Request) -> Response:
        """``GET /v1/models``: one, in OpenAI's shape and Anthropic's."""
        name = self._service.name
        page = {"has_more": False, "first_id": name, "last_id": name}
        return JSONResponse({"object": "list", "data": [self._entry()]} | page)

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        asked = request.path_params["model"]
        if asked != self._service.name:
            message = f"model: expected {self._service.name!r}, got {asked!r:.60}"
            kind, code = "invalid_request_error", "model_not_found"
            return refusal(request, 404, message, kind, "model", code)
        return JSONResponse(self._entry())

    def _entry(self) -> dict[str, Any]:
        created = self._service.created
        return {
            "id": self._service.name,
            "object": "model",
            "created": created,
            "owned_by": "isobit",
            "max_model_len": self._service.model.context,
            "type": "model",
            "display_name": self._service.name,
            "lifecycle": "active",
            "max_input_tokens": self._service.model.context,
            "created_at": _iso(created),
        }

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``: the ids of a text or a conversation."""
        asked = await read(request, TokenizeRequest)
        model = self._service.model
        if (asked.prompt is None) == (asked.messages is None):
            raise UsageError("prompt: expected a prompt or messages, one of them")
        if asked.messages is not None:
            chat = ChatRequest.model_validate(asked.model_dump(exclude={"prompt"}))
            ids = await counted(model, chat)
        else:
            special = asked.add_special_tokens
            ids = await asyncio.to_thread(
                model.tokenizer.encode, asked.prompt or "", special=True, bos=special
            )
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": model.context})

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``: the text of ids."""
        asked = await read(request, DetokenizeRequest)
        text = await asyncio.to_thread(self._service.model.detokenize, asked.tokens)
        return JSONResponse({"prompt": text})

    async def tokenizer(self, _request: Request) -> Response:
        """``GET /tokenizer_info``: what the file says of its tokenizer, under vLLM's names."""
        metadata = self._service.model.file.metadata
        tokenizer = self._service.model.tokenizer

        def special(role: str) -> str | None:
            token = metadata.get(f"tokenizer.ggml.{role}_token_id")
            if not isinstance(token, int) or not 0 <= token < tokenizer.vocab_size:
                return None
            return tokenizer.token_bytes(token).decode(errors="replace")

        return JSONResponse(
            {
                "tokenizer_class": f"gguf:{metadata.get('tokenizer.ggml.model')}",
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": self._service.model.context,
                "chat_template": metadata.get("tokenizer.chat_template"),
                "bos_token": special("bos"),
                "eos_token": special("eos"),
                "pad_token": special("padding"),
                "unk_token": special("unknown"),
                "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
                "stop_token_ids": sorted(self._service.model.stop_ids),
            }
        )

    async def health(self, _request: Request) -> Response:
        """``GET /health``: the server answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """``GET /ready``: and so does the model behind it."""
        if lost := self._service.model.backend.lost:
            return refusal(request, 503, lost, "server_error")
        if not self._service.ready:
            return answer(request, ShuttingDown())
        return JSONResponse({"status": "ready", "model": self._service.name})

    async def metrics(self, _request: Request) -> Response:
        """``GET /metrics``, in Prometheus's text format."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self._service.metrics.text(), headers={"content-type": kind})

    async def version(self, _request: Request) -> Response:
        """``GET /version``: what must be equal for a replica to go on with another's stream."""
        service = self._service
        about = {"version": __version__, "fingerprint": service.fingerprint}
        return JSONResponse(about | {"model": service.name, "max_model_len": service.model.context})


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
