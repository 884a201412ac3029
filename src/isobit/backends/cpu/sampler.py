"""Choosing tokens and log-probabilities of rows of logits, compiled: sections 10 and 11 of
docs/numerics.md, bit for bit what :mod:`isobit.numerics` gives one row at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32, I32
from isobit.backends.cpu import _cpu
from isobit.errors import BackendUnavailable

NOT_FINITE, NONE_ALLOWED = -1, -2
"""What stands in place of a token where the logits are not finite, or every id is forbidden."""


@dataclass(frozen=True)
class Row:
    """How one row's token is chosen; as :func:`isobit.numerics.sampling.choose` takes it."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    index: int = 1
    """Of the token in the sequence's output, from 1."""
    edited_ids: I32 | None = None
    """Ids whose logits are others than the row's, after bias and penalties."""
    edited_logits: F32 | None = None


@dataclass(frozen=True)
class Columns:
    """What stays the same of rows from token to token."""

    temperature: F32
    top_k: I32
    top_p: NDArray[np.uint64]
    min_p: F32
    seed: NDArray[np.uint64]
    no_edits: I32

    @classmethod
    def of(cls, rows: Sequence[Row], vocabulary: int) -> "Columns":
        """Those of rows of so many logits."""
        return cls(
            np.array([r.temperature for r in rows], np.float32),
            np.array([min(r.top_k, vocabulary) for r in rows], np.int32),
            np.array([fraction(r.top_p) for r in rows], np.uint64),
            np.array([r.min_p for r in rows], np.float32) + np.float32(0),  # there is no -0
            np.array([r.seed for r in rows], np.uint64),
            np.zeros(len(rows), np.int32),
        )


_NO_IDS, _NO_LOGITS = np.empty(0, np.int32), np.empty(0, np.float32)


class RowSampler:
    """Works on rows in parallel, on so many threads; may be called from several.

    Raises BackendUnavailable if the system refuses a thread.
    """

    def __init__(self, simd: str | None = None, threads: int = 1) -> None:
        try:
            self._sampler = _cpu.Sampler(simd or "", threads)
        except RuntimeError as error:  # threads
            raise BackendUnavailable(f"cpu: {error}") from None

    def choose(
        self, logits: F32, rows: Sequence[Row], allowed: NDArray[np.uint32] | None = None
    ) -> I32:
        """A token for each row of logits [R, V]: ids int32 [R], or NOT_FINITE or NONE_ALLOWED.

        allowed: uint32 [R, ceil(V / 32)], bit i % 32 of word i // 32 for id i.
        """
        edits = [
            (i, r.edited_ids, r.edited_logits)
            for i, r in enumerate(rows)
            if r.edited_ids is not None and r.edited_logits is not None
        ]
        index = np.array([r.index for r in rows], np.uint64)
        return self.draw(logits, Columns.of(rows, logits.shape[1]), index, edits, allowed)

    def draw(
        self,
        logits: F32,
        columns: "Columns",
        index: NDArray[np.uint64],
        edits: Sequence[tuple[int, I32, F32]] = (),
        allowed: NDArray[np.uint32] | None = None,
    ) -> I32:
        """:meth:`choose`, what decides given by columns; edits: (row, ids, logits) in order."""
        tokens = np.empty(len(index), np.int32)
        ends, ids, values = columns.no_edits, _NO_IDS, _NO_LOGITS
        if edits:
            lengths = np.zeros(len(index), np.int32)
            for row, row_ids, _ in edits:
                lengths[row] = len(row_ids)
            ends = lengths.cumsum(dtype=np.int32)
            ids = np.concatenate([row_ids for _, row_ids, _ in edits])
            values = np.concatenate([row_values for _, _, row_values in edits])
        self._sampler.choose(
            logits,
            columns.temperature,
            columns.top_k,
            columns.top_p,
            columns.min_p,
            columns.seed,
            index,
            ends,
            ids,
            values,
            allowed,
            tokens,
        )
        return tokens

    def measure(self, logits: F32, ids: I32, k: int = 0) -> tuple[I32, F32, I32, F32]:
        """What rows of logits [R, V] say of their next tokens.

        (the argmax of each, int32 [R], NOT_FINITE for a row that is not; log-probabilities of
        ids [R, n], float32 [R, n]; the k largest logits' ids, int32 [R, k], in order; theirs,
        float32 [R, k]). Of a row that is not finite the others are NaN and -1.
        """
        argmax = np.empty(len(logits), np.int32)
        values = np.empty(ids.shape, np.float32)
        top_ids = np.empty((len(logits), min(k, logits.shape[1])), np.int32)
        top = np.empty(top_ids.shape, np.float32)
        self._sampler.measure(logits, ids, argmax, values, top_ids, top)
        return argmax, values, top_ids, top

    def digests(self, rows: NDArray[np.generic]) -> NDArray[np.uint8]:
        """The digest of each row, uint8 [R, 32]: :func:`isobit.numerics.digest.tree_digest`."""
        out = np.empty((len(rows), 32), np.uint8)
        self._sampler.digest(np.ascontiguousarray(rows).view(np.uint8), out)
        return out


def fraction(top_p: float) -> int:
    """top_p times 2^64, and 0 for 1; the least positive fraction keeps one token, as 0 would."""
    return 0 if top_p >= 1 else max(int(top_p * 2.0**64), 1)
