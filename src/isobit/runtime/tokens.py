"""What an engine hands out: the tokens of one generation, one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32, Routes
from isobit.runtime.request import Request
from isobit.runtime.sampler import Sampler, Sampling

if TYPE_CHECKING:
    from isobit.runtime.engine import Engine
    from isobit.runtime.model import Model

FinishReason = Literal["stop", "length", "interrupted"]
"""An end-of-generation token or a stop string; max_tokens or the context; closed, Ctrl-C, or
another exception within the generation."""

TakeRows = Callable[[Sequence[int], F32], None]
"""Takes positions of a prompt, and the logits after them: float32 [n, vocabulary], finite."""


class Token(NamedTuple):
    """One generated token."""

    id: int
    logprob: float | None = None
    """Its log-probability as the model gives it, if it was asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely ids at its place and their log-probabilities, descending."""


class Watcher(Protocol):
    """Sees a generation as it happens and changes nothing."""

    stages: frozenset[str]
    """The stages it wants to see; with CHOSEN (``isobit.backends.base``) the experts, too."""

    def begin(self, model: Model, prompt: list[int], sampling: Sampling, seed: int) -> None:
        """A generation starts; ``seed`` is the one in force. The engine goes on after this."""

    def tap(self, stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
        """Called as :data:`isobit.backends.base.Tap` is, with the rows of this generation alone;
        not for CHOSEN."""

    def routed(self, experts: Routes) -> None:
        """Tokens were run, or found in the cache: their experts [n, layers, experts used]."""

    def chose(self, digest: bytes, token: int) -> None:
        """A token was chosen; ``digest``: :func:`isobit.numerics.digest.tree_digest` of the logits
        that it was chosen from, float32 little-endian."""


class Listener(Protocol):
    """Takes tokens in another thread than that which runs passes; neither method raises."""

    def notify(self) -> None:
        """Something is new: of one generation or of several, this is called once. Does not wait."""

    def wait_taken(self, seconds: float) -> None:
        """Return when what was notified of is taken, or after so long."""


class Generation(Iterator[Token]):
    """Tokens as they are chosen. Read it to the end, or ``cancel`` it."""

    def __init__(
        self,
        engine: Engine,
        request: Request,
        sampler: Sampler,
        *,
        ends: frozenset[int],
        logprobs: int | None = None,
        watch: Watcher | None = None,
        hidden: bool = False,
        take_rows: TakeRows | None = None,
        listen: Listener | None = None,
    ) -> None:
        self.request = request
        self.sampler = sampler
        self.finish_reason: FinishReason | None = None
        self.prompt: list[Token] = []
        """The prompt's tokens from the second on, if their log-probabilities were asked for."""
        self.hidden: F32 | None = None
        """float32 [hidden]: the state after the prompt, once it is run, if it was asked for."""
        self.token_ns: list[int] = []
        """When each token was known, by ``time.perf_counter_ns``."""
        self.prefill_seconds = self.decode_seconds = 0.0
        """Wall time of the passes that it was in, up to the first token and after it."""
        self.listen = listen
        """Notified when there is something new to take, or it has ended."""
        self.progress: Callable[[int, int], None] | None = None
        """``progress(done, total)`` is called by who reads: how many of the prompt's tokens ran."""
        self._reported = 0
        """So many it was called with."""
        self.ends = ends
        self.logprobs = logprobs
        self.watch = watch
        self.wants_hidden = hidden
        self.take_rows = take_rows
        self.seen: list[Routes] = []
        """Experts of the tokens run so far: [n, layers, k] of each pass."""
        self.n_seen = 0
        """So many tokens they are of."""
        self.error: BaseException | None = None
        """What ended it, if that was an error."""
        self.cancelled = False
        """Whether it is to end after the pass that it is in."""
        self.only_argmax = sampler.sampling.argmax_only
        """Whether its tokens can be given without the logits."""
        self._engine = engine
        self._given: deque[Token] = deque()

    def __next__(self) -> Token:
        """The next token; runs passes until there is one. Raises what the pass did."""
        while True:
            if self.progress is not None:
                self.notify()
            ended = self.finish_reason is not None  # before looking: what comes last is there then
            if self._given:
                return self._given.popleft()
            if ended:
                if self.error is not None:
                    raise self.error
                raise StopIteration
            self._engine.advance(self.has_news)

    def take(self) -> Token | None:
        """A token that is there already."""
        return self._given.popleft() if self._given else None

    def notify(self) -> None:
        """Tell ``progress``, if more has run."""
        if self._has_more_run():
            total = len(self.request.prompt)
            self._reported = min(self.request.computed, total)
            assert self.progress is not None
            self.progress(self._reported, total)

    def _has_more_run(self) -> bool:
        if self.progress is None:
            return False
        return self._reported < min(self.request.computed, len(self.request.prompt))

    @property
    def ready(self) -> bool:
        """Whether there is a token to take, or progress to tell of."""
        return bool(self._given) or self._has_more_run()

    def has_news(self) -> bool:
        """Whether it is ready, or has ended."""
        return bool(self._given) or self.finish_reason is not None or self._has_more_run()

    @property
    def ended(self) -> bool:
        """Whether no more will come."""
        return self.finish_reason is not None

    def cancel(self) -> None:
        """End it, from any thread; its pages are free at once, or after the pass it is in."""
        self._engine.cancel(self)

    @property
    def routes(self) -> Routes:
        """The experts of the tokens that were run, if they were asked for: [tokens, layers, k],
        uint8 or, of more than 256 experts, int16. The last token that was generated is not run."""
        seen = list(self.seen)  # another thread may be adding to them
        return np.concatenate(seen) if seen else self._engine.no_routes

    # For the engine

    def give(self, token: Token, digest: bytes | None, now: int) -> None:
        """The next token, and the digest of what it was chosen from, if somebody wants it."""
        self.sampler.append(token.id)
        if self.watch is not None:
            assert digest is not None
            self.watch.chose(digest, token.id)
        self.token_ns.append(now)
        self._given.append(token)
