"""One generation: prompt in, tokens out one by one, text only when it is complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32
from isobit.runtime.sampler import Sampler, Sampling
from isobit.text.tokenizer import StreamDecoder

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
class Completion:
    """What a generation gave."""

    text: str
    token_ids: list[int]
    """Generated ids, the end-of-generation token included if there was one."""
    finish_reason: FinishReason
    """"stop": an end-of-generation token or a stop string. "length": max_tokens or context.
    "interrupted": Ctrl-C, or another exception, within the generation."""
    timings: Timings
    seed: int
    """The sampling seed in force; it repeats this completion."""
    note: str | None = None
    """Says so when the context was full."""


class Settings(TypedDict, total=False):
    """The keywords of ``Model.stream``, ``generate`` and ``chat``; see ``Model.stream``."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    watch: Watcher | None
    progress: Callable[[int, int], None] | None


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

    After an exception, Ctrl-C among them, ``completion`` holds what there was until then. Closing
    it early (``close()`` or leaving a ``with`` block) frees its KV cache.
    """

    def __init__(
        self,
        model: Model,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int | None,
        sampling: Sampling,
        stop: Sequence[str],
        watch: Watcher | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.completion: Completion | None = None
        self.token_ids: list[int] = []
        self.token_ns: list[int] = []
        """When each token was known, by ``time.perf_counter_ns``."""
        self._pieces = self._run(
            model, list(prompt_ids), max_tokens, sampling, list(stop), watch, progress
        )

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating and free the sequence."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(
        self,
        model: Model,
        prompt: list[int],
        max_tokens: int | None,
        sampling: Sampling,
        stop: list[str],
        watch: Watcher | None,
        progress: Callable[[int, int], None] | None,
    ) -> Generator[str]:
        sampler = Sampler(sampling)
        if watch is not None:
            watch.begin(model, prompt, sampling, sampler.seed)
        text = _StopText(stop)
        decoder = StreamDecoder(model.tokenizer)
        room = model.context - len(prompt)
        limit = room if max_tokens is None else min(max_tokens, room)
        history = list(prompt)
        reason: FinishReason = "length"
        prefill = decode = 0.0

        def complete(reason: FinishReason) -> Completion:
            full = reason == "length" and limit == room
            return Completion(
                text=text.all,
                token_ids=self.token_ids,
                finish_reason=reason,
                timings=Timings(len(prompt), prefill, max(len(self.token_ids) - 1, 0), decode),
                seed=sampler.seed,
                note=f"the context of {model.context} tokens is full" if full else None,
            )

        try:
            with model.new_sequence() as sequence:
                start = time.perf_counter()
                logits = model.prefill(sequence, prompt, watch, progress)
                prefill = time.perf_counter() - start
                while len(self.token_ids) < limit:
                    start = time.perf_counter()
                    token = None
                    if self.token_ids and watch is None and sampling.likeliest_only:
                        token = model.likeliest(sequence, self.token_ids[-1])
                    if token is None:
                        if self.token_ids:
                            logits = model.step(sequence, self.token_ids[-1], watch)
                        token = sampler.choose(logits, history)
                    self.token_ids.append(token)
                    self.token_ns.append(time.perf_counter_ns())
                    history.append(token)
                    if watch is not None:
                        watch.chose(logits, token)
                    if len(self.token_ids) > 1:  # prefill made the first; the reader's time is not
                        decode += time.perf_counter() - start
                    ended = token in model.tokenizer.stop_ids
                    if not ended and (piece := text.push(decoder.push(token))):
                        yield piece
                    if ended or text.stopped:
                        reason = "stop"
                        break
            if not text.stopped and (piece := text.push(decoder.flush()) + text.flush()):
                yield piece
        except BaseException:
            self.completion = complete("interrupted")
            raise
        self.completion = complete(reason)


class _StopText:
    """Holds text back while it might be the beginning of a stop string."""

    def __init__(self, stop: list[str]) -> None:
        self._stop = [s for s in stop if s]
        self._held = ""
        self._sent: list[str] = []
        self.stopped = False

    @property
    def all(self) -> str:
        return "".join(self._sent)

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [i for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._send(min(found))
        keep = max(
            (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])),
            default=0,
        )
        return self._send(len(self._held) - keep)

    def flush(self) -> str:
        return self._send(len(self._held))

    def _send(self, n: int) -> str:
        piece, self._held = self._held[:n], self._held[n:]
        self._sent.append(piece)
        return piece
