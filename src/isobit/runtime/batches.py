"""From the scheduler's work to a backend's arrays, and from what it gives to the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import NamedTuple

import numpy as np

from isobit.backends.base import ARGMAX, CHOSEN, I32, Batch, Following, Results, Wanted
from isobit.errors import ModelRefused
from isobit.runtime.sampler import BatchSampler
from isobit.runtime.scheduler import UNKNOWN, Work
from isobit.runtime.tokens import Generation, Token

Part = tuple[Work, Generation]
"""What one generation has in a pass."""


class Batches:
    """Makes batches; arrays that are as in the batch before it are not made again."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._tables: list[I32] = []
        self._pages = np.empty((0, 0), np.int32)
        self._each = np.arange(0, dtype=np.int32)
        self.batch_sampler: BatchSampler | None = None
        """The samplers that drew last."""

    def of(self, work: Sequence[Work]) -> Batch:
        """The batch of a pass."""
        n = len(work)
        tables = [w.request.table.numbers for w in work]
        if len(self._tables) != n or not all(map(is_, tables, self._tables)):
            self._tables, longest = tables, max(map(len, tables))
            self._pages = np.zeros((n, longest), np.int32)
            for row, table in zip(self._pages, tables, strict=True):
                row[: len(table)] = table
        if len(self._each) != n:
            self._each = np.arange(n, dtype=np.int32)
        states = None
        if work[0].request.table.state >= 0:
            states = np.array([w.request.table.state for w in work], np.int32)
        tokens = [w.tokens[0] for w in work if len(w.tokens) == len(w.rows) == 1]
        if len(tokens) == n:  # all generate
            return Batch(
                tokens=np.array(tokens, np.int32),
                positions=np.array([w.start for w in work], np.int32),
                sequence=self._each,
                pages=self._pages,
                logit_rows=self._each,
                states=states,
            )
        lengths = np.array([len(w.tokens) for w in work])
        starts = np.cumsum(lengths) - lengths
        positions = np.array([w.start for w in work]) - starts
        at = zip(starts.tolist(), work, strict=True)
        return Batch(
            tokens=np.array(list(chain.from_iterable(w.tokens for w in work)), np.int32),
            positions=(np.repeat(positions, lengths) + np.arange(lengths.sum())).astype(np.int32),
            sequence=np.repeat(self._each, lengths),
            pages=self._pages,
            logit_rows=np.array([start + row for start, w in at for row in w.rows], np.int32),
            states=states,
        )


class PassOutcome(NamedTuple):
    """What a pass gave to one generation."""

    token: Token | None = None
    """None: it has not caught up with its prompt."""
    digest: bytes | None = None
    """Of the logits that the token was chosen from, where somebody wants it."""
    error: Exception | None = None


_NOTHING = PassOutcome()


