"""A model's programs, lowered and their memory planned before anything is loaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from isobit.backends.base import Limits, Progress, unwatched
from isobit.backends.base.kv_pages import Headroom, fit_kv_cache
from isobit.backends.base.workspace import BATCH, TILES
from isobit.backends.cuda.device.memory import STAGING_BYTES, Plan
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.graph import Program
from isobit.backends.cuda.lowering import Lowering
from isobit.backends.cuda.resident import Resident, StoredWeights
from isobit.backends.cuda.sampler import DeviceSampler
from isobit.backends.cuda.steps.captured import ManySequences, OneSequence, SeveralRows, padded
from isobit.backends.cuda.steps.graph_cache import MAX_GRAPHS, Captures
from isobit.backends.cuda.steps.mixed import MixedPasses
from isobit.backends.cuda.steps.passes import LOGIT_ROWS_AT_ONCE, Passes
from isobit.backends.cuda.workspace import MIXED, PASS, ROWS, STEP, STEPS, Inboxes
from isobit.config import EngineConfig
from isobit.model.graph import Graph, Key
from isobit.model.weights import Weights
from isobit.numerics.ops import LOGIT_ROWS, TOKENS, Attention

_GRAPH_BYTES = 8 << 10
"""Of a captured graph, for each operation in it: about what an H200's driver takes."""
_MOST_WITH_STATES = 64
"""Sequences that take a step together in a model with recurrent states, where none is padded."""


@dataclass(frozen=True)
class CaptureSizes:
    """What is captured, besides steps of one sequence. No bit depends on it."""

    few: tuple[int, ...] = (2, 3, 4)
    """Numbers of rows whose steps have kernels of their own."""
    padded: tuple[int, ...] = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    """Numbers of rows that other steps, and small batches of any composition, are padded to."""

    def up_to(self, rows: int) -> tuple[int, ...]:
        """The padded sizes of at most so many rows."""
        return tuple(n for n in self.padded if n <= rows)


