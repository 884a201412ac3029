"""``/v1/embeddings``: the model's state after the last token of a text, as a unit vector."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isobit.backends.base import F32
from isobit.errors import ModelRefused, UsageError
from isobit.runtime.sampler import Sampling
from isobit.runtime.tokens import Generation
from isobit.runtime.wakeup import LoopWaker
from isobit.server.body import read, unless_gone
from isobit.server.errors import ShuttingDown
from isobit.server.request.prompts import (
    Prompt,
    RequestBody,
    WholeNumber,
    encoded,
    listed,
    of_prompt,
)
from isobit.server.service import Service

MOST_INPUTS = 2048
_AT_ONCE = 64
_LAST = 3  # of the ways to pool, as llama.cpp numbers them in files


class EmbeddingRequest(RequestBody):
    """What may be asked; unknown fields are ignored."""

    input: Prompt
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: WholeNumber | None = Field(None, ge=1)
    """So many of the vector, the first, made a unit vector again."""

    @property
    def words(self) -> Mapping[str, str]:
        """A prompt is an input here."""
        return of_prompt("input")


class Embeddings:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Where it is."""
        return [Route("/v1/embeddings", self.embeddings, methods=["POST"])]

    async def embeddings(self, request: Request) -> Response:
        """``POST /v1/embeddings``."""
        asked = await read(request, EmbeddingRequest)
        model = self._service.model
        pooling = model.file.metadata.get(f"{model.config.architecture}.pooling_type", _LAST)
        if pooling != _LAST:
            raise UsageError(
                f"model: expected one that pools the last token ({_LAST}), its file says {pooling}"
            )
        n = model.config.hidden if asked.dimensions is None else asked.dimensions
        if n > model.config.hidden:
            raise UsageError(f"dimensions: expected at most {model.config.hidden}, got {n}")
        ids = await encoded(model, listed(asked.input, MOST_INPUTS))
        states = await unless_gone(request, self._states(ids))
        data = [
            {"object": "embedding", "index": i, "embedding": _written(unit(state[:n]), asked)}
            for i, state in enumerate(states)
        ]
        tokens = sum(map(len, ids))
        self._service.metrics.prompt.inc(tokens)
        return JSONResponse(
            {
                "object": "list",
                "data": data,
                "model": self._service.name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                "system_fingerprint": self._service.fingerprint,
            }
        )

    async def _states(self, prompts: list[list[int]]) -> list[F32]:
        found: list[F32] = []
        n = min(_AT_ONCE, self._service.limits.requests)
        for i in range(0, len(prompts), n):
            found += await self._together(prompts[i : i + n])
        return found

    async def _together(self, prompts: list[list[int]]) -> list[F32]:
        begun: list[Generation] = []
        submit, news = self._service.engine.submit, LoopWaker.of_running_loop()
        try:
            for ids in prompts:
                begun.append(submit(ids, 0, Sampling(), hidden=True, listen=news))
            return [await _state(generation, news) for generation in begun]
        finally:
            for generation in begun:
                generation.cancel()


async def _state(generation: Generation, news: LoopWaker) -> F32:
    await news.wait([generation])
    state = generation.hidden
    if state is None:
        raise generation.error or ShuttingDown()
    if not np.isfinite(state).all():
        raise ModelRefused("expected a finite state, got NaN or infinity; the weights are damaged")
    return state


def unit(state: F32) -> F32:
    """A vector of length 1, rounded once: the squares and the order of their sum are exact.

    So the same state gives the same bits on any machine. Zero stays zero.
    """
    wide = state.astype(np.float64)
    length = math.sqrt(math.fsum(wide * wide))
    return (wide / length if length else wide).astype(np.float32)


def _written(vector: F32, asked: EmbeddingRequest) -> Any:
    if asked.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
