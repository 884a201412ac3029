"""Logits and log-probabilities of texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeGuard, overload

import numpy as np

from isobit.arguments import listed, token_ids, whole, wholes, wrong
from isobit.backends.base import F32, I32
from isobit.errors import UsageError
from isobit.runtime.batches import damaged
from isobit.runtime.direct import DirectPasses
from isobit.runtime.sampler import Sampling
from isobit.runtime.tokens import Generation, TakeRows

READ_TOGETHER = 256  # texts lined up at once


Read = tuple[Sequence[int], Sequence[int], TakeRows]
"""A text, positions whose logits are wanted, and what takes them."""


class ScoringModel(DirectPasses):
    """A model that texts are put through, beside what else runs."""

    def logits(self, prompt: str | Sequence[int], rows: Sequence[int] | slice | None = None) -> F32:
        """Logits after the tokens of a text: float32 [n_tokens, vocabulary].

        ``rows`` chooses among them, as it would choose from a list: ``[-1]`` the last alone. Only
        these are computed, in that order. Raises UsageError for a prompt that is empty, too long or
        not text or token ids, and for rows that it has not.
        """
        ids = self.checked(self._ids(prompt))
        wanted = _rows(rows, len(ids))
        out = np.empty((len(wanted), self.config.vocab), np.float32)
        places: dict[int, list[int]] = {}
        for place, row in enumerate(wanted):
            places.setdefault(row, []).append(place)

        def take(positions: Sequence[int], logits: F32) -> None:
            for position, row in zip(positions, logits, strict=True):
                out[places[position]] = row

        if wanted:
            self._read([(ids[: max(wanted) + 1], sorted(places), take)])
        return out

    def logprobs(
        self, logits: F32, ids: Sequence[Sequence[int]] | I32, k: int = 0
    ) -> tuple[F32, I32, F32]:
        """Log-probabilities from rows of logits [R, vocabulary], section 11 of docs/numerics.md.

        (of n ids a row, float32 [R, n]; ids of the k most likely, int32 [R, k]; of these, float32
        [R, k]). Raises ModelRefused if logits are not finite.
        """
        vocab = self.config.vocab
        rows = np.ascontiguousarray(logits) if isinstance(logits, np.ndarray) else np.empty(0)
        if rows.dtype != np.float32 or rows.shape[1:] != (vocab,):
            raise wrong("logits", f"float32 [rows, {vocab}]", logits)
        given = _ids_by_row(ids, len(rows), vocab)
        k = whole("k", k, 0, vocab)
        argmax, values, top_ids, top = self.rows.measure(rows, given, k)
        if (argmax < 0).any():
            raise damaged()
        return values, top_ids, top

    @overload
    def score(
        self, text: str | Sequence[int], continuation: str | Sequence[int] | None = None
    ) -> F32: ...

    @overload
    def score(
        self,
        text: list[str] | list[list[int]],
        continuation: list[str] | list[list[int]] | None = None,
    ) -> list[F32]: ...

    def score(
        self,
        text: str | Sequence[int] | list[str] | list[list[int]],
        continuation: str | Sequence[int] | list[str] | list[list[int]] | None = None,
    ) -> F32 | list[F32]:
        """Log-probabilities of the tokens of a text but the first, or of a continuation after it.

        Args:
            text: text or token ids; a list of texts gives a list of arrays, run together.
            continuation: text or token ids for each text.

        Returns float32 [tokens - 1], or [tokens of the continuation]. Raises UsageError for unknown
        ids, an empty text, or more than the context holds.
        """
        if not is_batch(text):
            return self._scores([text], [continuation])[0]  # type: ignore[list-item]
        if continuation is None:
            return self._scores(text, [None] * len(text))
        if not is_batch(continuation) or len(continuation) != len(text):
            raise UsageError(f"continuation: expected one for each of {len(text)} texts")
        return self._scores(text, continuation)

    def _scores(
        self,
        texts: Sequence[str | Sequence[int]],
        continuations: Sequence[str | Sequence[int] | None],
    ) -> list[F32]:
        found: list[F32] = []
        reads: list[Read] = []
        for first, more in zip(texts, continuations, strict=True):
            ids = self.checked(self._ids(first))
            start = 1 if more is None else len(ids)
            if more is not None:
                ids = self.checked(
                    [*ids, *token_ids("continuation", self._ids(more), self.context)]
                )
            out = np.empty(len(ids) - start, np.float32)
            found.append(out)

            def take(
                positions: Sequence[int],
                logits: F32,
                ids: list[int] = ids,
                out: F32 = out,
                start: int = start,
            ) -> None:
                said = [[ids[p + 1]] for p in positions]
                at = [p + 1 - start for p in positions]
                out[at] = self.logprobs(logits, said)[0][:, 0]

            if len(ids) > start:
                reads.append((ids[:-1], range(start - 1, len(ids) - 1), take))
        self._read(reads)
        return found

    def _read(self, reads: Iterable[Read]) -> None:
        """Run texts together; each gives the logits after some of its positions to a function."""
        engine, waiting = self.generations, deque[Generation]()
        try:
            for ids, wanted, take in reads:
                if len(waiting) == READ_TOGETHER:
                    next(waiting[0], None)
                    waiting.popleft()
                waiting.append(engine.line_up(ids, 0, Sampling(), wanted=wanted, take_rows=take))
            while waiting:
                next(waiting[0], None)
                waiting.popleft()
        finally:
            for generation in waiting:
                generation.cancel()


def _ids_by_row(ids: Sequence[Sequence[int]] | I32, rows: int, vocab: int) -> I32:
    """Token ids [rows, n], or UsageError."""
    expected = f"for each of {rows} rows as many token ids from 0 to {vocab - 1}"
    try:
        given = np.array(listed("ids", ids, expected)).reshape(rows, -1)
    except ValueError:  # rows of several lengths
        raise wrong("ids", expected, ids) from None
    if given.size and (given.dtype.kind not in "iu" or not 0 <= given.min() <= given.max() < vocab):
        raise wrong("ids", expected, ids)
    return given.astype(np.int32)


def _rows(rows: Sequence[int] | slice | None, n: int) -> list[int]:
    expected = f"a slice or whole numbers from {-n} to {n - 1}"
    if rows is not None and not isinstance(rows, slice):
        return [range(n)[row] for row in wholes("rows", rows, -n, n - 1, expected)]
    try:
        return list(range(n)[rows or slice(None)])
    except (TypeError, ValueError):  # of a slice from a text, or in steps of 0
        raise wrong("rows", expected, rows) from None


def is_batch(prompt: object) -> TypeGuard[Sequence[str | Sequence[int]]]:
    """Whether it is a list of prompts, as its first says."""
    if isinstance(prompt, (str, bytes, bytearray, memoryview)):
        return False
    if isinstance(prompt, np.ndarray):
        return prompt.ndim > 1
    first = next(iter(prompt), None) if isinstance(prompt, Sequence) else None
    return isinstance(first, (str, Sequence, np.ndarray))
