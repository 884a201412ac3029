"""Choosing the next token from logits: seeded, and the same on every backend.

The arithmetic is section 10 of docs/numerics.md; what is here belongs to one sequence: its
settings, how often it has had which token, and its place in the random numbers.
"""

import math
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.arguments import instance, number, whole, wrong
from isobit.backends.base import F32, I32
from isobit.backends.base.draws import Draws
from isobit.backends.cpu.sampler import NONE_ALLOWED, Columns, Row, RowSampler
from isobit.errors import ModelRefused, UsageError, shown
from isobit.numerics.sampling import adjust
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
        self._adjusted = _Adjusted(sampling, prompt) if sampling.adjusts else None

    def append(self, token: int) -> None:
        """The sequence goes on with a token, whether it was chosen here or not."""
        self.generated += 1
        if self._adjusted is not None:
            self._adjusted.append(token)
        if self.constraint is not None:
            self.constraint.append(token)

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from logits as they are."""
        return self._adjusted is None and self.constraint is None

    def row(self) -> Row:
        """What decides its tokens beside logits and the tokens before."""
        s = self.sampling
        return Row(s.temperature, s.top_k, s.top_p, s.min_p, self.seed)

    def edits(self, logits: F32) -> tuple[I32, F32]:
        """Ids whose logits bias and penalties change, and what they become of float32 [V]."""
        assert self._adjusted is not None
        return self._adjusted.edits(logits)

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
        self._vocabulary = vocabulary
        self._columns = Columns.of([sampler.row() for sampler in samplers], vocabulary)
        self._adjusting = [i for i, s in enumerate(samplers) if s.sampling.adjusts]
        self._held = any(s.constraint is not None for s in samplers)

    def draws(
        self, rows: I32, *, logprobs: bool = False, coming: Sequence[int] | None = None
    ) -> Draws:
        """The next token of each sequence, from these rows of a pass; ``coming``: of each, tokens
        before it that are not known yet."""
        edits = [(i, self.samplers[i].edits) for i in self._adjusting]
        allowed = _allowed(self.samplers, self._vocabulary) if self._held else None
        index = np.array([s.generated + 1 for s in self.samplers], np.uint64)
        if coming is not None:
            index += np.array(coming, np.uint64)
        return Draws(rows, self._columns, index, edits, allowed, logprobs)

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


def _allowed(samplers: Sequence[Sampler], vocabulary: int) -> NDArray[np.uint32] | None:
    """The tokens that grammars allow, uint32 [R, ceil(V / 32)]; None: all."""
    held = [s.constraint is not None and not s.constraint.free for s in samplers]
    if not any(held):
        return None
    allowed = np.full((len(samplers), -(-vocabulary // 32)), 0xFFFFFFFF, np.uint32)
    for row, sampler, is_held in zip(allowed, samplers, held, strict=True):
        if is_held and sampler.constraint is not None:
            sampler.constraint.fill(row)
    return allowed


def _refusal(token: int, sampler: Sampler) -> UsageError | ModelRefused:
    if token == NONE_ALLOWED:
        error = sampler.constraint and " ".join(sampler.constraint.error.split())[:300]
        return UsageError(f"grammar: {error or 'expected a token that is allowed, found none'}")
    return ModelRefused("expected finite logits, got NaN or infinity; the weights are damaged")


class _Adjusted:
    """The tokens whose logits are adjusted, and what adjusting them needs to know."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        biases = dict(sampling.logit_bias)
        self._slots = {token: slot for slot, token in enumerate(biases)}
        self._ids = array("i", biases)
        self._bias = array("f", biases.values())
        self._occurred = array("b", bytes(len(biases)))
        self._generated = array("i", bytes(4 * len(biases)))
        if sampling.repeat_penalty != 1.0:
            for token in prompt:
                self._occurred[self._slot(token)] = 1

    def append(self, token: int) -> None:
        """A token was generated."""
        slot = self._slot(token)
        self._occurred[slot] = 1
        self._generated[slot] += 1

    def edits(self, logits: F32) -> tuple[I32, F32]:
        """(ids int32 [N], their adjusted logits float32 [N])."""
        s, ids = self._sampling, np.array(self._ids, np.int32)
        return ids, adjust(
            logits[ids],
            bias=np.array(self._bias, np.float32),
            occurred=np.array(self._occurred, np.bool_),
            generated=np.array(self._generated, np.int32),
            repetition=s.repeat_penalty,
            presence=s.presence_penalty,
            frequency=s.frequency_penalty,
        )

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._ids))
        if slot == len(self._ids):
            for column in (self._ids, self._bias, self._occurred, self._generated):
                column.append(token if column is self._ids else 0)
        return slot
