"""The choices of one answer as they grow: tokens from the engine, text when it is certain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.requests import Request as HttpRequest

from isobit.errors import IsobitError
from isobit.runtime.engine import Engine
from isobit.runtime.generation import FinishReason
from isobit.runtime.pieces import StopText, TokenText
from isobit.runtime.sampler import Sampling
from isobit.runtime.tokens import Token
from isobit.verify.receipt import Receipt, Recorder

PING_SECONDS = 15.0


class ClientGone(IsobitError):
    """The client left before its answer was complete."""


@dataclass
class Piece:
    """What is new of one choice."""

    index: int
    text: str
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Choice:
    """One output."""

    def __init__(
        self,
        engine: Engine,
        index: int,
        prompt: Sequence[int],
        most: int | None,
        sampling: Sampling,
        *,
        number: int = 0,
        stops: list[str],
        logprobs: int | None,
        of_prompt: bool,
        receipt: bool,
    ) -> None:
        """``number``: which of several outputs to the same prompt. See :meth:`Engine.submit`."""
        self._echo = of_prompt and logprobs is not None
        self.index = index
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._recorder = Recorder() if receipt else None
        self._decoder = TokenText(engine.model.tokenizer)
        self._text = StopText(stops)
        self._ends = engine.model.stop_ids | self._decoder.ids_of(stops)
        self.n_tokens = 0
        self.generation = engine.submit(
            prompt,
            most,
            sampling,
            choice=number,
            ends=self._ends,
            logprobs=logprobs,
            of_prompt=of_prompt,
            watch=self._recorder,
            listen=self._listen,
        )

    @property
    def receipt(self) -> Receipt | None:
        """Of what was generated so far, if it was asked for."""
        return None if self._recorder is None else self._recorder.receipt()

    def _listen(self) -> None:
        with suppress(RuntimeError):  # the loop is closed, and so nobody waits
            self._loop.call_soon_threadsafe(self._news.set)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until it ends; the first has the prompt's tokens if they are measured.

        Raises what its passes did.
        """
        generation = self.generation
        try:
            while True:
                ended = generation.finish_reason
                piece = Piece(self.index, "")
                if self._echo and (ended or generation.request.generated):
                    ids = generation.request.prompt
                    piece.tokens = [Token(ids[0]), *generation.prompt]
                    self._echo = False
                while not self._text.stopped and (token := generation.take()) is not None:
                    self.n_tokens += 1
                    if token.id in self._ends:
                        break
                    piece.tokens.append(token)
                    piece.text += self._text.push(self._decoder.push(token.id))
                if self._text.stopped:
                    ended = "stop"
                elif ended == "interrupted":
                    raise generation.error or IsobitError("the server is shutting down")
                elif ended is not None:
                    piece.text += self._text.push(self._decoder.flush()) + self._text.flush()
                piece.finish_reason = ended
                if piece.text or piece.tokens or ended is not None:
                    yield piece
                if ended is not None:
                    return
                await self._news.wait()
                self._news.clear()
        finally:
            generation.cancel()


class Choices:
    """All choices of one request; whatever ends the request ends them all."""

    def __init__(self, choices: Sequence[Choice], request: HttpRequest) -> None:
        self.choices = choices
        self._queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._follow(choice)) for choice in choices]
        self._tasks.append(asyncio.create_task(self._until_gone(request)))

    async def pieces(self) -> AsyncIterator[Piece | None]:
        """Of all choices as they come; None where a client should be told that all is well.

        Raises ClientGone, and what a pass did.
        """
        left = len(self.choices)
        try:
            while left:
                try:
                    found = await asyncio.wait_for(self._queue.get(), PING_SECONDS)
                except TimeoutError:
                    yield None
                    continue
                if isinstance(found, BaseException):
                    raise found
                left -= found.finish_reason is not None
                yield found
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End them."""
        for task in self._tasks:
            task.cancel()
        for choice in self.choices:
            choice.generation.cancel()

    async def _follow(self, choice: Choice) -> None:
        try:
            async for piece in choice.pieces():
                self._queue.put_nowait(piece)
        except Exception as error:  # told to whoever reads
            self._queue.put_nowait(error)

    async def _until_gone(self, request: HttpRequest) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(ClientGone("client: expected to stay for the answer, but left"))
        for choice in self.choices:
            choice.generation.cancel()
