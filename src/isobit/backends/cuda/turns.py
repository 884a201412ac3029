"""Steps of decoding whose tokens are chosen on the device, which begins with the next one by itself
while the caller looks at the one before."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32
from isobit.backends.cuda.device.gpu import Gpu
from isobit.backends.cuda.measure import Measuring
from isobit.backends.cuda.steps import Captured, Step
from isobit.backends.measure import MOST, Asked
from isobit.model.graph import Key
from isobit.numerics import TILE

Draws = NDArray[np.void]
"""As kernels take them (measure.py); none: of length 0."""


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

    def rows(
        self, steps: Captured, step: Step, asked: Asked, draws: Draws, keys: frozenset[Key]
    ) -> NDArray[np.intp] | None:
        """Where rows of a step are in this one; None if it is another."""
        mine, n = self.step, len(step.tokens)
        rows = np.arange(n)
        if n < len(mine.tokens):  # some have ended
            rows = _found(_last_pages(step), _last_pages(mine))
        elif self.steps is not steps or not np.array_equal(step.of, mine.of):
            return None
        theirs = draws.copy()
        theirs["row"] = rows[draws["row"]]
        ours = self.draws[np.isin(self.draws["row"], theirs["row"])]
        same = (
            (self.asked, self.keys) == (asked, keys)
            and (rows >= 0).all()
            and np.array_equal(step.tokens, mine.tokens[rows])
            and np.array_equal(step.positions, mine.positions[rows])
            and _begin_alike(step.pages, mine.pages, rows, step.positions // TILE + 1)
            and ours.tobytes() == theirs.tobytes()
        )
        return rows if same else None


def _last_pages(step: Step) -> I32:
    """The page of each row's position: it is not full yet, so that it is of one sequence alone."""
    pages: I32 = step.pages[np.arange(len(step.tokens)), step.positions // TILE]
    return pages


def _found(some: I32, among: I32) -> NDArray[np.intp]:
    """Where each is, or -1."""
    at = {number: i for i, number in enumerate(among.tolist())}
    return np.array([at.get(number, -1) for number in some.tolist()])


def _begin_alike(some: I32, others: I32, rows: NDArray[np.intp], lengths: I32) -> bool:
    """Whether tables of pages are the same up to some length."""
    if some is others:
        return True
    width = min(some.shape[1], others.shape[1])
    used = np.arange(width) < lengths[:, None]
    return not (used & (some[:, :width] != others[rows, :width])).any()


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

    def run(
        self,
        steps: Captured,
        step: Step,
        asked: Asked,
        draws: Draws,
        keys: frozenset[Key],
        *,
        ahead: bool,
    ) -> tuple[I32, list[tuple[Key, NDArray[np.generic]]]]:
        """What is found of a step's rows, int32 [n, words], and its stages, which must last.

        ahead: begin with the next.
        """
        turn, after = self._ahead, None
        rows = None if turn is None else turn.rows(steps, step, asked, draws, keys)
        if turn is None or rows is None:
            self.forget()
            turn = self._begin(steps, step, asked, draws, keys)
            rows = np.arange(len(step.tokens))
        self._ahead = None
        every = len(rows) == len(turn.step.tokens)
        later = replace(step, positions=step.positions + np.int32(1))
        draws = draws.copy()
        draws["index"] += np.uint64(1)
        if ahead and every:
            if step.pages is not turn.step.pages:
                steps.page(step.pages)
            after = self._queue(steps, later, asked, draws, keys, turn.first)
        self._gpu.wait(turn.mark)
        while self._past:
            self._gpu.wait(self._past.pop())
        words = turn.words[rows]
        stages = list(turn.steps.read(turn.copy, keys, len(turn.words)))
        if ahead:
            chosen = words[:, 0].copy()
            if asked.drawn:
                chosen[draws["row"]] = words[draws["row"], asked.drawn_at]
            later = replace(later, tokens=chosen)
            if after is None and (chosen >= 0).all():
                after = self._begin(steps, later, asked, draws, keys)
            if after is not None:
                after.step, self._ahead = later, after
        return words, stages if every else [(key, value[rows]) for key, value in stages]

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
