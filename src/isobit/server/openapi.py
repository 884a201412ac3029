"""``/openapi.json``: the routes, and what they take as the handlers themselves check it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isobit import __version__
from isobit.server.anthropic.messages import CountRequest, MessageRequest
from isobit.server.errors import is_anthropic
from isobit.server.openai.embeddings import EmbeddingRequest
from isobit.server.openai.responses import ResponseRequest
from isobit.server.replay import ReplayRequest
from isobit.server.request.fields import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from isobit.server.sglang.generate import GenerateRequest
from isobit.server.stop import StopRequest

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
    "/v1/responses/input_tokens": ResponseRequest,
    "/v1/messages": MessageRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/generate": GenerateRequest,
    "/replay": ReplayRequest,
    "/stop": StopRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_REFUSALS = {
    "400": "The request is malformed, or asks for what there is not; `param` names the field.",
    "401": "The key is missing or wrong.",
    "404": "There is no such thing.",
    "413": "The body is too large.",
    "429": "Too many requests are inside; `Retry-After` says when to come again.",
}


def route(routes: Sequence[Route]) -> Route:
    """The route that serves the document of the others."""
    document = describe(routes)

    async def openapi(_request: Request) -> Response:
        return JSONResponse(document)

    return Route("/openapi.json", openapi)


def describe(routes: Sequence[Route]) -> dict[str, Any]:
    """The document."""
    template = "#/components/schemas/{model}"
    wanted = [(model, "validation") for model in BODIES.values()]
    refs, schemas = models_json_schema(wanted, ref_template=template)  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for each in routes:
        method = "post" if "POST" in (each.methods or ()) else "get"
        says = (each.endpoint.__doc__ or "").strip().partition(": ")[2]
        operation: dict[str, Any] = {
            "operationId": f"{method}_{each.path.strip('/').translate(_NAME)}",
            "summary": says or each.path,
            "responses": _responses(each.path),
        }
        if "{" in each.path:
            name = {"name": "model", "in": "path", "required": True}
            operation["parameters"] = [name | {"schema": {"type": "string", "minLength": 1}}]
        if each.path in BODIES:
            content = {"application/json": {"schema": refs[BODIES[each.path], "validation"]}}
            operation["requestBody"] = {"required": True, "content": content}
        paths[each.path.replace(":path}", "}")] = {method: operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "isobit", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {
                **schemas.get("$defs", {}),
                "Error": _ERROR,
                "AnthropicError": _ANTHROPIC_ERROR,
            },
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"bearer": []}],
    }


_NAME = str.maketrans("/{}:.", "_____")


def _responses(path: str) -> dict[str, Any]:
    name = "AnthropicError" if is_anthropic(path) else "Error"
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    refusals = {status: {"description": why, "content": error} for status, why in _REFUSALS.items()}
    return {"200": {"description": "The answer."}} | refusals
