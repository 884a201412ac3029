"""Steps of decoding whose tokens are chosen on the device, which begins with the next one by itself
while the caller looks at the one before."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32, Batch
from isobit.backends.base.device_rows import MOST, Asked
from isobit.backends.cuda.device.gpu import Gpu
from isobit.backends.cuda.measure import Measuring
from isobit.backends.cuda.steps import Captured, Step
from isobit.model.graph import Key
from isobit.numerics import TILE

Draws = NDArray[np.void]
"""As kernels take them (measure.py); none: of length 0."""
Stages = Mapping[Key, NDArray[np.generic]]


@dataclass
class _Turn:
    """A step that is queued, and what it will give."""

    steps: Captured
    step: Step
    """Its tokens are not known before the step ahead of it has ended."""
    asked: Asked
    draws: Draws
    keys: frozenset[Key]
    first: I32
    """The positions from which on steps followed by themselves."""
    mark: object
    words: I32
    """[n, words]"""
    copy: NDArray[np.uint8]
    """Of the stages that last."""

    @property
    def last_pages(self) -> I32:
        """The page of each row's position: it is not full yet, and so of one sequence alone."""
        return _at(self.step.pages, self.step.positions // TILE)


class Served(NamedTuple):
    """What of a batch a step is of that was begun ahead of it: tokens with a row each."""

    turn: _Turn
    tokens: NDArray[np.intp]
    """Numbers of the batch's tokens."""
    rows: NDArray[np.intp]
    """Of the rows that something is wanted of, in the order of the tokens."""
    at: NDArray[np.intp]
    """Of the step's rows."""


class Turns:
    """Runs steps, and the ones ahead of them."""

    def __init__(self, gpu: Gpu, measuring: Measuring, lasting: int) -> None:
        """lasting: the most bytes of stages that last."""
        self._gpu, self._measuring = gpu, measuring
        words = 4 * measuring.rows * MOST
        self._buffers = [np.split(gpu.page_locked(words + lasting), [words]) for _ in range(2)]
        self._ahead: _Turn | None = None
        self._past: list[object] = []
        """Marks that nobody waits for any more."""

    def forget(self) -> None:
        """Another pass comes between."""
        if self._ahead is not None:
            self._past.append(self._ahead.mark)
            self._ahead = None

    def served(
        self, batch: Batch, asked: Asked, draws: Draws, keys: frozenset[Key]
    ) -> Served | None:
        """What of a batch is there already, or will be; None if nothing is."""
        turn, wanted = self._ahead, batch.logit_rows
        if turn is None or (turn.asked, turn.keys) != (asked, keys):
            return None
        tokens = rows = np.arange(len(batch.tokens))
        if not np.array_equal(wanted, tokens):
            rows = np.full(len(tokens), -1)
            rows[wanted] = np.arange(len(wanted))
            alone = np.bincount(batch.sequence)[batch.sequence] == 1
            tokens = np.flatnonzero(alone & (np.bincount(wanted, minlength=len(tokens)) == 1))
            rows = rows[tokens]
        positions, pages = batch.positions[tokens], batch.pages
        if not np.array_equal(batch.sequence[tokens], np.arange(len(pages))):
            pages = pages[batch.sequence[tokens]]
        at = _found(_at(pages, positions // TILE), turn.last_pages)
        same = (
            (at >= 0)
            & (batch.tokens[tokens] == turn.step.tokens[at])
            & (positions == turn.step.positions[at])
            & _alike(pages, turn.step.pages, at, positions // TILE + 1)
        )
        if asked.drawn:
            n = max(len(wanted), len(turn.step.tokens))
            same &= (_by_row(draws, n)[rows] == _by_row(turn.draws, n)[at]).all(axis=1)
        if not same.any():
            return None
        return Served(turn, tokens[same], rows[same], at[same])

    def take(self, served: Served) -> tuple[I32, Stages]:
        """What was found of these rows, int32 [n, words], and their stages."""
        turn = served.turn
        self._ahead = None
        self._gpu.wait(turn.mark)
        while self._past:
            self._gpu.wait(self._past.pop())
        stages = turn.steps.read(turn.copy, turn.keys, len(turn.words))
        return turn.words[served.at], {key: value[served.at] for key, value in stages}

    def run(
        self,
        steps: Captured,
        step: Step,
        asked: Asked,
        draws: Draws,
        keys: frozenset[Key],
        served: Served | None,
        *,
        ahead: bool,
    ) -> tuple[I32, Stages]:
        """The same of a step, all of whose rows are served if any are; its stages must last.

        ahead: begin with the next.
        """
        every = np.arange(len(step.tokens))
        if served is None:
            self.forget()
            turn = self._begin(steps, step, asked, draws, keys)
            served = Served(turn, every, every, every)
        turn, after = served.turn, None
        later = replace(step, positions=step.positions + np.int32(1))
        draws = draws.copy()
        draws["index"] += np.uint64(1)
        if ahead and turn.steps is steps and len(turn.words) == len(every):
            if step.pages is not turn.step.pages:
                steps.page(step.pages)
            after = self._queue(steps, later, asked, draws, keys, turn.first)
        words, stages = self.take(served)
        if ahead:
            chosen = words[:, 0].copy()
            if asked.drawn:
                chosen[draws["row"]] = words[draws["row"], asked.drawn_at]
            later = replace(later, tokens=chosen)
            if after is None and (chosen >= 0).all():
                after = self._begin(steps, later, asked, draws, keys)
            if after is not None:
                after.step, self._ahead = later, after
        return words, stages

    def _begin(
        self, steps: Captured, step: Step, asked: Asked, draws: Draws, keys: frozenset[Key]
    ) -> _Turn:
        steps.begin(step)
        if asked.drawn:
            self._measuring.draw(draws)
        return self._queue(steps, step, asked, draws, keys, step.positions)

    def _queue(
        self,
        steps: Captured,
        step: Step,
        asked: Asked,
        draws: Draws,
        keys: frozenset[Key],
        first: I32,
    ) -> _Turn:
        n, position = len(step.positions), int(step.positions.max())
        steps.replay(n, position)
        if asked.words == 1:
            source = steps.noted(first, position)
        else:
            also = (steps.tokens, steps.size(n)) if asked.drawn else (0, 0)
            self._measuring.queue(steps.logits, n, asked, *also)
            source = self._measuring.found
        self._buffers.reverse()
        buffer, copy = self._buffers[0]
        words = buffer.view(np.int32)[: n * asked.words].reshape(n, asked.words)
        self._gpu.fetch(source, words)
        if keys:
            address, nbytes = steps.lasting
            copy = copy[:nbytes]
            self._gpu.fetch(address, copy)
        return _Turn(steps, step, asked, draws, keys, first, self._gpu.mark(), words, copy)


def _at(pages: I32, tiles: I32) -> I32:
    """The page of each row's tile."""
    numbers: I32 = pages[np.arange(len(tiles)), tiles]
    return numbers


def _found(some: I32, among: I32) -> NDArray[np.intp]:
    """Where each is, or -1."""
    if np.array_equal(some, among):
        return np.arange(len(some))
    at = {number: i for i, number in enumerate(among.tolist())}
    return np.array([at.get(number, -1) for number in some.tolist()], np.intp)


def _alike(some: I32, others: I32, at: NDArray[np.intp], lengths: I32) -> NDArray[np.bool_]:
    """Whether each of some tables of pages begins as another one does."""
    if some is others:
        return np.ones(len(some), np.bool_)
    width = min(some.shape[1], others.shape[1])
    used = np.arange(width) < lengths[:, None]
    same: NDArray[np.bool_] = ~(used & (some[:, :width] != others[at, :width])).any(axis=1)
    return same


def _by_row(draws: Draws, rows: int) -> NDArray[np.uint64]:
    """What decides the draw of each row, [rows, 5]."""
    words = draws.view(np.uint64).reshape(-1, 5).copy()
    words[:, 0] >>= np.uint64(32)  # without the row
    of = np.zeros((rows, 5), np.uint64)
    of[draws["row"]] = words
    return of
