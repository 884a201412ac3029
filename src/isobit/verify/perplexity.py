"""Perplexity of a text: exp of the mean negative log likelihood of its tokens.

The text is cut into windows, each a sequence of its own, which begins with BOS if the model's texts
do. By default every token but a window's first is predicted and counts. llama-perplexity counts the
second half of each whole window, so that every prediction has context: its figure is lower, and the
two are not to be compared.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from isobit.backends.base import F32
from isobit.errors import NothingCompared
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampling
from isobit.verify.metrics import log_softmax, perplexity_of


@dataclass
class Perplexity:
    """What :func:`perplexity` found; natural logarithms."""

    windows: int = 0
    tokens: int = 0
    """Predicted tokens that count."""
    nll: float = 0.0
    """Sum of their negative log likelihoods, in nats."""
    nll_squared: float = 0.0
    by_window: list[float] = field(default_factory=list)
    """The value after each window."""

    @property
    def value(self) -> float:
        """exp of the mean negative log likelihood."""
        return perplexity_of(self.nll, self.tokens)

    @property
    def error(self) -> float | None:
        """One standard error of ``value``, tokens taken as independent; None for a single one."""
        if self.tokens < 2:
            return None
        mean = self.nll / self.tokens
        variance = max(self.nll_squared / self.tokens - mean * mean, 0.0)
        return self.value * math.sqrt(variance / (self.tokens - 1))

    def add(self, logits: F32, following: Sequence[int]) -> None:
        """Add predictions: logits float32 [T, vocabulary], the T tokens that came."""
        nll = -log_softmax(logits)[np.arange(len(following)), following]
        self.tokens += len(following)
        self.nll += float(nll.sum())
        self.nll_squared += float((nll * nll).sum())


def perplexity(
    model: Model,
    ids: Sequence[int],
    window: int = 512,
    *,
    second_half: bool = False,
    begin: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Perplexity]:
    """The perplexity of token ids, yielded after each window with what was found until then.

    second_half: llama-perplexity's definition: whole windows only, and of each the tokens from
    ``window // 2 + 1`` on. begin: the id that takes the place of each window's first, as
    llama-perplexity has BOS do (Gemma's loss is several times as large without). ``progress(done,
    total)`` is told in tokens that were run. Raises
    NothingCompared for too few tokens, UsageError for ids that there are not.
    """
    ids = list(ids)
    whole = len(ids) // window * window
    total = whole if second_half else len(ids) - (len(ids) % window == 1)
    if window < 2 or total < 2 or (second_half and window < 4):
        least = window if second_half else 2
        raise NothingCompared(f"text: expected at least {least} tokens, got {len(ids)}")
    found, done = Perplexity(), 0
    for start in range(0, total, window):
        part = ids[start : min(start + window, total)]
        part = model.checked(part if begin is None else [begin, *part[1:]])
        first = window // 2 if second_half else 0  # the first position whose prediction counts

        def take(positions: Sequence[int], logits: F32, part: list[int] = part) -> None:
            found.add(logits, [part[p + 1] for p in positions])

        wanted = range(first, len(part) - 1)
        generation = model.generations.line_up(
            part[:-1], 0, Sampling(), wanted=wanted, take_rows=take, salt=None
        )
        try:
            next(generation, None)
        finally:
            generation.cancel()
        done += len(part)
        if progress is not None:
            progress(done, total)
        found.windows += 1
        found.by_window.append(found.value)
        yield found