class PassRequest:
    """What is asked of a pass: for each part its next token, and rows of prompts."""

    def __init__(self, parts: Sequence[Part], batches: Batches) -> None:
        self.parts, self.batches = parts, batches
        self.argmax: list[tuple[int, int]] = []
        """(part, row) of those whose next token is the largest logit's."""
        self.drawn: list[tuple[int, int]] = []
        """(part, row) of those whose next token is drawn."""
        self.taken: list[tuple[int, range]] = []
        """(part, rows) of prompts whose logits are wanted."""
        self.scored: list[tuple[int, range]] = []
        """(part, rows) of prompts whose tokens' log-probabilities are wanted."""
        self.hidden: list[tuple[int, range]] = []
        """(part, rows) of prompts of whose last token the model's state is wanted."""
        self.top = 0
        self.routes = False
        self.digests: dict[int, int] = {}
        """Rows, by part, of whose logits the digest is wanted."""
        row = 0
        for i, (work, generation) in enumerate(parts):
            if work.scored:
                self._of_prompt(generation).append((i, range(row, row + work.scored)))
            row += len(work.rows)
            request = work.request
            if request.routes:
                self.routes = True
            if work.start + len(work.tokens) == len(request.tokens) and request.max_tokens:
                least = generation.only_argmax
                (self.argmax if least else self.drawn).append((i, row - 1))
                if generation.logprobs is not None:
                    self.top = max(self.top, generation.logprobs, int(least))
                if generation.watch is not None:
                    self.digests[i] = row - 1
        self.rows = row
        for part, _ in self.scored:
            self.top = max(self.top, parts[part][1].logprobs or 0)
        self.batch_sampler: BatchSampler | None = None
        if self.drawn:
            samplers = [parts[part][1].sampler for part, _ in self.drawn]
            if batches.batch_sampler is None or batches.batch_sampler.samplers != samplers:
                batches.batch_sampler = BatchSampler(samplers, batches.vocabulary)
            self.batch_sampler = batches.batch_sampler

    def _of_prompt(self, generation: Generation) -> list[tuple[int, range]]:
        if generation.wants_hidden:
            return self.hidden
        return self.scored if generation.take_rows is None else self.taken

    @property
    def wanted(self) -> Wanted:
        """The least that a backend must give."""
        measures = self.drawn or self.scored or self.top or self.hidden or self.digests
        if not (measures or self.taken or self.routes):
            return ARGMAX
        rows = [row for _, some in self.taken for row in some]
        logits = len(rows) == self.rows or (bool(rows) and np.unique(np.array(rows, np.int32)))
        drawn = given = None
        if self.batch_sampler is not None:
            logprobs = any(self.parts[part][1].logprobs is not None for part, _ in self.drawn)
            of = np.array([row for _, row in self.drawn], np.int32)
            drawn = self.batch_sampler.draws(of, logprobs=logprobs)
        if self.scored:
            given = np.zeros((self.rows, 1), np.int32)
            for part, some in self.scored:
                given[some.start : some.stop, 0] = self._said(part)
        return Wanted(
            logits,
            argmax=bool(self.argmax),
            top=self.top,
            given=given,
            drawn=drawn,
            hidden=bool(self.hidden),
            digests=bool(self.digests),
            routes=self.routes,
        )

    def following(self, parts: Sequence[Part]) -> Following | None:
        """The pass after this one, as a device can begin with it; None if it cannot."""
        if not parts or not all(map(_goes_on, (*self.parts, *parts))):
            return None
        works = [work for work, _ in parts]
        if any(work.scored for work in works):  # those stop on the way
            return None
        rows = {self.parts[part][0].request: row for part, row in (*self.argmax, *self.drawn)}
        batch = self.batches.of(works)
        unknown = np.flatnonzero(batch.tokens == UNKNOWN)
        giving = [rows[work.request] for work in works if work.tokens[-1] == UNKNOWN]
        batch.tokens[unknown] = -1 - np.array(giving, np.int32)
        return Following(batch, any(work.request.routes for work in works))

    def _said(self, part: int) -> list[int]:
        """The tokens that follow the rows of a prompt."""
        work, _ = self.parts[part]
        return [work.request.prompt[work.start + row + 1] for row in work.rows[: work.scored]]

    def answer(self, wanted: Wanted, results: Results) -> list[PassOutcome]:
        """What comes of it, for each part."""
        found = [_NOTHING] * len(self.parts)
        if self.argmax:
            self._take_argmax(results, found)
        for part, rows in self.hidden:
            assert results.hidden is not None
            self.parts[part][1].hidden = results.hidden[rows.start].copy()
        if self.taken or self.scored:
            self._of_prompts(wanted, results, found)
        if self.batch_sampler is not None:
            self._draw(self.batch_sampler, results, found)
        for part, row in self.digests.items():
            assert results.digests is not None
            found[part] = found[part]._replace(digest=results.digests[row].tobytes())
        return found

    def _take_argmax(self, results: Results, found: list[PassOutcome]) -> None:
        assert results.argmax is not None
        ids = results.argmax.tolist()
        for part, row in self.argmax:
            if ids[row] < 0:
                found[part] = PassOutcome(error=damaged())
            elif (k := self.parts[part][1].logprobs) is None:
                found[part] = PassOutcome(Token(ids[row]))
            else:
                theirs = _top(results, row)
                found[part] = PassOutcome(Token(ids[row], theirs[0][1], theirs[:k]))

    def _of_prompts(self, wanted: Wanted, results: Results, found: list[PassOutcome]) -> None:
        at: Sequence[int] | dict[int, int] = range(self.rows)
        if not isinstance(wanted.logits, bool):
            at = {row: i for i, row in enumerate(wanted.logits.tolist())}
        for part, rows in (*self.taken, *self.scored):
            work, generation = self.parts[part]
            if not results.finite[rows.start : rows.stop].all():
                found[part] = PassOutcome(error=damaged())
                continue
            try:
                if generation.take_rows is None:
                    generation.prompt += self._measured(part, rows, results)
                else:
                    assert results.logits is not None
                    first = at[rows.start]
                    positions = [work.start + row for row in work.rows[: work.scored]]
                    generation.take_rows(positions, results.logits[first : first + len(rows)])
                # Given once, also if it runs again.
                work.request.wanted = work.request.wanted[work.scored :]
            except Exception as error:  # the caller's own
                found[part] = PassOutcome(error=error)

    def _measured(self, part: int, rows: range, results: Results) -> list[Token]:
        """The tokens of a prompt that follow rows."""
        assert results.given is not None
        k, values = self.parts[part][1].logprobs, results.given[:, 0].tolist()
        return [
            Token(said, values[row], _top(results, row)[:k] if k else ())
            for said, row in zip(self._said(part), rows, strict=True)
        ]

    def _draw(self, sampler: BatchSampler, results: Results, found: list[PassOutcome]) -> None:
        assert results.drawn is not None
        chosen = sampler.chosen(results.drawn)
        for i, ((part, row), token) in enumerate(zip(self.drawn, chosen, strict=True)):
            if found[part].error is not None:
                continue
            if not isinstance(token, int):
                found[part] = PassOutcome(error=token)
                continue
            k = self.parts[part][1].logprobs
            if k is None:
                found[part] = PassOutcome(Token(token))
                continue
            assert results.drawn_logprobs is not None
            theirs = _top(results, row)[:k] if k else ()
            found[part] = PassOutcome(Token(token, float(results.drawn_logprobs[i]), theirs))


def _top(results: Results, row: int) -> tuple[tuple[int, float], ...]:
    """The most likely ids after a row, and their log-probabilities."""
    assert results.top is not None
    assert results.top_ids is not None
    return tuple(zip(results.top_ids[row].tolist(), results.top[row].tolist(), strict=True))


def _goes_on(part: Part) -> bool:
    """Whether a device chooses the next token by itself, and nobody looks on."""
    work, generation = part
    seen = generation.watch is not None and generation.watch.stages - {CHOSEN}
    return not (seen or work.drafts or generation.cancelled)


def damaged() -> ModelRefused:
    """Logits that are not finite."""
    return ModelRefused("expected finite logits, got NaN or infinity; the weights are damaged")
