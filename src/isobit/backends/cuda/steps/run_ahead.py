"""Passes whose tokens are chosen on the device, and those after them, which begin while the caller
looks at the ones before.

What begins ahead is a pass up to its logits. What is wanted of these is told when the caller asks
for it: then all tokens before are known, of which penalties and grammars speak, and the device has
the pass itself to do meanwhile.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32, Batch
from isobit.backends.base.draws import Draws
from isobit.backends.base.row_results import MAX_WORDS, RowRequest
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.sampler import DeviceSampler, RowDraws
from isobit.backends.cuda.steps.captured import Captured, Step
from isobit.backends.cuda.steps.passes import Passes
from isobit.model.graph import Key
from isobit.numerics import KV_PAGE

Stages = Mapping[Key, NDArray[np.generic]]
Runner = Captured | Passes


class Ask(NamedTuple):
    """A pass up to its logits."""

    runner: Runner
    batch: Batch
    """Of one that follows another, tokens below 0 are those that row - 1 - token of that gives."""
    states: I32
    keys: frozenset[Key]
    """Stages that last, of steps alone."""


@dataclass
class _Queued:
    """A pass that is queued."""

    of: Ask
    first: I32
    """The positions from which on steps followed by themselves."""


class Matched(NamedTuple):
    """What of a pass that is queued is asked for."""

    queued: _Queued
    tokens: NDArray[np.intp]
    """Numbers of its tokens."""
    rows: NDArray[np.intp]
    """Of its rows."""


class _Measured(NamedTuple):
    """What is found of a pass, once a mark has passed."""

    source: int
    """Where the words lie on the device until another pass is measured."""
    words: I32
    """[R, words]"""
    places: I32
    """Of each row, which of the words is the token that it gives."""
    copy: NDArray[np.uint8]
    """Of the stages that last."""
    mark: object


class RunAhead:
    """Runs passes, and the ones ahead of them."""

    def __init__(self, gpu: Gpu, sampler: DeviceSampler, lasting: int) -> None:
        """lasting: the most bytes of stages that last."""
        self._gpu, self._sampler = gpu, sampler
        words = 4 * sampler.rows * MAX_WORDS
        self._words, self._copy = np.split(gpu.page_locked(words + lasting), [words])
        self._ahead: _Queued | None = None

    def forget(self) -> None:
        """Another pass comes between."""
        self._ahead = None

    def match(self, batch: Batch, keys: frozenset[Key]) -> Matched | None:
        """A batch of the pass that was begun ahead, or of some of its sequences; else None."""
        queued = self._ahead
        if queued is None or queued.of.keys != keys:
            return None
        mine = queued.of.batch
        tokens = _found(batch, mine)
        if tokens is None:
            return None
        row_of = np.full(len(mine.tokens), -1)
        row_of[mine.logit_rows] = np.arange(len(mine.logit_rows))
        rows = row_of[tokens[batch.logit_rows]]
        return None if (rows < 0).any() else Matched(queued, tokens, rows)

    def begin(self, ask: Ask) -> Matched:
        """Queue a pass, whatever was begun."""
        self.forget()
        self._put(ask)
        queued = self._queue(ask, ask.batch.positions)
        rows = np.arange(len(ask.batch.logit_rows))
        return Matched(queued, np.arange(len(ask.batch.tokens)), rows)

    def finish(
        self, matched: Matched, asked: RowRequest, draws: Draws | None, after: Ask | None
    ) -> tuple[I32, Stages]:
        """What is asked of the rows of a pass, int32 [n, words], and their stages; meanwhile the
        pass after it begins, whose tokens name rows as this one was asked for."""
        queued, self._ahead = matched.queued, None
        found = self._measure(matched, asked, draws)
        if after is not None:
            self._follow(matched, found, after)
        self._gpu.wait(found.mark)
        if (ahead := self._ahead) is not None:  # its tokens are known now
            tokens = ahead.of.batch.tokens.copy()
            given = found.words.reshape(-1)[found.places]
            tokens[tokens < 0] = given[-1 - tokens[tokens < 0]]
            ahead.of = ahead.of._replace(batch=replace(ahead.of.batch, tokens=tokens))
        stages: Stages = {}
        if queued.of.keys:
            assert isinstance(queued.of.runner, Captured)
            n = len(queued.of.batch.tokens)
            stages = dict(queued.of.runner.read(found.copy, queued.of.keys, n))
            if not np.array_equal(matched.tokens, np.arange(n)):
                stages = {key: value[matched.tokens] for key, value in stages.items()}
        return found.words[matched.rows], stages

    def _put(self, ask: Ask) -> None:
        if isinstance(ask.runner, Passes):
            ask.runner.put(ask.batch, ask.states)
        else:
            ask.runner.begin(Step.of_batch(ask.batch, ask.states))

    def _queue(self, ask: Ask, first: I32) -> _Queued:
        if isinstance(ask.runner, Passes):
            ask.runner.queue(ask.batch)
        else:
            ask.runner.replay(len(ask.batch.logit_rows), int(ask.batch.positions.max()))
        return _Queued(ask, first)

    def _measure(self, matched: Matched, asked: RowRequest, wanted: Draws | None) -> _Measured:
        """Queue what is asked of all rows of a pass."""
        queued, sampler = matched.queued, self._sampler
        runner, batch, source = queued.of.runner, queued.of.batch, sampler.found
        rows = len(batch.logit_rows)
        places = np.arange(rows, dtype=np.int32) * np.int32(asked.words)
        of_draws = matched.rows if wanted is None else matched.rows[wanted.rows]
        draws = RowDraws.of(wanted, of_draws)
        places[draws.each["row"]] += np.int32(asked.drawn_at)
        if isinstance(runner, Passes):

            def take(at: NDArray[np.intp], logits: int) -> None:
                sampler.queue(logits, len(at), asked, draws, first=int(at[0]))

            runner.give(batch, take)
        elif asked.words == 1:
            source = runner.noted(queued.first, int(batch.positions.max()))
        else:
            also = (runner.tokens, runner.size(rows)) if asked.drawn else (0, 0)
            sampler.queue(runner.logits, rows, asked, draws, *also)
        words = self._words.view(np.int32)[: rows * asked.words].reshape(rows, asked.words)
        if rows:
            self._gpu.fetch(source, words)
        copy = self._copy[:0]
        if queued.of.keys:
            assert isinstance(runner, Captured)
            address, nbytes = runner.lasting
            copy = self._copy[:nbytes]
            self._gpu.fetch(address, copy)
        return _Measured(source, words, places, copy, self._gpu.mark())

    def _follow(self, matched: Matched, found: _Measured, ask: Ask) -> None:
        """Queue the pass after one that is measured."""
        queued, tokens = matched.queued, ask.batch.tokens.copy()
        tokens[tokens < 0] = -1 - matched.rows[-1 - tokens[tokens < 0]]
        ask = ask._replace(batch=replace(ask.batch, tokens=tokens))
        if _goes_on(queued.of, ask):
            assert isinstance(ask.runner, Captured)
            if ask.batch.pages is not queued.of.batch.pages:
                ask.runner.page(Step.of_batch(ask.batch, ask.states).pages)
            self._ahead = self._queue(ask, queued.first)
            return
        self._put(ask._replace(batch=replace(ask.batch, tokens=np.maximum(tokens, 0))))
        places = np.full(len(tokens), -1, np.int32)
        places[tokens < 0] = found.places[-1 - tokens[tokens < 0]]
        ask.runner.fill(found.source, places)
        self._ahead = self._queue(ask, ask.batch.positions)


def _goes_on(before: Ask, after: Ask) -> bool:
    """Whether a pass is the step that follows by itself."""
    if after.runner is not before.runner or not isinstance(after.runner, Captured):
        return False
    some, others = before.batch, after.batch
    return np.array_equal(others.tokens, -1 - np.arange(len(some.tokens))) and np.array_equal(
        others.positions, some.positions + 1
    )


def _found(batch: Batch, among: Batch) -> NDArray[np.intp] | None:
    """The numbers that a batch's tokens have in another one; None if some are not there.

    The page that a sequence's last token is in is not full yet, and so of that sequence alone.
    """
    some, others = _Runs.of(batch), _Runs.of(among)
    at = np.arange(len(some.last))
    if not np.array_equal(some.last, others.last):
        places = {page: i for i, page in enumerate(others.last.tolist())}
        at = np.array([places.get(page, -1) for page in some.last.tolist()], np.intp)
        if (at < 0).any():
            return None
    if not np.array_equal(some.lengths, others.lengths[at]):
        return None
    shift = np.repeat(others.starts[at] - some.starts, some.lengths)
    tokens: NDArray[np.intp] = np.arange(len(batch.tokens)) + shift
    same = (
        np.array_equal(batch.tokens, among.tokens[tokens])
        and np.array_equal(batch.positions, among.positions[tokens])
        and _alike(some, others, at)
    )
    return tokens if same else None


class _Runs(NamedTuple):
    """The sequences of a batch."""

    starts: NDArray[np.intp]
    lengths: NDArray[np.intp]
    pages: I32
    """[S, P]"""
    used: I32
    """Pages of each."""
    last: I32
    """The page of its last token."""

    @classmethod
    def of(cls, batch: Batch) -> "_Runs":
        starts = np.flatnonzero(np.diff(batch.sequence, prepend=-1))
        ends = np.append(starts[1:], len(batch.sequence))
        pages = batch.pages
        if not np.array_equal(numbers := batch.sequence[starts], np.arange(len(pages))):
            pages = pages[numbers]
        used = batch.positions[ends - 1] // KV_PAGE + 1
        return cls(starts, ends - starts, pages, used, pages[np.arange(len(starts)), used - 1])


def _alike(some: _Runs, others: _Runs, at: NDArray[np.intp]) -> bool:
    """Whether tables of pages begin as others do."""
    if some.pages is others.pages and np.array_equal(at, np.arange(len(others.last))):
        return True
    width = min(some.pages.shape[1], others.pages.shape[1])
    used = np.arange(width) < some.used[:, None]
    return not (used & (some.pages[:, :width] != others.pages[at, :width])).any()
