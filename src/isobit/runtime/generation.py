"""One generation: prompt in, tokens out one by one, text only when it is complete."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32, I32
from isobit.errors import ContextFull, ModelRefused, UsageError
from isobit.runtime import kv_cache
from isobit.runtime.pieces import NoText, StopText, TokenText
from isobit.runtime.sampler import Sampler, Sampling

if TYPE_CHECKING:
    from isobit.runtime.model import Model

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Timings:
    """Prefill and decode apart, in tokens and seconds of wall time."""

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    """Tokens that a decode step produced: all but the first, which prefill produces."""
    decode_seconds: float

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
    stop: str | Sequence[str] | None
    watch: Watcher | None
    progress: Callable[[int, int], None] | None


def checked_sampling(logit_bias: Mapping[int, float] | None, **numbers: float | None) -> Sampling:
    """The sampling settings, or UsageError."""
    if not isinstance(logit_bias, Mapping | None):
        raise UsageError(f"logit_bias: expected {{token id: bias}}, got {logit_bias!r:.60}")
    biases = tuple((logit_bias or {}).items())
    named = [*numbers.items(), *((f"logit_bias of {token!r:.60}", bias) for token, bias in biases)]
    for name, value in named:
        missing = value is None and name == "seed"
        if isinstance(value, (bool, np.bool_)) or not (missing or isinstance(value, Real)):
            raise UsageError(f"{name}: expected a number, got {value!r:.60}")
    return Sampling(**numbers, logit_bias=biases)  # type: ignore[arg-type]  # the rest is its own


def checked_whole(name: str, value: object) -> int:
    """A number of tokens, or UsageError."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral) or int(value) < 0:
        raise UsageError(f"{name}: expected an integer >= 0 or None, got {value!r:.60}")
    return int(value)


def _checked_stop(stop: object) -> list[str]:
    texts = [stop] if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"stop: expected a text or a list of texts, got {stop!r:.60}")
    return list(texts)


