"""One generation: prompt in, tokens out one by one, text only when it is complete."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from isobit.arguments import flag, function, instance, text, texts, whole, wrong
from isobit.backends.base import F32, I32
from isobit.errors import ModelRefused, UsageError
from isobit.runtime.detokenizer import NoText, StopText, TokenText
from isobit.runtime.sampler import Sampling
from isobit.runtime.scheduler import QueueFull
from isobit.runtime.tokens import FinishReason, Generation, Listener, Token, Watcher

if TYPE_CHECKING:
    from isobit.runtime.model import Model

_AGAIN = 0.05  # seconds in an event loop until it is seen again whether there is room in the queue


@dataclass(frozen=True)
class Timings:
    """Prefill and decode apart, in tokens and seconds of the passes that they were in."""

    prefill_tokens: int
    """Tokens of the prompt that were run: all but the cached ones."""
    prefill_seconds: float
    decode_tokens: int
    """Tokens that a decode step produced: all but the first, which prefill produces."""
    decode_seconds: float
    cached_tokens: int = 0
    """Tokens of the prompt that were there from a text that begins alike."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens a second; 0 if nothing was decoded."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of generated tokens, as the model gives them: section 11 of numerics.md."""

    tokens: F32
    """Of each token, float32 [n]."""
    top_ids: I32
    """The k most likely at each place, descending, int32 [n, k]."""
    top: F32
    """Their log-probabilities, float32 [n, k]."""


@dataclass(frozen=True)
class Completion:
    """What a generation gave."""

    text: str
    token_ids: list[int]
    """Generated ids, the end-of-generation token included if there was one."""
    finish_reason: FinishReason
    """"stop": an end-of-generation token or a stop string. "length": max_tokens or context.
    "interrupted": closed, Ctrl-C, or another exception within the generation."""
    timings: Timings
    seed: int
    """The sampling seed in force; it repeats this completion."""
    note: str | None = None
    """Says so when the context was full, or why there is no text."""
    logprobs: Logprobs | None = None
    """If they were asked for."""
    routes: NDArray[np.integer] | None = None
    """If they were asked for, of a mixture of experts: [tokens, layers, experts used], in rank
    order; uint8, or int16 of more than 256. Of the prompt and what was generated but the last."""


class Settings(TypedDict, total=False):
    """The keywords of ``Model.stream``, ``generate`` and ``chat``; see ``Model.stream``."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logprobs: int | None
    routes: bool
    salt: str | None
    stop: str | Sequence[str] | None
    watch: Watcher | None
    progress: Callable[[int, int], None] | None


def checked_sampling(logit_bias: Mapping[int, float] | None, **numbers: float | None) -> Sampling:
    """The sampling settings, or UsageError."""
    if logit_bias is not None:
        instance("logit_bias", logit_bias, Mapping, "{token id: bias}")
    return Sampling(**numbers, logit_bias=tuple((logit_bias or {}).items()))  # type: ignore[arg-type]


