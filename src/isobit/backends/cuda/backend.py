"""The CUDA backend: a model's weights on one GPU, batches in, logits and traced stages out."""

import time
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import (
    F32,
    GREEDY,
    I32,
    Backend,
    Batch,
    Limits,
    Memory,
    Results,
    Tap,
    Wanted,
)
from isobit.backends.cuda.device.gpu import CudaGpu, Gpu
from isobit.backends.cuda.programs import Programs, Sizes, room
from isobit.backends.cuda.slots import Mark, Pass
from isobit.backends.cuda.steps import ManySequences, OneSequence
from isobit.backends.pool import Room
from isobit.config import EngineConfig
from isobit.model.graph import Key
from isobit.model.weights import Weights


class CudaBackend(Backend):
    """Runs a batch of any composition; a step of decoding as a captured graph."""

    name = "cuda"
    on_device = frozenset({GREEDY})
    fused: ClassVar[bool] = True
    """Whether launches do several operations together, and steps are captured."""
    sizes: ClassVar[Sizes] = Sizes()

    def __init__(self, weights: Weights, engine: EngineConfig, gpu: Gpu | None = None) -> None:
        """Plan the memory, refuse what does not fit, load the weights.

        Raises BackendUnavailable with the reason. ``gpu`` is for tests.
        """
        self._gpu = gpu if gpu is not None else CudaGpu()
        how = self._gpu, self.fused, self.sizes
        asked: list[Programs] = []

        def left(settings: EngineConfig) -> Room:
            asked[:] = [Programs(weights, settings, *how)]
            return room(asked[0], Limits.of(weights, settings), self._gpu)

        try:
            super().__init__(weights, engine, left)
            if asked[0].context != self.engine.context:  # it was more than there is room for
                asked = [Programs(weights, self.engine, *how)]
            (self._programs,) = asked
            self.plan = self._programs.plan(self.limits)
            self.plan.check(*self._gpu.memory())
            self._programs.load(self.limits)
        except BaseException:
            self._gpu.close()
            raise
        self._logits = weights.graph.logits
        self.fused_away = self._programs.fused_away
        self.exchanges = self._programs.exchanges

    @property
    def device(self) -> str:
        """The device in words."""
        return f"{self._gpu.name}, {self._gpu.multiprocessors} multiprocessors"

    def memory(self) -> Memory:
        """Of the device."""
        self._gpu.activate()
        return Memory(*self._gpu.memory())

    def read_bandwidth(self) -> float | None:
        """Bytes a second that the device reads from its memory: the best of six times eight passes.

        None where too little memory is free for a buffer that is far beyond any cache.
        """
        gpu, passes = self._gpu, 8
        gpu.activate()
        nbytes = min(1 << 30, gpu.memory()[0] // 2) // 16 * 16
        if nbytes < 256 << 20:
            return None
        buffer, out = gpu.allocate(nbytes), gpu.allocate(4)
        flag, best = np.empty(1, np.int32), float("inf")
        try:
            for _ in range(6):  # the first compiles
                gpu.download(out, flag)
                start = time.perf_counter()
                for _ in range(passes):
                    gpu.launch(
                        "device/bandwidth",
                        "read_all",
                        (8 * gpu.multiprocessors,),
                        (buffer, nbytes // 16, out),
                    )
                gpu.download(out, flag)
                best = min(best, time.perf_counter() - start)
        finally:
            gpu.free(buffer)
            gpu.free(out)
        return passes * nbytes / best

    def close(self) -> None:
        """Free the device's memory."""
        self._gpu.close()

    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """See :class:`isobit.backends.base.Backend`."""
        self._gpu.activate()
        states = self._states(batch)
        self._extend_turns(int(batch.positions.max()) + 1)
        steps = self._steps_for(batch)
        if tap is None and steps is not None:
            of = batch.sequence
            step = batch.tokens, batch.positions, batch.pages[of], states[of], of
            return steps.logits(*step)
        mixed = self._programs.mixed
        if tap is None and mixed is not None and mixed.takes(batch):
            return mixed.logits(batch, states)
        logits = np.empty((len(batch.logit_rows), self._logits.shape.width), np.float32)
        keys = self._programs.asked(stages) if tap is not None else frozenset()
        marks: Iterable[tuple[Mark, Pass]]
        if steps is not None and keys <= steps.stages:
            of = batch.sequence
            step = batch.tokens, batch.positions, batch.pages[of], states[of], of
            marks = steps.traced(*step, logits, keys)
        elif mixed is not None and mixed.takes(batch) and keys <= mixed.stages:
            marks = mixed.traced(batch, states, logits, keys)
        else:  # a prompt, or what steps do not show
            marks = self._programs.passes.run(batch, states, logits)
        self._show(batch, marks, keys, tap)
        if tap is not None and (key := self._logits.key) and (stages is None or key[0] in stages):
            tap(*key, logits)
        return logits

    def _show(
        self,
        batch: Batch,
        marks: Iterable[tuple[Mark, Pass]],
        keys: frozenset[Key],
        tap: Tap | None,
    ) -> None:
        """Run through a pass, or several, and give what is asked for to the tap."""
        parts: dict[Key, list[NDArray[np.generic]]] = {}
        for mark, p in marks:
            key = mark.value.key
            if tap is None or key is None or key not in keys:
                continue
            value = mark.read(self._gpu, p)
            if p.tokens == len(batch.tokens):
                tap(*key, value)
            else:  # one of several passes
                parts.setdefault(key, []).append(value)
        for key, values in parts.items():
            assert tap is not None
            tap(*key, np.concatenate(values))

    def compute(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        """See :class:`isobit.backends.base.Backend`; of a step alone, the likeliest ids are found
        on the device."""
        steps = self._steps_for(batch) if one_each(batch) else None
        only = wanted.likeliest and wanted.logits is False and not wanted.top
        if steps is None or not only or wanted.given is not None or tap is not None:
            return super().compute(batch, wanted, tap, stages)
        of = batch.sequence
        states = self._states(batch)[of]
        chosen = self.compute_greedy(batch.tokens, batch.positions, batch.pages[of], 1, states)[0]
        return Results(chosen >= 0, likeliest=chosen)

    def compute_greedy(
        self, tokens: I32, positions: I32, pages: I32, count: int, states: I32 | None
    ) -> I32:
        """Decode steps whose logits stay on the device."""
        self._gpu.activate()
        each = np.arange(len(tokens), dtype=np.int32)
        steps = self._steps_for(Batch(tokens, positions, each, pages, each))
        if steps is None:
            return super().compute_greedy(tokens, positions, pages, count, states)
        self._extend_turns(int(positions.max()) + count)
        return steps.greedy(tokens, positions, pages, each if states is None else states, count)

    def _steps_for(self, batch: Batch) -> OneSequence | ManySequences | None:
        """What runs a batch that is one step of decoding; None if it is something else."""
        n = len(batch.tokens)
        if not np.array_equal(batch.logit_rows, np.arange(n)):
            return None
        if n in self._programs.rows and (one_each(batch) or not self.limits.states):
            return self._programs.rows[n]
        if not one_each(batch):
            return None
        steps = self._programs.one if n == 1 else self._programs.many
        return steps if steps is not None and n <= steps.most else None

    def _states(self, batch: Batch) -> I32:
        """Where each sequence's state lies."""
        if batch.states is None:
            return np.arange(len(batch.pages), dtype=np.int32)
        return batch.states

    def _extend_turns(self, end: int) -> None:
        """Have RoPE tables for positions below ``end``."""
        for turns in self._programs.resident.turns.values():
            turns.extend(self._gpu, end)


def one_each(batch: Batch) -> bool:
    """Whether each token of a batch is of another sequence."""
    return len(np.unique(batch.sequence)) == len(batch.tokens)


class UnfusedCudaBackend(CudaBackend):
    """The same operation by operation: every stage can be traced."""

    name = "cuda:unfused"
    fused = False