class Watcher(Protocol):
    """Sees a generation as it happens and changes nothing."""

    stages: frozenset[str]
    """The stages it wants to see."""

    def begin(self, model: Model, prompt: list[int], sampling: Sampling, seed: int) -> None:
        """A generation starts; ``seed`` is the one in force."""

    def tap(self, stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
        """Called as :data:`isobit.backends.base.Tap` is."""

    def chose(self, logits: F32, token: int) -> None:
        """A token was chosen from logits float32 [vocabulary]."""


class Stream(Iterator[str]):
    """Yields pieces of text as they become certain; ``completion`` is set when it is exhausted.

    Of a model without a tokenizer there is no text: an empty piece for each token, in
    ``token_ids``.

    Closing it early (``close()`` or leaving a ``with`` block) frees its KV cache. Another thread
    may close it: the one that reads then comes to its end. After that, as after an exception,
    ``completion`` holds what there was until then.
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
    ) -> None:
        """See ``Model.stream``, which makes them. Nothing is run before the first piece."""
        self.completion: Completion | None = None
        self.token_ids: list[int] = []
        self.token_ns: list[int] = []
        """When each token was known, by ``time.perf_counter_ns``."""
        self._model, self._prompt = model, list(prompt_ids)
        self._watch, self._progress = watch, progress
        self._sampling, self._stop = sampling, _checked_stop(stop)
        self._logprobs = None if logprobs is None else checked_whole("logprobs", logprobs)
        self.measured: list[tuple[F32, I32, F32]] = []
        """With ``logprobs=k``, of each token float32 [1, 1], and int32 and float32 [1, k]: its
        log-probability, and the ids and log-probabilities of the k likeliest."""
        self._room = model.context - len(self._prompt)
        most = None if max_tokens is None else checked_whole("max_tokens", max_tokens)
        self._limit = self._room if most is None else min(most, self._room)
        self._to_the_end = False
        self._closed = False
        self._reading = threading.Lock()
        self._pieces = self._run()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        """The next piece. Raises ContextFull at the first, ModelRefused and UsageError at any."""
        try:
            with self._reading:
                return next(self._pieces)
        finally:
            if self._closed:
                self._end()

    def complete(self) -> Completion:
        """Read to the end, waiting first while others that do so hold the KV cache.

        Raises what reading does; UsageError if the stream was closed.
        """
        self._to_the_end = True
        with self:
            for _ in self:
                pass
        if self.completion is None:
            raise UsageError("stream: expected an open one, got one that was closed")
        return self.completion

    def close(self) -> None:
        """Stop generating and free the sequence, from any thread."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._reading.acquire(blocking=False):  # else the thread that reads will do it
            try:
                self._pieces.close()
            finally:
                self._reading.release()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self) -> Generator[str]:
        decoder, text = _decoder(self._model, self._stop), StopText(self._stop)
        sampler = Sampler(self._sampling, self._prompt)
        pace = _Pace()
        ends = self._model.stop_ids | decoder.ids_of(self._stop)
        tokens = self._tokens(sampler, pace)
        reason: FinishReason = "interrupted"
        try:
            for token in tokens:
                ended = token in ends
                piece = "" if ended else text.push(decoder.push(token))
                if piece or (decoder.ids_alone and not ended):
                    yield piece
                if ended or text.stopped:
                    reason = "stop"
                    break
            else:
                reason = "interrupted" if self._closed else "length"
            tokens.close()  # and with it the sequence, before a last piece is read
            if not text.stopped and (piece := text.push(decoder.flush()) + text.flush()):
                yield piece
        except BaseException:
            reason = "interrupted"
            raise
        finally:
            tokens.close()
            full = reason == "length" and self._limit == self._room
            notes = [f"the context of {self._model.context} tokens is full"] if full else []
            self.completion = Completion(
                text=text.all,
                token_ids=self.token_ids,
                finish_reason=reason,
                timings=Timings(
                    len(self._prompt), pace.prefill, max(len(self.token_ids) - 1, 0), pace.decode
                ),
                seed=sampler.seed,
                note="; ".join([*notes, *decoder.notes]) or None,
                logprobs=self._joined(),
            )

    def _joined(self) -> Logprobs | None:
        if self._logprobs is None:
            return None
        k = self._logprobs
        none = (
            np.empty((0, 1), np.float32),
            np.empty((0, k), np.int32),
            np.empty((0, k), np.float32),
        )
        parts = zip(*(self.measured or [none]), strict=True)
        tokens, top_ids, top = (np.concatenate(part) for part in parts)
        return Logprobs(tokens[:, 0], top_ids, top)

    def _tokens(self, sampler: Sampler, pace: _Pace) -> Generator[int]:
        """The tokens one by one, each as soon as it is chosen; ends when the stream is closed."""
        model, watch = self._model, self._watch
        if watch is not None:
            watch.begin(model, self._prompt, self._sampling, sampler.seed)
        with model.new_sequence() as sequence:
            # All of its pages now: later there may be none, and what was written would be lost.
            try:
                sequence.reserve(
                    len(self._prompt) + self._limit,
                    running=self._to_the_end,
                    give_up=lambda: self._closed,
                )
            except ContextFull:
                if not self._closed:  # another thread closed it while it waited
                    raise
                return
            start = time.perf_counter()
            logits = model.prefill(sequence, self._prompt, watch, self._progress)
            pace.prefill = time.perf_counter() - start
            while len(self.token_ids) < self._limit and not self._closed:
                start = time.perf_counter()
                token = None
                if self.token_ids:
                    token, logits = self._step(sequence)
                if token is None:
                    token = sampler.choose(logits, model.rows)
                self.token_ids.append(token)
                self.token_ns.append(time.perf_counter_ns())
                sampler.append(token)
                if self._logprobs is not None:
                    measured = model.logprobs(logits[None], [[token]], self._logprobs)
                    self.measured.append(measured)
                if watch is not None:
                    watch.chose(logits, token)
                if len(self.token_ids) > 1:  # prefill made the first; the reader's time is its own
                    pace.decode += time.perf_counter() - start
                yield token

    def _step(self, sequence: kv_cache.Sequence) -> tuple[int | None, F32]:
        """Run the last token: the largest logit's, where it alone is wanted, or logits."""
        last = self.token_ids[-1]
        unseen = self._watch is None and self._logprobs is None
        if unseen and self._sampling.likeliest_only:
            return self._model.likeliest(sequence, last), np.empty(0, np.float32)
        return None, self._model.step(sequence, last, self._watch)


@dataclass
class _Pace:
    """Seconds of prefill and decode so far."""

    prefill: float = 0.0
    decode: float = 0.0


def _decoder(model: Model, stop: Sequence[str]) -> TokenText | NoText:
    try:
        return TokenText(model.tokenizer)
    except ModelRefused as error:
        if any(stop):  # there is no text to stop at
            raise
        return NoText(error)
