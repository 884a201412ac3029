"""Choosing the next token from logits: seeded, and the same on every backend.

The arithmetic is section 10 of docs/numerics.md; what is here belongs to one sequence: its
settings, how often it has had which token, and its place in the random numbers.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.arguments import instance, number, whole, wrong
from isobit.backends.base import F32, I32
from isobit.backends.base.draws import ADJUSTED, OCCURRED, Adjusted, Draws
from isobit.backends.cpu.sampler import NONE_ALLOWED, Columns, Row, RowSampler
from isobit.errors import ModelRefused, UsageError, shown
from isobit.runtime.grammar import Constraint, Grammar


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy."""

    temperature: float = 0.0
    """0 takes the largest logit (the lowest id among equals)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely."""
    repeat_penalty: float = 1.0
    """Divide positive (multiply negative) logits of tokens already in the sequence by this."""
    seed: int | None = None
    """Any 64-bit integer; None draws one, which is reported with the completion."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that were generated before."""
    frequency_penalty: float = 0.0
    """Subtract this as often as a token was generated before."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits."""
    grammar: Grammar | None = None
    """What the tokens are held to."""

    @property
    def argmax_only(self) -> bool:
        """Whether every token is the largest logit's, whatever came before."""
        return self.temperature == 0.0 and not self.adjusts and self.grammar is None

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        penalties = (self.repeat_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        expected = "a number that is 0, or from 1e-6 to 1e6"
        if 0 < number("temperature", self.temperature, 0, 1e6, expected) < 1e-6:
            raise wrong("temperature", expected, self.temperature)
        whole("top_k", self.top_k, 0, (1 << 31) - 1)
        number("top_p", self.top_p, math.ulp(0.0), 1, "a number in (0, 1]")
        number("min_p", self.min_p, 0, 1)
        number("repeat_penalty", self.repeat_penalty, 1e-6, 1e6)
        number("presence_penalty", self.presence_penalty, -1e6, 1e6)
        number("frequency_penalty", self.frequency_penalty, -1e6, 1e6)
        if self.seed is not None:
            whole("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if not isinstance(self.logit_bias, tuple):
            raise wrong("logit_bias", "pairs of a token id and a number", self.logit_bias)
        for pair in self.logit_bias:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise wrong("logit_bias", "pairs of a token id and a number", pair)
            whole("logit_bias", pair[0], 0)
            number(f"logit_bias of {shown(pair[0])}", pair[1], -1e6, 1e6)
        if self.grammar is not None:
            instance("grammar", self.grammar, Grammar, "a Grammar or None")

    def check_ids(self, vocabulary: int) -> None:
        """Refuse a bias of a token that there is not: UsageError."""
        for token, _ in self.logit_bias:
            if token >= vocabulary:
                raise wrong("logit_bias", f"token ids from 0 to {vocabulary - 1}", token)


class Sampler:
    """Draws one token after another for one sequence.

    choice: which of several outputs to one prompt this is; each has a seed of its own.
    constraint: compiled from the sampling's grammar, if it has one.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        choice: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        if (constraint and constraint.grammar) != sampling.grammar:
            raise UsageError("grammar: expected a constraint that was compiled from it")
        self.sampling = sampling
        self.constraint = constraint
        seed = secrets.randbits(32) if sampling.seed is None else int(sampling.seed)
        self.seed = (seed + choice) % (1 << 64)
        self.generated = 0
        self.adjusted = _Occurrences(sampling, prompt) if sampling.adjusts else None

    def append(self, token: int) -> None:
        """The sequence goes on with a token, whether it was chosen here or not."""
        self.generated += 1
        if self.adjusted is not None:
            self.adjusted.append(token)
        if self.constraint is not None:
            self.constraint.append(token)

    def row(self) -> Row:
        """What decides its tokens beside logits and the tokens before."""
        s = self.sampling
        return Row(s.temperature, s.top_k, s.top_p, s.min_p, self.seed)

    def choose(self, logits: F32, rows: RowSampler) -> int:
        """The next token id from logits float32 [vocabulary]; ``append`` it to go on."""
        [token] = BatchSampler([self], len(logits)).choose(rows, logits[None])
        if isinstance(token, int):
            return token
        raise token


_NO_ROWS = np.empty(0, np.int32)


class BatchSampler:
    """Samplers that draw together, token after token, each for its sequence."""

    def __init__(self, samplers: Sequence[Sampler], vocabulary: int) -> None:
        self.samplers = list(samplers)
        self._columns = Columns.of([sampler.row() for sampler in samplers], vocabulary)

    def draws(self, rows: I32, *, logprobs: bool = False) -> Draws:
        """The next token of each sequence, from these rows of a pass."""
        each = list(enumerate(self.samplers))
        adjusted = [(i, s.adjusted) for i, s in each if s.adjusted is not None]
        constraints = [(i, s.constraint) for i, s in each if s.constraint is not None]
        held = [(i, c.fill) for i, c in constraints if not c.free]
        index = np.array([s.generated + 1 for s in self.samplers], np.uint64)
        return Draws(rows, self._columns, index, adjusted, held, logprobs)

    def chosen(self, tokens: I32) -> list[int | UsageError | ModelRefused]:
        """The tokens that were drawn, or why there is none."""
        chosen: list[int | UsageError | ModelRefused] = tokens.tolist()
        for i, token in enumerate(chosen):
            if token < 0:  # type: ignore[operator]  # still an int
                chosen[i] = _refusal(int(tokens[i]), self.samplers[i])
        return chosen

    def choose(self, rows: RowSampler, logits: F32) -> list[int | UsageError | ModelRefused]:
        """The next token of each sequence from logits [R, V], or why there is none."""
        return self.chosen(self.draws(_NO_ROWS).choose(rows, logits)[0])


def _refusal(token: int, sampler: Sampler) -> UsageError | ModelRefused:
    if token == NONE_ALLOWED:
        error = sampler.constraint and " ".join(sampler.constraint.error.split())[:300]
        return UsageError(f"grammar: {error or 'expected a token that is allowed, found none'}")
    return ModelRefused("expected finite logits, got NaN or infinity; the weights are damaged")


class _Occurrences(Adjusted):
    """The ids whose logits are adjusted, as tokens are generated."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        s = sampling
        biases, seen = dict(s.logit_bias), set[int]()
        if s.repeat_penalty != 1.0:
            seen.update(prompt)
        ids = [(0, id, bias, OCCURRED * (id in seen)) for id, bias in biases.items()]
        ids += [(0, id, 0.0, OCCURRED) for id in seen if id not in biases]
        self._room = np.array(ids, ADJUSTED)
        self._places = {id: place for place, (_, id, _, _) in enumerate(ids)}
        super().__init__(self._room, s.repeat_penalty, s.presence_penalty, s.frequency_penalty)

    def append(self, token: int) -> None:
        """A token was generated."""
        place = self._places.setdefault(token, n := len(self._places))
        if place == n:
            if n == len(self._room):
                self._room = np.resize(self._room, 2 * n + 64)
            self._room[place] = self.draw, token, 0.0, 0
            self.ids = self._room[: n + 1]
        seen = self._room["seen"]
        seen[place] = int(seen[place]) + 1 | OCCURRED
