"""The choices of one answer as they grow: tokens from the engine, text when it is certain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from starlette.requests import Request as HttpRequest

from isobit.backends.base import I32
from isobit.runtime.detokenizer import StopText, TokenText
from isobit.runtime.engine import Engine
from isobit.runtime.grammar import Constraint
from isobit.runtime.sampler import Sampling
from isobit.runtime.tokens import Token
from isobit.runtime.wakeup import LoopWaker
from isobit.server.answer.journal import Emitted
from isobit.server.errors import ClientGone, Differs, ShuttingDown
from isobit.server.parsing.events import CallBegins, Event, Finish, Usage
from isobit.server.parsing.reading import Reader, TextReader
from isobit.verify.receipt import Receipt, Recorder

PING_SECONDS = 15.0


@dataclass(slots=True)
class Piece:
    """What is new of one choice."""

    index: int
    events: list[Event] = field(default_factory=list)
    of_events: list[list[Token]] = field(default_factory=list)
    """For each of the events, the tokens that led to it, of earlier pieces too."""
    tokens: list[Token] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    """The prompt's, in the first piece, if they are measured."""
    end: Token | None = None
    """The token that ended the choice, which is no part of its text."""
    taken: list[Token] = field(default_factory=list)
    """What the model gave: the tokens, and the one that ended it."""
    told: bool = False
    """Whether the client had it from another replica."""

    @property
    def finish(self) -> Finish | None:
        """How the choice ended, if this is its last piece."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Finish) else None


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
        stops: StopText,
        logprobs: int | None,
        of_prompt: bool,
        receipt: bool,
        ends: frozenset[int] | None = None,
        routes: bool = False,
        reader: Reader | None = None,
        constraint: Constraint | None = None,
        said: Emitted | None = None,
    ) -> None:
        """See :meth:`Engine.submit`.

        number: which of several outputs to the same prompt. routes: record the experts. said: what
        another replica said of it.
        """
        self._reader = reader or TextReader()
        self._echo = of_prompt and logprobs is not None
        self.index = index
        self._recorder = Recorder() if receipt else None
        self._decoder = TokenText(engine.model.tokenizer)
        self._text = stops.fresh()
        self._stops = {i: s for s in stops.strings for i in self._decoder.ids_of([s])}
        self._ends = (engine.model.stop_ids if ends is None else ends) | self._stops.keys()
        self._length = 0  # of the text that was decoded
        self._called = False
        self._pending: list[Token] = []  # made no event yet
        self.n_tokens = 0
        self.n_reasoning = 0
        self._said = said
        self._cached = None if said is None else said.cached
        self._stopped = False
        self._again: list[Token] = []
        # The last of these is computed here again, to see that it is the same; for a receipt, all.
        self._begun = [] if said is None or receipt else [t.id for t in said.tokens[:-1]]
        self.generation = engine.submit(
            prompt,
            most,
            sampling,
            choice=number,
            ends=self._ends,
            logprobs=logprobs,
            of_prompt=of_prompt,
            routes=routes,
            begun=self._begun,
            watch=self._recorder,
            listen=LoopWaker.of_running_loop(),
            constraint=constraint,
        )

    @property
    def receipt(self) -> Receipt | None:
        """Of what was generated so far, if it was asked for."""
        if self._recorder is None:
            return None
        return self._recorder.receipt(self.n_tokens)  # the engine may be ahead of a stop string

    @property
    def cached(self) -> int:
        """Tokens of its prompt that were in the cache when it began."""
        return self.generation.request.cached if self._cached is None else self._cached

    @property
    def routes(self) -> I32:
        """The experts of the tokens that were run, but for the last: int32 [T, layers, k]."""
        n = len(self.generation.request.prompt) + max(self.n_tokens - 1, 0)
        return self.generation.routes[:n].astype(np.int32)

    def stop(self) -> None:
        """End it as at its limit; not while it is still to be what another replica said."""
        if self._said is None:
            self._stopped = True
            self.generation.cancel()

    def piece(self) -> Piece | None:
        """What is new; None if nothing is. The last has the finish, and there is no other.

        The first has the prompt's tokens if they are measured. Raises what its passes did.
        """
        if self._said is not None:
            return self._told(self._said)
        generation = self.generation
        ended = generation.finish_reason  # before taking: nothing comes after it
        piece, finish = Piece(self.index), None
        while finish is None and (token := generation.take()) is not None:
            finish = self._take(token, piece)
        if piece.taken or ended:  # and so the prompt's are measured, all of them
            self._put_echo(piece)
        if finish is None and ended is not None:
            self._require_whole()
            finish = Finish("length")
        if finish is not None:
            self._end(piece, finish)
            generation.cancel()
        return piece if piece.events or piece.tokens else None

    def _told(self, said: Emitted) -> Piece | None:
        """The tokens that another replica gave, read as if they came now, once those that are
        computed again are there."""
        generation, ended = self.generation, self.generation.ended
        wanted = said.tokens[len(self._begun) :]
        while len(self._again) < len(wanted) and (token := generation.take()) is not None:
            self._again.append(token)
        n = len(self._again)
        if self._again != wanted[:n] or (ended and n < len(wanted)):
            self._require_whole()
            at = next((i for i, t in enumerate(self._again) if t != wanted[i]), n)
            here = self._again[at].id if at < n else None
            raise Differs(len(self._begun) + at, wanted[at].id, here)
        if n < len(wanted) or (self._echo and not (ended or generation.request.generated)):
            return None
        self._said = None
        piece, finish = Piece(self.index, told=True), None
        for token in said.tokens:
            finish = self._take(token, piece)
        self._put_echo(piece)
        if said.finished:
            self._end(piece, finish or Finish("length"))
            generation.cancel()
        return piece

    def _put_echo(self, piece: Piece) -> None:
        """The prompt's tokens, if they are measured."""
        if self._echo:
            ids, self._echo = self.generation.request.prompt, False
            piece.prompt = [Token(ids[0]), *self.generation.prompt]

    def _require_whole(self) -> None:
        """Raise what its passes did, if they ended it."""
        error = self.generation.error
        if self.generation.finish_reason == "interrupted" and (error or not self._stopped):
            raise error or ShuttingDown()

    def _take(self, token: Token, piece: Piece) -> Finish | None:
        """A token's events; how the choice ends, if it does so with this token."""
        self.n_tokens += 1
        piece.taken.append(token)
        if token.id in self._ends:
            piece.end = token
            return Finish("stop", self._stops.get(token.id))
        piece.tokens.append(token)
        self._pending.append(token)
        text = self._decoder.push(token.id)
        tag = self._reader.special.get(token.id)
        if tag is not None and not text.endswith(tag):
            text += tag  # a control token, which other texts leave out
        self._length += len(text)
        if tag is not None:
            self._reader.mark(self._length - len(tag))
        self.n_reasoning += self._reader.reasoning
        self._read(piece, self._reader.push(self._text.push(text)))
        if self._text.stopped:
            return Finish("stop", self._text.stop)
        return Finish("stop") if self._reader.done else None

    def _end(self, piece: Piece, finish: Finish) -> None:
        if not self._text.stopped:
            rest = self._text.push(self._decoder.flush())
            if self._text.stopped:
                finish = Finish("stop", self._text.stop)
            self._read(piece, self._reader.push(rest + self._text.flush()))
        cut = finish.reason == "length" or finish.stop is not None
        self._read(piece, self._reader.flush(cut=cut))
        if self._called and finish == Finish("stop"):
            finish = Finish("tool_calls")
        self._read(piece, [finish])

    def _read(self, piece: Piece, events: list[Event]) -> None:
        for event in events:
            piece.events.append(event)
            piece.of_events.append(self._pending)
            self._called |= isinstance(event, CallBegins)
            self._pending = []


