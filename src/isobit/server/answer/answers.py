"""One request's choices from the engine to an interface: in pieces as they come, or at once.

Every interface says how it writes the same events (:mod:`isobit.server.parsing.events`); when they
come, when a client is told to be patient, what happens when one leaves and what is counted is here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from isobit.errors import UsageError
from isobit.runtime.detokenizer import StopText
from isobit.server.answer.choices import Choice, Choices, Piece
from isobit.server.answer.journal import BY, JOURNAL, LINES, Journal, line, tokens_json
from isobit.server.errors import ClientGone, ShuttingDown, client_message
from isobit.server.guard import SEND
from isobit.server.parsing.events import Usage
from isobit.server.request.chat import Chat
from isobit.server.request.fields import MOST_CHOICES, Common
from isobit.server.service import Service


class Encoder(Protocol):
    """How an interface writes a stream: each text is sent as it is."""

    def begin(self) -> Iterable[str]:
        """Before the first piece."""

    def piece(self, piece: Piece) -> Iterable[str]:
        """What is new of a choice."""

    def ping(self) -> str:
        """All is well, there is nothing new."""

    def end(self, used: Usage) -> Iterable[str]:
        """All choices are complete."""

    def error(self, message: str) -> Iterable[str]:
        """There will be no more."""


class Answers:
    """The choices of one request. They run from the moment it is made."""

    def __init__(
        self,
        service: Service,
        request: Request,
        asked: Common,
        prompts: Sequence[list[int]],
        *,
        most: int | None,
        logprobs: int | None = None,
        echo: bool = False,
        routes: bool = False,
        chat: Chat | None = None,
    ) -> None:
        """``n`` choices for each prompt in turn. Raises UsageError, QueueFull; then none runs.

        most: tokens of each; None: to the end of the context. logprobs: how many of the most likely
        are wanted beside each token; ``echo``: of the prompt's too. routes: record the experts.
        """
        n, limits = asked.n or 1, service.limits
        if n * len(prompts) > (most_choices := min(MOST_CHOICES, limits.requests)):
            why = f" ({limits.running} at once and --waiting {limits.waiting})"
            raise UsageError(
                f"n: expected at most {most_choices} choices in all"
                f"{why if most_choices < MOST_CHOICES else ''}, got {n * len(prompts)}"
            )
        self._service = service
        self._n_prompt = sum(map(len, prompts))
        self._began = time.monotonic()
        self._first = True  # no piece has come
        kept = request.scope.get(JOURNAL)
        self.journal: Journal = kept or Journal()
        self._kept = kept is not None
        if self.journal.by not in ("", service.fingerprint):
            by, here = self.journal.by, service.fingerprint
            raise UsageError(f"journal: expected one of {here}, got one of {by!r:.80}")
        sampling = chat.sampling(asked) if chat else asked.sampling
        ends = asked.ends(service.model)
        begun: list[Choice] = []
        stops, seeded = StopText(asked.stops), sampling.seed is not None
        try:
            for index in range(n * len(prompts)):
                if index % n == 0 and not seeded:
                    sampling = replace(sampling, seed=self.journal.seed(index // n))
                choice = Choice(
                    service.engine,
                    index,
                    prompts[index // n],
                    most,
                    sampling,
                    number=index % n,
                    stops=stops,
                    logprobs=logprobs,
                    of_prompt=echo,
                    receipt=asked.isobit_receipt,
                    ends=ends,
                    routes=routes,
                    reader=chat.reader(partial(self.journal.name, index)) if chat else None,
                    constraint=chat.constraint() if chat else None,
                    said=self.journal.said.get(index),
                )
                begun.append(choice)
        except BaseException:
            for choice in begun:
                choice.generation.cancel()
            raise
        self.choices = begun
        self._all = Choices(begun, request)

    def receipt(self, index: int) -> dict[str, Any]:
        """A choice's receipt under its field's name, if it was asked for; else nothing."""
        receipt = self.choices[index].receipt
        return {} if receipt is None else {"isobit_receipt": receipt.to_json()}

    async def whole(self) -> tuple[list[list[Piece]], Usage]:
        """All pieces of each choice. Raises ClientGone, and what a pass did."""
        found: list[list[Piece]] = [[] for _ in self.choices]
        try:
            async for pieces in self._all.pieces():
                for piece in pieces:
                    self._came()
                    found[piece.index].append(piece)
        finally:
            used = self._count()
        return found, used

    async def written(self, encoder: Encoder) -> Usage:
        """:meth:`whole`, for an encoder of one choice that remembers what it was given."""
        (pieces,), used = await self.whole()
        for piece in pieces:
            for _ in encoder.piece(piece):
                pass
        return used

    def stream(self, encoder: Encoder) -> Response:
        """The pieces as server-sent events."""
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        kind = "text/event-stream"
        if self._kept:
            kind, headers[BY] = LINES, self._service.fingerprint
        return _Streamed(self._events(encoder), kind, headers)

    async def _events(self, encoder: Encoder) -> AsyncIterator[str]:
        written, streams = line if self._kept else _text, self._service.streams
        try:
            streams[self.journal.name()] = self._all.stop
            begin = "".join(encoder.begin())
            if begin and not self.journal.begun:
                yield written(begin)
            async for pieces in self._all.pieces():
                if not pieces:
                    yield written(encoder.ping())
                    continue
                self._came()
                if text := "".join([self._written(encoder, piece) for piece in pieces]):
                    yield text
        except ClientGone:
            return
        except Exception as error:  # the status is sent already
            if not (self._kept and isinstance(error, ShuttingDown)):  # else another goes on with it
                yield written("".join(encoder.error(client_message(error))), end=True)
            return
        finally:
            streams.pop(self.journal.name(), None)
            self._all.cancel()
            used = self._count()
        yield written("".join(encoder.end(used)), end=True)

    def _written(self, encoder: Encoder, piece: Piece) -> str:
        text = "".join(encoder.piece(piece))
        if piece.told:
            return ""
        if not self._kept:
            return text
        return line(
            text,
            choice=piece.index,
            tokens=tokens_json(piece.taken),
            finished=piece.finish is not None,
            cached=self.choices[piece.index].cached,
        )

    def _came(self) -> None:
        """A piece did."""
        if self._first:
            self._service.metrics.first.observe(time.monotonic() - self._began)
            self._first = False

    def _count(self) -> Usage:
        used = self._all.usage(self._n_prompt)
        metrics = self._service.metrics
        metrics.prompt.inc(used.prompt)
        metrics.cached.inc(used.cached)
        metrics.generated.inc(used.generated)
        metrics.whole.observe(time.monotonic() - self._began)
        return used


class _Streamed(StreamingResponse):
    """Texts that end by themselves when the client leaves.

    A token passes through little: what runs for each is a task of its own, below which there are
    no handlers, and what it sends goes to the server at once (:data:`guard.SEND`).
    """

    def __init__(self, texts: AsyncIterator[str], kind: str, headers: dict[str, str]) -> None:
        super().__init__(texts, media_type=kind, headers=headers)
        self._texts = texts

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Send them."""
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        await asyncio.create_task(self._body(scope[SEND]))

    async def _body(self, send: Send) -> None:
        kind = "http.response.body"
        async for text in self._texts:
            await send({"type": kind, "body": text.encode(), "more_body": True})
        await send({"type": kind, "body": b"", "more_body": False})


def _text(text: str, **_: object) -> str:
    return text


def event(data: str, name: str | None = None) -> str:
    """One server-sent event; the data is on one line."""
    return f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n"