class Programs:
    """What runs a model: batches of any kind and, unless ``fused`` is off, captured steps."""

    def __init__(
        self,
        weights: Weights,
        engine: EngineConfig,
        gpu: Gpu,
        fused: bool = True,
        sizes: CaptureSizes = CaptureSizes(),
        stored: StoredWeights | None = None,
    ) -> None:
        """``stored``: the weights, if they are on their way. Raises BackendUnavailable for a format
        or an operation without a kernel."""
        graph = weights.graph
        self._gpu, self._states = gpu, graph.recurrent
        assert engine.context is not None
        self.context = engine.context
        self.resident = Resident.of(graph, engine.context, stored or StoredWeights.of(graph))

        def program(kind: str, rows: int = 1) -> Program:
            at = graph, self.resident, gpu, engine.planes, kind
            return Program(*at, fused=fused, rows=rows)

        self._logits = graph.logits.key
        made = program(PASS)
        # A repeated token would move its sequence's state on once more.
        padded_to = () if self._states else sizes.up_to(_most_rows(gpu, graph, made.g.tiles))
        together = min(engine.max_sequences, _MOST_WITH_STATES)
        if padded_to and together > 1:
            together = padded(min(engine.max_sequences, padded_to[-1]), padded_to)
        tokens = max(engine.chunk, together)
        self.passes = Passes(made, tokens)
        self._programs = [(made, tokens)]
        self.one: OneSequence | None = None
        self.many: ManySequences | None = None
        self.rows: dict[int, SeveralRows] = {}
        self.mixed: MixedPasses | None = None
        steps = fused and not made.g.received  # rows that come with a batch: one by one
        if steps:
            made = program(STEP)
            self.one = OneSequence(made)
            self._programs.append((made, 1))
        few = [rows for rows in sizes.few if rows <= engine.max_sequences]
        for rows in few if steps and made.g.whole_layers else ():
            made = program(ROWS, rows)
            if not made.g.whole_layers:  # too little shared memory; more rows need more
                break
            self.rows[rows] = SeveralRows(made, rows)
            self._programs.append((made, rows))
        most = 1
        while most + 1 in self.rows:
            most += 1
        if steps and together > most:
            made = program(STEPS)
            padded_steps = [n for n in padded_to if most < n <= together]
            self.many = ManySequences(made, together, padded_steps)
            self._programs.append((made, together))
        if steps and padded_to:
            made = program(MIXED)
            self.mixed = MixedPasses(made, padded_to)
            self._programs.append((made, padded_to[-1]))
        rows = max(_rows(made.g, n)[LOGIT_ROWS] for made, n in self._programs)
        self.sampler = DeviceSampler(gpu, rows, graph.logits.shape.width)
        self._given = _given_by_all(graph, [made for made, _ in self._programs])
        self._asked: dict[frozenset[str], frozenset[Key]] = {}
        silent = graph.on_request
        self.fused_away = frozenset(
            key for key in graph.stages if key not in self._given and key[0] not in silent
        )

    def plan(self, limits: Limits) -> Plan:
        """Bytes of the device's memory; buffers get what the limits ask for."""
        for passes in (self.passes, self.mixed):
            if passes is not None:
                passes.settle(limits.pages)
        graphs = {STEP: 2, STEPS: len(self.many.sizes) or self.many.most - 1 if self.many else 0}
        graphs |= {PASS: MAX_GRAPHS, ROWS: 2, MIXED: 2 * len(self.mixed.sizes) if self.mixed else 0}
        own = sum(made.g.nbytes(_rows(made.g, n), own=True) for made, n in self._programs)
        return Plan(
            weights=self.resident.weights.region.nbytes,
            cache=self.resident.cache_bytes(limits.pages),
            states=self.resident.state_bytes(limits.states),
            rope=self.resident.rope_bytes(),
            graphs=_GRAPH_BYTES
            * sum(made.makes * graphs.get(made.g.kind, 0) for made, _ in self._programs),
            workspace=STAGING_BYTES + own + self._shared + self.sampler.nbytes,
        )

    @property
    def _shared(self) -> int:
        """Bytes that all programs use in turns."""
        return max(made.g.nbytes(_rows(made.g, n), own=False) for made, n in self._programs)

    @property
    def exchanges(self) -> list[dict[str, Inboxes]]:
        """What each program gathers by, if the model is split."""
        return [made.g.exchanges for made, _ in self._programs]

    @property
    def lasting(self) -> int:
        """The most bytes of the stages that can be read at the end of a step."""
        return max(made.g.lasting[1] for made, _ in self._programs)

    def asked(self, stages: frozenset[str] | None) -> frozenset[Key]:
        """What a trace of these stages is given, besides the logits: of all, what every way to run
        has; of those that are named, what passes have."""
        if stages is None:
            return self._given - {self._logits}
        if stages not in self._asked:
            passes = self._programs[0][0].marks
            keys = frozenset(key for key in passes if key[0] in stages)
            self._asked[stages] = keys - {self._logits}
        return self._asked[stages]

    def prepare(self, step: Progress) -> tuple[int, int]:
        """Compile what passes of any kind launch, and capture what is captured; how many kernels
        there were to compile, and how many graphs there are. ``step``: done, of so many kernels."""
        captures = self.captures()
        compiled = self.load_kernels(captures, step)
        with self._gpu.rehearsal():
            self.passes.capture()
            if self.mixed is not None:
                self.passes.capture_no_more()
            for graphs in captures:
                for key in graphs.keys:
                    graphs[key]
        return compiled, sum(len(graphs.keys) for graphs in captures)

    def load_kernels(
        self, captures: Iterable[Captures[Any]] = (), step: Progress = unwatched
    ) -> int:
        """Have all that passes launch compiled, and what is not captured on the device; how many
        kernels there were to compile. ``captures``: of these, too."""
        compiled = self._gpu.compile(lambda: self.rehearse(captures), step)
        with self._gpu.rehearsal():
            self.rehearse(())
        return compiled

    def rehearse(self, captures: Iterable[Captures[Any]]) -> None:
        """Queue what passes of any kind launch; of those that are captured, these."""
        self.passes.rehearse()
        self.sampler.rehearse()
        self.passes.fill(self.sampler.found, np.zeros(1, np.int32))
        for graphs in captures:
            for key in graphs.keys:
                graphs.queue(key)()

    def captures(self) -> list[Captures[Any]]:
        """All that is captured."""
        steps = (self.one, self.many, *self.rows.values())
        found: list[Captures[Any]] = [each.graphs for each in steps if each is not None]
        return found + ([self.mixed.bodies, self.mixed.rows] if self.mixed else [])

    def load(self, limits: Limits) -> None:
        """Take the memory, and have the weights there."""
        self.resident.allocate(self._gpu, limits.pages, limits.states)
        shared = self._gpu.allocate(self._shared)
        for made, n in self._programs:
            made.g.allocate(_rows(made.g, n), shared)
        self.sampler.allocate()
        for steps in (self.many, *self.rows.values()):
            if steps is not None:
                steps.start()
        self.resident.weights.arrive(self._gpu)


def planned(weights: Weights, engine: EngineConfig, gpu: Gpu) -> Plan:
    """What a model takes of a device's memory. Raises BackendUnavailable as :class:`Programs`."""
    engine, _ = fit_kv_cache(weights, engine, lambda _: Headroom(inf, 1))  # whatever the device has
    return Programs(weights, engine, gpu).plan(Limits.of(weights, engine, keeps=True))


def headroom(programs: Programs, limits: Limits, free: int) -> Headroom:
    """What so much free memory of a device leaves to the KV cache."""
    plan = programs.plan(limits)
    return Headroom(plan.left(free), -(-plan.cache // limits.pages))


def _most_rows(gpu: Gpu, graph: Graph, tiles: int) -> int:
    """Rows of a padded batch whose attention over so many tiles of keys keeps its results in one
    part in 64 of the device's memory."""
    ops = (op for op in graph.required.ops if isinstance(op.operation, Attention))
    widest = max((op.outputs[0].shape.width for op in ops), default=1)
    return gpu.memory()[1] // 64 // (4 * widest * tiles)


def _rows(g: Lowering, tokens: int) -> dict[str, int]:
    """Rows of each kind that a program's slots have."""
    return {
        TOKENS: tokens,
        LOGIT_ROWS: tokens if g.every else min(tokens, LOGIT_ROWS_AT_ONCE),
        TILES: tokens * g.tiles,
        BATCH: 1,
    }


def _given_by_all(graph: Graph, programs: list[Program]) -> frozenset[Key]:
    """Stages that can be read whichever program runs."""
    return frozenset(graph.stages).intersection(*(made.marks for made in programs))
