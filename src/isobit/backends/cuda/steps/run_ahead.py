"""Passes whose tokens are chosen on the device, and those after them, which begin while the caller
looks at the ones before."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32, Batch
from isobit.backends.base.row_results import MAX_WORDS, RowRequest
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.sampler import DeviceSampler
from isobit.backends.cuda.steps.captured import Captured, Step
from isobit.backends.cuda.steps.passes import Passes
from isobit.model.graph import Key
from isobit.numerics import KV_PAGE

Draws = NDArray[np.void]
"""As kernels take them (sampler.py); none: of length 0."""
Stages = Mapping[Key, NDArray[np.generic]]
Runner = Captured | Passes


class Ask(NamedTuple):
    """A pass, and what is asked of it."""

    runner: Runner
    batch: Batch
    """Of one that follows another, tokens below 0 are those that row - 1 - token of that gives."""
    states: I32
    asked: RowRequest
    draws: Draws
    keys: frozenset[Key]
    """Stages that last, of steps alone."""


@dataclass
class _QueuedStep:
    """A pass that is queued, and what it will give."""

    of: Ask
    first: I32
    """The positions from which on steps followed by themselves."""
    mark: object
    source: int
    """Where the words lie on the device until another pass is measured."""
    words: I32
    """[R, words]"""
    copy: NDArray[np.uint8]
    """Of the stages that last."""

    def places(self) -> I32:
        """Of each row, which of the words is the token that it gives."""
        asked, rows = self.of.asked, np.arange(len(self.words), dtype=np.int32)
        places = rows * np.int32(asked.words)
        if asked.drawn:
            places[self.of.draws["row"]] += np.int32(asked.drawn_at)
        return places


class Matched(NamedTuple):
    """What of a pass that is queued is asked for."""

    queued: _QueuedStep
    tokens: NDArray[np.intp]
    """Numbers of its tokens."""
    rows: NDArray[np.intp]
    """Of its rows."""


class RunAhead:
    """Runs passes, and the ones ahead of them."""

    def __init__(self, gpu: Gpu, sampler: DeviceSampler, lasting: int) -> None:
        """lasting: the most bytes of stages that last."""
        self._gpu, self._sampler = gpu, sampler
        words = 4 * sampler.rows * MAX_WORDS
        self._buffers = [np.split(gpu.page_locked(words + lasting), [words]) for _ in range(2)]
        self._ahead: _QueuedStep | None = None
        self._past: list[object] = []
        """Marks that nobody waits for any more."""

    def forget(self) -> None:
        """Another pass comes between."""
        if self._ahead is not None:
            self._past.append(self._ahead.mark)
            self._ahead = None

    def match(
        self, batch: Batch, asked: RowRequest, draws: Draws, keys: frozenset[Key]
    ) -> Matched | None:
        """A batch of the pass that was begun ahead, or of some of its sequences; else None."""
        queued = self._ahead
        if queued is None or (queued.of.asked, queued.of.keys) != (asked, keys):
            return None
        mine = queued.of.batch
        tokens = _found(batch, mine)
        if tokens is None:
            return None
        row_of = np.full(len(mine.tokens), -1)
        row_of[mine.logit_rows] = np.arange(len(mine.logit_rows))
        rows = row_of[tokens[batch.logit_rows]]
        if (rows < 0).any():
            return None
        if asked.drawn:
            theirs = _by_row(queued.of.draws, len(mine.logit_rows))[rows]
            if not np.array_equal(_by_row(draws, len(rows)), theirs):
                return None
        return Matched(queued, tokens, rows)

    def begin(self, ask: Ask) -> Matched:
        """Queue a pass, whatever was begun."""
        self.forget()
        self._put(ask)
        queued = self._queue(ask, ask.batch.positions)
        return Matched(queued, np.arange(len(ask.batch.tokens)), np.arange(len(queued.words)))

    def follow(self, matched: Matched, ask: Ask) -> None:
        """Queue the pass after one, whose rows it names as that one was asked for."""
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
        places[tokens < 0] = queued.places()[-1 - tokens[tokens < 0]]
        ask.runner.fill(queued.source, places)
        self._ahead = self._queue(ask, ask.batch.positions)

    def take(self, matched: Matched) -> tuple[I32, Stages]:
        """What was found of these rows, int32 [n, words], and their stages."""
        queued, after = matched.queued, self._ahead
        if after is queued:
            self._ahead = after = None
        self._gpu.wait(queued.mark)
        while self._past:
            self._gpu.wait(self._past.pop())
        if after is not None:  # its tokens are known now
            tokens = after.of.batch.tokens.copy()
            given = queued.words.reshape(-1)[queued.places()]
            tokens[tokens < 0] = given[-1 - tokens[tokens < 0]]
            after.of = after.of._replace(batch=replace(after.of.batch, tokens=tokens))
        stages: Stages = {}
        if queued.of.keys:
            assert isinstance(queued.of.runner, Captured)
            read = queued.of.runner.read(queued.copy, queued.of.keys, len(queued.of.batch.tokens))
            stages = {key: value[matched.tokens] for key, value in read}
        return queued.words[matched.rows], stages

    def _put(self, ask: Ask) -> None:
        if isinstance(ask.runner, Passes):
            ask.runner.put(ask.batch, ask.states)
        else:
            ask.runner.begin(Step.of_batch(ask.batch, ask.states))
        if ask.asked.drawn:
            self._sampler.draw(ask.draws)

    def _queue(self, ask: Ask, first: I32) -> _QueuedStep:
        asked, sampler, rows = ask.asked, self._sampler, len(ask.batch.logit_rows)
        runner, source = ask.runner, sampler.found
        if isinstance(runner, Passes):
            runner.queue(
                ask.batch,
                lambda at, logits: sampler.queue(logits, len(at), asked, first=int(at[0])),
            )
        else:
            position = int(ask.batch.positions.max())
            runner.replay(rows, position)
            if asked.words == 1:
                source = runner.noted(first, position)
            else:
                also = (runner.tokens, runner.size(rows)) if asked.drawn else (0, 0)
                sampler.queue(runner.logits, rows, asked, *also)
        self._buffers.reverse()
        buffer, copy = self._buffers[0]
        words = buffer.view(np.int32)[: rows * asked.words].reshape(rows, asked.words)
        if rows:
            self._gpu.fetch(source, words)
        if ask.keys:
            assert isinstance(runner, Captured)
            address, nbytes = runner.lasting
            copy = copy[:nbytes]
            self._gpu.fetch(address, copy)
        return _QueuedStep(ask, first, self._gpu.mark(), source, words, copy)


def _goes_on(before: Ask, after: Ask) -> bool:
    """Whether a pass is the step that follows by itself."""
    if after.runner is not before.runner or not isinstance(after.runner, Captured):
        return False
    some, others, draws = before.batch, after.batch, before.draws.copy()
    draws["index"] += np.uint64(1)
    return (
        after.asked == before.asked
        and np.array_equal(others.tokens, -1 - np.arange(len(some.tokens)))
        and np.array_equal(others.positions, some.positions + 1)
        and np.array_equal(draws, after.draws)
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


def _by_row(draws: Draws, rows: int) -> NDArray[np.uint64]:
    """What decides the draw of each row, [rows, 5]."""
    words = draws.view(np.uint64).reshape(-1, 5).copy()
    words[:, 0] >>= np.uint64(32)  # without the row
    of = np.zeros((rows, 5), np.uint64)
    of[draws["row"]] = words
    return of
