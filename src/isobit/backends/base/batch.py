"""What a pass is given and what it gives: a batch, what is wanted of its rows, results, limits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32, I32
from isobit.backends.base.draws import Draws
from isobit.config import EngineConfig
from isobit.errors import UsageError
from isobit.model.graph import Graph
from isobit.model.weights import Weights
from isobit.numerics.ops import LOGIT_ROWS, Embedding

Routes = NDArray[np.integer]
"""Experts: uint8, or int16 of more than 256."""


Tap = Callable[[str, int | None, NDArray[np.generic]], None]
"""Receives (stage, layer, array) for each traced stage, in graph order; stages are named in
:mod:`isobit.model.stages`. :func:`by_sequence` makes one of a tap for each sequence."""


CHOSEN = "moe_router_indices"
"""The stage of the experts that were chosen."""


# Batch, Wanted and Results are made for every pass. Frozen ones would take 3 µs each, six times as
# long, beside 450 of a small model's step.
@dataclass(slots=True)
class Batch:
    """Tokens to run in one pass; they may belong to several sequences.

    tokens, positions, sequence: int32 [T]; ``sequence[i]`` is the row of ``pages`` that token i
    belongs to. pages: int32 [S, P], page ``pages[s, p]`` holding positions 64p … 64p+63 of sequence
    s; entries that no position needs yet are page numbers too, whichever. A sequence's tokens
    follow one another, in the batch and in position. logit_rows: int32 [R], the tokens after which
    something is wanted. All arrays are C-contiguous.
    """

    tokens: I32
    positions: I32
    sequence: I32
    pages: I32
    logit_rows: I32
    states: I32 | None = None
    """int32 [S]: where each sequence's recurrent state lies, for models that have one: a number
    below the limit, each its own. None: sequence s has state s. It is zero where
    the sequence's tokens begin at position 0."""
    received: F32 | None = None
    """float32 [T, width]: for a stage of a pipeline that is not the first, the rows of the stage
    before it (``numerics.ops.Receive``)."""


@dataclass(slots=True)
class Wanted:
    """What a pass is to give of its R rows (``Batch.logit_rows``)."""

    logits: bool | I32 = True
    """Of all of them, of none, or of some: int32 [L], from 0 to R - 1."""
    argmax: bool = False
    """The largest logit's id, the lowest among equals."""
    top: int = 0
    """So many of the most likely ids, with their log-probabilities."""
    given: I32 | None = None
    """Log-probabilities of these ids: int32 [R, n]."""
    hidden: bool = False
    """The rows that the output product reads, after the last norm."""
    drawn: Draws | None = None
    """Tokens, each of one of the rows."""
    digests: bool = False
    """Of each row's logits."""
    routes: bool = False
    """The experts that each token went to."""
    following: "Following | None" = None
    """What most likely comes next. A device may begin with it while the caller looks at this."""

    @property
    def measures(self) -> bool:
        """Whether something is to be made of the logits."""
        made = self.top > 0 or self.given is not None or self.drawn is not None
        return made or self.argmax or self.digests

    @property
    def only_hidden(self) -> bool:
        """Whether no logits need be made for what is wanted of the rows."""
        return self.hidden and self.logits is False and not self.measures


@dataclass(frozen=True)
class Following:
    """The pass after one. It then comes as it is, with its tokens, or without some sequences that
    have ended; or another comes, and it has not been asked for."""

    batch: Batch
    """A token below 0, of which a sequence has one at most, is that which the pass before gives for
    its row - 1 - token: the one that is drawn of it, or else the most likely."""
    routes: bool = False
    """Whether the experts of its tokens will be wanted."""


LOGITS = Wanted()


ARGMAX = Wanted(logits=False, argmax=True)


HIDDEN = Wanted(logits=False, hidden=True)


