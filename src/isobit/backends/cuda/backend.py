"""The CUDA backend: a model's weights on one GPU, batches in, logits and traced stages out."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import (
    CHOSEN,
    F32,
    GREEDY,
    I32,
    Backend,
    Batch,
    Following,
    Limits,
    Memory,
    Progress,
    Results,
    Tap,
    Wanted,
    unwatched,
)
from isobit.backends.base.draws import Draws
from isobit.backends.base.kv_pages import Headroom
from isobit.backends.base.row_results import RowRequest, RowResults
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.device.memory import STAGING_BYTES
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.resident import StoredWeights
from isobit.backends.cuda.sampler import NO_DRAWS, RowDraws
from isobit.backends.cuda.steps.captured import Captured, Step
from isobit.backends.cuda.steps.passes import Take
from isobit.backends.cuda.steps.programs import CaptureSizes, Programs, headroom
from isobit.backends.cuda.steps.run_ahead import Ask, RunAhead, Runner
from isobit.backends.cuda.workspace import Pass, TracePoint
from isobit.backends.hardware import nvidia_driver
from isobit.config import EngineConfig
from isobit.model.graph import Key
from isobit.model.weights import Weights


class CudaBackend(Backend):
    """Runs a batch of any composition; a step of decoding as a captured graph."""

    name = "cuda"
    on_device = frozenset({GREEDY})
    goes_ahead = True
    copies_states = True
    fused: ClassVar[bool] = True
    """Whether launches do several operations together, and steps are captured."""
    sizes: ClassVar[CaptureSizes] = CaptureSizes()

    def __init__(
        self,
        weights: Weights,
        engine: EngineConfig,
        gpu: Gpu | None = None,
        *,
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        """Plan the memory, refuse what does not fit, load the weights.

        ``beside``: called once the weights are on their way. Raises BackendUnavailable with the
        reason. ``gpu`` is for tests.
        """
        self._gpu = gpu if gpu is not None else CudaGpu()
        asked: list[Programs] = []

        def left(settings: EngineConfig) -> Headroom:
            asked[:] = [Programs(weights, settings, *how)]
            return headroom(asked[0], Limits.of(weights, settings, keeps=True), free)

        try:
            self._gpu.activate()
            free, total = self._gpu.memory()
            stored = StoredWeights.of(weights.graph)
            how = self._gpu, self.fused, self.sizes, stored
            if stored.region.nbytes + STAGING_BYTES < free:  # they come while programs are made
                stored.begin(self._gpu)
            beside()
            super().__init__(weights, engine, left)
            if asked[0].context != self.engine.context:  # it was more than there is room for
                asked = [Programs(weights, self.engine, *how)]
            (self._programs,) = asked
            self.plan = self._programs.plan(self.limits)
            self.plan.check(free, total)
            self._programs.load(self.limits)
            self._run_ahead = RunAhead(self._gpu, self._programs.sampler, self._programs.lasting)
        except BaseException:
            self._gpu.close()
            raise
        self._logits = weights.graph.logits
        if self._programs.mixed is not None:
            self.padded = self._programs.mixed.sizes
        self.fused_away = self._programs.fused_away
        self.exchanges = self._programs.exchanges

    @property
    def device(self) -> str:
        """The device in words."""
        return f"{self._gpu.name}, {self._gpu.multiprocessors} multiprocessors"

    @property
    def driver(self) -> str | None:
        """Of NVIDIA's driver."""
        return nvidia_driver()

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

    def prepare(self, step: Progress = unwatched) -> str:
        """Compile the kernels of any pass, and capture the graphs."""
        self._gpu.activate()
        self._run_ahead.forget()
        kernels, graphs = self._programs.prepare(step)
        return f"kernels compiled: {kernels}, graphs captured: {graphs}"

    def load_kernels(self) -> None:
        """Have those of any pass that is not captured."""
        self._gpu.activate()
        self._programs.load_kernels()

    def close(self) -> None:
        """Free the device's memory."""
        self._gpu.close()

    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """See :class:`isobit.backends.base.Backend`."""
        return self._to_host(batch, None, tap, stages)

    def _to_host(
        self, batch: Batch, hidden: Take | None, tap: Tap | None, stages: frozenset[str] | None
    ) -> F32:
        host = _ToHost(self._gpu, len(batch.logit_rows), self._logits.shape.width)
        self._pass(batch, host, tap, stages, hidden)
        if tap is not None and (key := self._logits.key) and (stages is None or key[0] in stages):
            tap(*key, host.rows)
        return host.rows

    def compute(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        """What is wanted, made on the device if that is little and no logits."""
        asked, key = RowRequest.of(wanted, self._logits.shape.width), self._logits.key
        hidden = None
        if wanted.hidden:
            assert self.graph.hidden is not None
            hidden = _ToHost(self._gpu, len(batch.logit_rows), self.graph.hidden.shape.width)
            if wanted.only_hidden and tap is None:
                self._pass(batch, None, None, None, hidden)
                return self._measured(None, wanted, hidden.rows)
        shown = tap is not None and key is not None and (stages is None or key[0] in stages)
        if asked is None or shown:
            logits = self._to_host(batch, hidden, tap, stages)
            return self._measured(logits, wanted, hidden.rows if hidden else None)
        found = RowResults.empty(len(batch.logit_rows), asked)
        keys = self._programs.asked(stages) if tap is not None else frozenset()
        every = np.arange(len(batch.logit_rows))
        if hidden is not None:
            self._pass(batch, self._measure(asked, wanted, found, every), tap, stages, hidden)
            return replace(found.results(wanted), hidden=hidden.rows)
        ask = None if wanted.given is not None else self._ask(batch, keys)
        if ask is None:
            self._pass(batch, self._measure(asked, wanted, found, every), tap, stages)
            return found.results(wanted)
        self._gpu.activate()
        matched = self._run_ahead.match(batch, keys)
        if matched is None:
            self._extend_rope_tables(int(batch.positions.max()) + 1)
            matched = self._run_ahead.begin(ask)
        after = None if wanted.following is None else self._after(wanted.following)
        if after is not None:
            self._extend_rope_tables(int(after.batch.positions.max()) + 1)
        words, theirs = self._run_ahead.finish(matched, asked, wanted.drawn, after)
        found.take(every, words, asked)
        for key, value in theirs.items():
            assert tap is not None
            tap(*key, value)
        return found.results(wanted)

    def _ask(self, batch: Batch, keys: frozenset[Key]) -> Ask | None:
        """A pass whose tokens can be chosen on the device, with no stop on the way; else None."""
        if len(batch.logit_rows) > self._programs.sampler.rows:
            return None
        steps, passes = self._steps_for(batch), (self._programs.mixed, self._programs.passes)
        runner: Runner | None = None
        if steps is not None and (not keys or steps.lasts(keys)):
            runner = steps
        elif not keys:
            runner = next((p for p in passes if p is not None and p.takes(batch)), None)
        return None if runner is None else Ask(runner, batch, self._states(batch), keys)

    def _after(self, following: Following) -> Ask | None:
        """A pass that can be begun before the one ahead of it has ended."""
        if self.limits.states:
            return None
        stages = frozenset({CHOSEN}) if following.routes else frozenset[str]()
        return self._ask(following.batch, self._programs.asked(stages))

    def copy_state(self, source: int, target: int) -> None:
        """See :class:`isobit.backends.base.Backend`."""
        self._gpu.activate()
        self._programs.resident.copy_state(self._gpu, source, target)

    def draws(self, wanted: Wanted) -> bool:
        """See :class:`isobit.backends.base.Backend`."""
        return RowRequest.of(wanted, self._logits.shape.width) is not None

    def _measure(
        self, asked: RowRequest, wanted: Wanted, found: RowResults, which: NDArray[np.intp]
    ) -> Take:
        """Takes rows of logits for what is asked; ``which``: the rows that those of a pass are."""
        sampler = self._programs.sampler

        def take(rows: NDArray[np.intp], address: int) -> None:
            mine = which[rows]
            if wanted.given is not None:
                sampler.give(np.ascontiguousarray(wanted.given[mine]))
            sampler.queue(address, len(mine), asked, _of_rows(wanted.drawn, mine))
            words = np.empty((len(mine), asked.words), np.int32)
            self._gpu.download(sampler.found, words)
            found.take(mine, words, asked)

        return take

    def _pass(
        self,
        batch: Batch,
        take: Take | None,
        tap: Tap | None,
        stages: frozenset[str] | None,
        hidden: Take | None = None,
    ) -> None:
        """Run a batch of any kind, and have its rows of logits taken, and those that they
        are made of, which captured steps do not show."""
        self._gpu.activate()
        self._run_ahead.forget()
        states = self._states(batch)
        self._extend_rope_tables(int(batch.positions.max()) + 1)
        keys = self._programs.asked(stages) if tap is not None else frozenset()
        steps, mixed = self._steps_for(batch), self._programs.mixed
        if take is None or hidden is not None:
            marks = self._programs.passes.run(batch, states, take, hidden, stops=bool(keys))
            self._show(batch, marks, keys, tap)
        elif steps is not None and keys <= steps.stages:
            step = Step.of_batch(batch, states)
            if keys:
                self._show(batch, steps.traced(step, keys), keys, tap)
            else:
                steps.begin(step)
                steps.replay(len(step.tokens), int(step.positions.max()))
            take(np.arange(len(step.tokens)), steps.logits)
        elif mixed is not None and mixed.takes(batch) and keys <= mixed.stages:
            if keys:
                self._show(batch, mixed.traced(batch, states, take, keys), keys, tap)
            else:
                mixed.put(batch, states)
                mixed.queue()
                mixed.give(batch, take)
        else:  # a prompt, or what steps do not show
            marks = self._programs.passes.run(batch, states, take, stops=bool(keys))
            self._show(batch, marks, keys, tap)

    def _show(
        self,
        batch: Batch,
        marks: Iterable[tuple[TracePoint, Pass]],
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

    def compute_greedy(
        self, tokens: I32, positions: I32, pages: I32, count: int, states: I32 | None
    ) -> I32:
        """Decode steps whose logits stay on the device."""
        self._gpu.activate()
        self._run_ahead.forget()
        each = np.arange(len(tokens), dtype=np.int32)
        steps = self._steps_for(Batch(tokens, positions, each, pages, each))
        if steps is None:
            return super().compute_greedy(tokens, positions, pages, count, states)
        self._extend_rope_tables(int(positions.max()) + count)
        states = each if states is None else states
        return steps.greedy(Step(tokens, positions, pages, states, each), count)

    def _steps_for(self, batch: Batch) -> Captured | None:
        """What runs a batch that is one step of decoding; None if it is something else."""
        n = len(batch.tokens)
        if not np.array_equal(batch.logit_rows, np.arange(n)):
            return None
        each = one_each(batch)
        if n in self._programs.rows and (each or not self.limits.states):
            return self._programs.rows[n]
        if not each:
            return None
        steps = self._programs.one if n == 1 else self._programs.many
        return steps if steps is not None and n <= steps.most else None

    def _states(self, batch: Batch) -> I32:
        """Where each sequence's state lies."""
        if batch.states is None:
            return np.arange(len(batch.pages), dtype=np.int32)
        return batch.states

    def _extend_rope_tables(self, end: int) -> None:
        """Have RoPE tables for positions below ``end``."""
        for table in self._programs.resident.rope_tables.values():
            table.extend(self._gpu, end)


def one_each(batch: Batch) -> bool:
    """Whether each token of a batch is of another sequence."""
    return len(batch.tokens) == 1 or len(np.unique(batch.sequence)) == len(batch.tokens)


def _of_rows(draws: Draws | None, rows: NDArray[np.intp]) -> RowDraws:
    """Those draws that are of some of a pass's rows, which are ascending."""
    if draws is None:
        return NO_DRAWS
    at = np.searchsorted(rows, draws.rows)
    return RowDraws.of(draws, np.where(np.isin(draws.rows, rows), at, -1))


class _ToHost:
    """Takes rows to the host's memory."""

    def __init__(self, gpu: Gpu, rows: int, width: int) -> None:
        self._gpu, self._shape = gpu, (rows, width)
        self.rows: F32 = np.empty((0, width), np.float32)

    def __call__(self, rows: NDArray[np.intp], address: int) -> None:
        part = self._gpu.results(len(rows) * self._shape[1])
        self._gpu.download(address, part)
        if len(rows) == self._shape[0]:
            self.rows = part.reshape(self._shape)
            return
        if len(self.rows) != self._shape[0]:
            self.rows = np.empty(self._shape, np.float32)
        self.rows[rows] = part.reshape(len(rows), -1)


class UnfusedCudaBackend(CudaBackend):
    """The same operation by operation: every stage can be traced."""

    name = "cuda:unfused"
    fused = False