class Stream(Iterator[str], AsyncIterator[str]):
    """Yields pieces of text as they become certain; ``completion`` is set with the last of them.

    Of a model without a tokenizer there is no text: an empty piece for each token, in
    ``token_ids``.

    Read it with ``for``, or in an event loop with ``async for``. Closing it early (``close()`` or
    leaving a ``with`` or ``async with`` block) frees its KV cache; one that is left open and not
    read stands, unless somebody waits for another. Another thread may close it: the one that reads
    then comes to its end. After that, as after an exception, ``completion`` holds what there was;
    it stays None where the first piece was never asked for.
    """

    def __init__(
        self,
        model: Model,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int | None,
        sampling: Sampling,
        stop: str | Sequence[str] | None = None,
        watch: Watcher | None = None,
        progress: Callable[[int, int], None] | None = None,
        logprobs: int | None = None,
        routes: bool = False,
        salt: str | None = "",
    ) -> None:
        """See ``Model.stream``, which makes them. Nothing is run before the first piece."""
        if watch is not None and (isinstance(watch, type) or not hasattr(watch, "stages")):
            raise wrong("watch", "a Recorder or another Watcher", watch)
        function("progress", progress)
        self.completion: Completion | None = None
        self.token_ids: list[int] = []
        self._model, self._prompt = model, list(prompt_ids)
        self._watch, self._progress = watch, progress
        stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
        self._sampling, self._stop = sampling, texts("stop", stops)
        self._logprobs = logprobs
        if logprobs is not None:
            self._logprobs = whole("logprobs", logprobs, 0, model.config.vocab)
        self._routes = flag("routes", routes)
        self._salt = None if salt is None else text("salt", salt)
        self._most = max_tokens
        if max_tokens is not None:
            self._most = whole("max_tokens", max_tokens, 0)
        self.tokens: list[Token] = []
        """With ``logprobs``, each with its log-probability and the most likely at its place."""
        self._generation: Generation | None = None
        self._closed = False
        self._reading = threading.Lock()

    @property
    def token_ns(self) -> list[int]:
        """When each token was known, by ``time.perf_counter_ns``."""
        return [] if self._generation is None else self._generation.token_ns[: len(self.token_ids)]

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        """The next piece. Raises ModelRefused and UsageError, and what a pass did."""
        with self._reading:
            try:
                generation = self._generation or self.begin()
                while self.completion is None and generation is not None:
                    if (piece := self._took(next(generation, None))) is not None:
                        return piece
            except BaseException:
                self._interrupt()
                raise
        raise StopIteration

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> str:
        """The next piece; passes run in a thread of the engine's."""
        import asyncio  # noqa: PLC0415 - 20 ms, and nobody else here has an event loop

        from isobit.runtime.wakeup import LoopWaker  # noqa: PLC0415

        engine, news = self._model.generations, LoopWaker.of_running_loop()
        try:
            while True:
                try:
                    with self._reading:
                        if (piece := self._next_there(news)) is not None:
                            return piece
                        generation = self._generation
                        if self.completion is not None or generation is None:
                            break
                    with engine.awaited():
                        await news.wait([generation])
                except QueueFull:
                    with engine.awaited():
                        await asyncio.sleep(_AGAIN)
        except BaseException:
            with self._reading:
                self._interrupt()
            raise
        raise StopAsyncIteration

    def _next_there(self, listen: Listener) -> str | None:
        """The next piece, if it is there without a pass; ``listen`` is notified of what comes.
        Raises QueueFull too."""
        while self.completion is None and (generation := self.begin(wait=False)) is not None:
            generation.listen = listen
            generation.notify()
            ended = generation.ended  # before looking: what comes last comes before the end
            token = generation.take()
            if token is None and not ended:
                break
            if token is None and generation.error is not None:
                raise generation.error
            if (piece := self._took(token)) is not None:
                return piece
        return None

    def complete(self) -> Completion:
        """Read to the end. Raises what reading does; UsageError if the stream was closed."""
        with self:
            for _ in self:
                pass
        return self._completed()

    async def completed(self) -> Completion:
        """:meth:`complete` in an event loop."""
        with self:
            async for _ in self:
                pass
        return self._completed()

    def close(self) -> None:
        """Stop generating and free the sequence, from any thread."""
        self._closed = True
        if self._generation is not None:
            self._generation.cancel()
        if self._reading.acquire(blocking=False):  # else the thread that reads will do it
            try:
                self._finish("interrupted")
            finally:
                self._reading.release()

    def begin(self, *, wait: bool = True) -> Generation | None:
        """Line it up, if it is not yet; None if it was closed before.

        Where too many wait it runs passes until one less does, or raises QueueFull.
        """
        if self._generation is None and not self._closed:
            self._decoder, self._text = _decoder(self._model, self._stop), StopText(self._stop)
            engine = self._model.generations
            self._generation = (engine.line_up if wait else engine.submit)(
                self._prompt,
                self._most,
                self._sampling,
                ends=self._model.stop_ids | self._decoder.ids_of(self._stop),
                logprobs=self._logprobs,
                routes=self._routes,
                watch=self._watch,
                salt=self._salt,
            )
            self._generation.progress = self._progress
            if self._closed:  # by another thread, which found nothing to cancel
                self._generation.cancel()
        return self._generation

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        """One that nobody can read ends after its next pass."""
        if getattr(self, "_generation", None) is not None:
            self._generation.cancelled = True  # type: ignore[union-attr]  # no lock in here

    def _took(self, token: Token | None) -> str | None:
        """What becomes certain with a token, or with the end; None if that is nothing."""
        generation = self._generation
        assert generation is not None
        if token is None:
            return self._took_last(generation.finish_reason or "interrupted")
        self.token_ids.append(token.id)
        self.tokens.append(token)
        if token.id in generation.ends:  # the engine may be about to say so
            return self._took_last("stop")
        piece = self._text.push(self._decoder.push(token.id))
        if self._text.stopped:
            generation.cancel()
            self._finish("stop")
        return piece if piece or self._decoder.ids_alone else None

    def _took_last(self, reason: FinishReason) -> str | None:
        piece = self._text.push(self._decoder.flush()) + self._text.flush()
        self._finish(reason)
        return piece or None

    def _finish(self, reason: FinishReason) -> None:
        generation = self._generation
        if self.completion is not None or generation is None:
            return
        n, request = len(self.token_ids), generation.request
        full = reason == "length" and len(self._prompt) + n == self._model.context
        notes = [f"the context of {self._model.context} tokens is full"] if full else []
        routes = None
        if request.routes and self._routes:
            routes = generation.routes[: len(self._prompt) + max(n - 1, 0)]
        self.completion = Completion(
            text=self._text.all,
            token_ids=self.token_ids,
            finish_reason=reason,
            timings=Timings(
                max(min(request.computed, len(self._prompt)) - request.cached, 0),
                generation.prefill_seconds,
                max(n - 1, 0),
                generation.decode_seconds,
                request.cached,
            ),
            seed=generation.sampler.seed,
            note="; ".join([*notes, *self._decoder.notes]) or None,
            logprobs=self._measured(),
            routes=routes,
        )

    def _completed(self) -> Completion:
        if self.completion is None:
            raise UsageError("stream: expected an open one, got one that was closed")
        return self.completion

    def _measured(self) -> Logprobs | None:
        k = self._logprobs
        if k is None:
            return None
        values = np.array([token.logprob for token in self.tokens], np.float32)
        top = np.array([token.top for token in self.tokens], np.float64)
        top = top.reshape(len(values), -1 if self.tokens else k, 2)
        return Logprobs(values, top[..., 0].astype(np.int32), top[..., 1].astype(np.float32))

    def _interrupt(self) -> None:
        """An exception ends it, and leaves what there was."""
        if self._generation is not None:
            self._generation.cancel()
        self._finish("interrupted")


def _decoder(model: Model, stop: Sequence[str]) -> TokenText | NoText:
    try:
        return TokenText(model.tokenizer)
    except ModelRefused as error:
        if stop:  # there is no text to stop at
            raise
        return NoText(error)
