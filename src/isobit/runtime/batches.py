"""From the scheduler's work to a backend's arrays, and from what it gives to the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from isobit.backends.base import ARGMAX, F32, I32, Batch, Results, Wanted
from isobit.errors import ModelRefused
from isobit.runtime.sampler import Together
from isobit.runtime.scheduler import Work
from isobit.runtime.tokens import Generation, Token

if TYPE_CHECKING:
    from isobit.runtime.model import Model

Part = tuple[Work, Generation]
"""What one generation has in a pass."""


class Batches:
    """Makes batches; arrays that are as in the batch before it are not made again."""

    def __init__(self) -> None:
        self._tables: list[I32] = []
        self._pages = np.empty((0, 0), np.int32)
        self._each = np.arange(0, dtype=np.int32)
        self.together: Together | None = None
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
        lengths = [len(w.tokens) for w in work]
        starts = np.cumsum([0, *lengths])
        rows = [np.array(w.rows, np.int32) + start for w, start in zip(work, starts, strict=False)]
        return Batch(
            tokens=np.concatenate([np.array(w.tokens, np.int32) for w in work]),
            positions=np.concatenate(
                [np.arange(w.start, w.start + len(w.tokens), dtype=np.int32) for w in work]
            ),
            sequence=np.repeat(self._each, lengths),
            pages=self._pages,
            logit_rows=np.concatenate(rows).astype(np.int32),
            states=states,
        )


class Next(NamedTuple):
    """What a pass gave to one generation."""

    token: Token | None = None
    """None: it has not caught up with its prompt."""
    digest: bytes | None = None
    """Of the logits that the token was chosen from, where somebody wants it."""
    error: Exception | None = None


@dataclass
class Asked:
    """What is asked of a pass: for each part its next token, and rows of prompts."""

    parts: Sequence[Part]
    batches: Batches
    likeliest: list[tuple[int, int]] = field(default_factory=list)
    """(part, row) of those whose next token is the largest logit's."""
    drawn: list[tuple[int, int]] = field(default_factory=list)
    """(part, row) of those whose next token is chosen from the logits here."""
    scored: list[tuple[int, range]] = field(default_factory=list)
    """(part, rows) of prompts whose logits are wanted."""
    hidden: list[tuple[int, range]] = field(default_factory=list)
    """(part, rows) of prompts of whose last token the model's state is wanted."""
    top: int = 0
    digests: dict[int, int] = field(default_factory=dict)
    """Rows, by part, of whose logits the digest is wanted."""

    def __post_init__(self) -> None:
        """Look through the parts."""
        row = 0
        for i, (work, generation) in enumerate(self.parts):
            if work.scored:
                some = self.hidden if generation.wants_hidden else self.scored
                some.append((i, range(row, row + work.scored)))
            row += len(work.rows)
            request = work.request
            if request.max_tokens and work.start + len(work.tokens) == len(request.tokens):
                if generation.only_likeliest:
                    self.likeliest.append((i, row - 1))
                    if generation.logprobs is not None:
                        self.top = max(self.top, generation.logprobs, 1)
                else:
                    self.drawn.append((i, row - 1))
                if generation.watch is not None:
                    self.digests[i] = row - 1
        self.rows = row

    @property
    def wanted(self) -> Wanted:
        """The least that a backend must give."""
        rows = [row for _, some in self.scored for row in some]
        rows += [row for _, row in self.drawn]
        routes = any(work.request.routes for work, _ in self.parts)
        if not (rows or self.top or self.hidden or self.digests or routes):
            return ARGMAX
        logits = len(rows) == self.rows or (bool(rows) and np.unique(np.array(rows, np.int32)))
        return Wanted(
            logits,
            likeliest=bool(self.likeliest),
            top=self.top,
            hidden=bool(self.hidden),
            digests=bool(self.digests),
            routes=routes,
        )

    def answer(self, model: Model, wanted: Wanted, results: Results) -> list[Next]:
        """What comes of it, for each part."""
        found = [Next()] * len(self.parts)
        self._likeliest(results, found)
        for part, rows in self.hidden:
            assert results.hidden is not None
            self.parts[part][1].hidden = results.hidden[rows.start].copy()
        if results.logits is not None and len(results.logits):
            at: Sequence[int] | dict[int, int] = range(self.rows)
            if not isinstance(wanted.logits, bool):
                at = {row: i for i, row in enumerate(wanted.logits.tolist())}
            self._score(model, results, found, at)
            self._draw(model, results, found, at)
        for part, row in self.digests.items():
            assert results.digests is not None
            found[part] = found[part]._replace(digest=results.digests[row].tobytes())
        return found

    def _likeliest(self, results: Results, found: list[Next]) -> None:
        if not self.likeliest:
            return
        assert results.likeliest is not None
        ids = results.likeliest.tolist()
        for part, row in self.likeliest:
            if ids[row] < 0:
                found[part] = Next(error=damaged())
                continue
            token, k = Token(ids[row]), self.parts[part][1].logprobs
            if k is not None:
                assert results.top is not None
                assert results.top_ids is not None
                theirs = tuple(
                    zip(results.top_ids[row].tolist(), results.top[row].tolist(), strict=True)
                )
                token = Token(token.id, theirs[0][1], theirs[:k])
            found[part] = Next(token)

    def _score(
        self,
        model: Model,
        results: Results,
        found: list[Next],
        at: Sequence[int] | dict[int, int],
    ) -> None:
        assert results.logits is not None
        for part, rows in self.scored:
            work, generation = self.parts[part]
            if not results.finite[rows.start : rows.stop].all():
                found[part] = Next(error=damaged())
                continue
            positions = [work.start + row for row in work.rows[: work.scored]]
            first = at[rows.start]
            logits = results.logits[first : first + len(rows)]
            try:
                if generation.take_rows is not None:
                    generation.take_rows(positions, logits)
                else:
                    generation.measure(model, positions, logits)
                # Given once, also if it runs again.
                work.request.wanted = work.request.wanted[work.scored :]
            except Exception as error:  # the caller's own
                found[part] = Next(error=error)

    def _draw(
        self,
        model: Model,
        results: Results,
        found: list[Next],
        at: Sequence[int] | dict[int, int],
    ) -> None:
        drawn = [(part, row) for part, row in self.drawn if found[part].error is None]
        if not drawn:
            return
        assert results.logits is not None
        rows = [at[row] for _, row in drawn]
        logits = results.logits
        if rows != list(range(len(logits))):
            logits = logits[rows]
        samplers = [self.parts[part][1].sampler for part, _ in drawn]
        if self.batches.together is None or self.batches.together.samplers != samplers:
            self.batches.together = Together(samplers, logits.shape[1])
        chosen = self.batches.together.choose(model.rows, logits)
        measured = self._measured(model, [part for part, _ in drawn], logits, chosen)
        for i, ((part, _), token) in enumerate(zip(drawn, chosen, strict=True)):
            if isinstance(token, int):
                found[part] = Next(measured.get(i, Token(token)))
            else:
                found[part] = Next(error=token)

    def _measured(
        self, model: Model, parts: Sequence[int], logits: F32, chosen: Sequence[object]
    ) -> dict[int, Token]:
        """The tokens whose log-probabilities are asked for, by their place in ``chosen``."""
        asked = {i: self.parts[part][1].logprobs for i, part in enumerate(parts)}
        ids = {i: t for i, t in enumerate(chosen) if isinstance(t, int) and asked[i] is not None}
        if not ids:
            return {}
        most = max(asked[i] or 0 for i in ids)
        values, top_ids, top = model.logprobs(logits[list(ids)], [[t] for t in ids.values()], most)
        found = {}
        for n, (i, token) in enumerate(ids.items()):
            pairs = zip(top_ids[n].tolist(), top[n].tolist(), strict=True)
            found[i] = Token(token, float(values[n, 0]), tuple(pairs)[: asked[i]])
        return found


def damaged() -> ModelRefused:
    """Logits that are not finite."""
    return ModelRefused("expected finite logits, got NaN or infinity; the weights are damaged")