@dataclass(slots=True)
class Results:
    """What a pass gave; None is what was not wanted. Log-probabilities are those of section 11 of
    docs/numerics.md, on every device.

    A row that is not finite spoils no other: its log-probabilities are NaN, its ids -1.
    """

    finite: NDArray[np.bool_]
    """[R]: whether each row's logits are, or its hidden values if these alone were wanted."""
    logits: F32 | None = None
    """[R, vocabulary] or [L, vocabulary]: as they were computed, finite or not."""
    argmax: I32 | None = None
    """[R]"""
    top_ids: I32 | None = None
    """[R, k], in order."""
    top: F32 | None = None
    """[R, k]"""
    given: F32 | None = None
    """[R, n]"""
    drawn: I32 | None = None
    """[D]; NOT_FINITE of a row that is not, NONE_ALLOWED where a grammar leaves nothing."""
    drawn_logprobs: F32 | None = None
    """[D]"""
    hidden: F32 | None = None
    """[R, hidden]"""
    digests: NDArray[np.uint8] | None = None
    """[R, 32]: ``numerics.digest.tree_digest`` of the logits' bytes, float32 little-endian."""
    routes: Routes | None = None
    """[T, layers, experts used], in rank order."""


class Limits(NamedTuple):
    """What a batch may name; one more is refused."""

    vocabulary: int
    positions: int
    """The context: of the longest sequence."""
    pages: int
    """Of the KV cache, KV_PAGE positions each."""
    states: int
    """Recurrent states; 0 for a model that has none."""

    @classmethod
    def of(cls, weights: Weights, engine: EngineConfig, *, keeps: bool = False) -> "Limits":
        """Those of a model with settings in which context and pages are settled; ``keeps``: whether
        states are kept beside those in use."""
        graph = weights.graph
        tables = [op.weights[0] for op in graph.ops if isinstance(op.operation, Embedding)]
        ids = min(w.shape[0] for w in tables) if tables else weights.config.vocab
        states = engine.max_sequences + keeps * engine.kept_states if graph.recurrent else 0
        assert engine.context is not None
        assert engine.pages is not None
        return cls(ids, engine.context, engine.pages, states)


def field_values(of: Batch | Wanted | Results) -> dict[str, Any]:
    """What stands in each field, by its name."""
    return {field.name: getattr(of, field.name) for field in fields(of)}


@dataclass(frozen=True)
class Memory:
    """A device's memory in bytes."""

    free: int
    total: int


def by_sequence(graph: Graph, batch: Batch, taps: Mapping[int, Tap]) -> Tap:
    """A tap that gives each sequence's rows to a tap of its own.

    taps: by the sequence's row in ``batch.pages``; of the others nothing is kept.
    """
    of_token = {s: np.flatnonzero(batch.sequence == s) for s in taps}
    of_row = {s: np.flatnonzero(batch.sequence[batch.logit_rows] == s) for s in taps}

    def tap(stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
        by_row = graph.stages[stage, layer].value.shape.rows == LOGIT_ROWS
        for s, rows in (of_row if by_row else of_token).items():
            if len(rows):
                taps[s](stage, layer, value[rows])

    return tap


def check_wanted(wanted: Wanted, rows: int, vocabulary: int) -> None:
    """Raises UsageError for what no pass of so many rows can give."""
    if isinstance(wanted.top, bool) or not isinstance(wanted.top, int) or wanted.top < 0:
        raise UsageError(f"wanted top: expected 0 or more, got {wanted.top!r:.60}")
    if not isinstance(wanted.logits, bool | np.ndarray):
        raise UsageError(f"wanted logits: expected True, False or rows, got {wanted.logits!r:.60}")
    if not isinstance(wanted.logits, bool):
        _check_ids("logits", wanted.logits, wanted.logits.shape[:1], rows)
    if wanted.drawn is not None:
        drawn = wanted.drawn.rows
        _check_ids("drawn rows", drawn, drawn.shape[:1], rows)
        if len(np.unique(drawn)) != len(drawn):
            raise UsageError("wanted drawn rows: expected each once")
    if wanted.given is not None:
        each = wanted.given.shape[1:2] or (1,)
        _check_ids("given", wanted.given, (rows, *each), vocabulary)


def _check_ids(name: str, ids: I32, shape: tuple[int, ...], below: int) -> None:
    if ids.dtype != np.int32 or ids.shape != shape or not ids.flags.c_contiguous:
        raise UsageError(
            f"wanted {name}: expected int32 {list(shape)}, got {ids.dtype} {list(ids.shape)}"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < below:
        raise UsageError(
            f"wanted {name}: expected 0 to {below - 1}, got {ids.min()} to {ids.max()}"
        )