class Choices:
    """All choices of one request; whatever ends the request ends them all."""

    def __init__(self, choices: Sequence[Choice], request: HttpRequest) -> None:
        self.choices = choices
        self._news = LoopWaker.of_running_loop()
        self._gone = False
        self._watch = asyncio.create_task(self._until_gone(request))

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Those that have come; none where a client should be told that all is well.

        Raises ClientGone, and what a pass did.
        """
        left = list(self.choices)
        now = asyncio.get_running_loop().time
        due = now() + PING_SECONDS
        try:
            while left:
                await self._news.wait([choice.generation for choice in left], due - now())
                if self._gone:
                    raise ClientGone("client: expected to stay for the answer, but left")
                found = [piece for choice in left if (piece := choice.piece()) is not None]
                if not found and now() < due:  # tokens that make no piece yet
                    continue
                if any(piece.finish is not None for piece in found):
                    ended = {piece.index for piece in found if piece.finish is not None}
                    left = [choice for choice in left if choice.index not in ended]
                yield found
                due = now() + PING_SECONDS
        finally:
            self.cancel()

    def usage(self, prompt: int) -> Usage:
        """Tokens so far; ``prompt``: those of all prompts, each counted once."""
        each = self.choices
        return Usage(
            prompt,
            sum(choice.cached for choice in each[:1]),
            sum(choice.n_tokens for choice in each),
            sum(choice.n_reasoning for choice in each),
        )

    def stop(self) -> None:
        """End them, as at their limits."""
        for choice in self.choices:
            choice.stop()

    def cancel(self) -> None:
        """End them, and tell nobody."""
        self._watch.cancel()
        for choice in self.choices:
            choice.generation.cancel()

    async def _until_gone(self, request: HttpRequest) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        for choice in self.choices:  # whose ends are news
            choice.generation.cancel()
