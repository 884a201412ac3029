"""A model over several machines: a pipeline of stages, each some layers on a backend of its own.

Who asks (:class:`PipelineBackend`) sends each batch to the first stage, what that gives to the
second, and so on; parts of a batch follow one another, so that all stages work at once. A stage is
anything that has :class:`Stage`'s methods: a backend in this process, another process or machine
(remote.py), an actor (on_ray.py). Stages may be of different backends: every cut has the bits of
the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isobit import numerics
from isobit.backends.base import F32, LOGITS, Backend, Batch, Results, Tap, Wanted, traced
from isobit.backends.base.batch import field_values
from isobit.backends.base.kv_pages import Headroom
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, CacheLost, UsageError
from isobit.model.graph import Key
from isobit.model.parallel.layers import layers
from isobit.model.weights import Weights

_LEAST = 32
"""Tokens of a part of a batch: fewer are not worth the weights that each part reads again."""
_LOSSES = 3
"""Times that a stage may be lost in turn before that is an error."""

TracedStages = dict[Key, NDArray[Any]]


@dataclass(frozen=True)
class StageInfo:
    """What a stage says of itself; all stages of a pipeline have to agree but for the layers."""

    first: int
    end: int
    layers: int
    """Of the whole model."""
    model: str
    """SHA-256 of the model's file."""
    numerics: int
    activation_bits: int
    positions: int
    pages: int
    states: int
    device: str
    fused_away: tuple[Key, ...] = ()
    """See :class:`isobit.backends.base.Backend`."""


class Stage(Protocol):
    """Some layers of a model on some device."""

    @property
    def about(self) -> StageInfo:
        """What it has."""

    def run(
        self, batch: Batch, wanted: Wanted, stages: frozenset[str] | None
    ) -> tuple[Results, TracedStages]:
        """Run a batch: what is wanted, which of all but the last stage are "logits", the rows for
        the next one; and the traced stages that are named. Raises BackendUnavailable if it cannot
        any more."""

    def close(self) -> None:
        """Nothing more will be asked."""


class LocalStage:
    """A stage in this process: a backend made of some layers."""

    def __init__(
        self,
        make: Callable[[Weights, EngineConfig], Backend],
        weights: Weights,
        engine: EngineConfig,
        cut: tuple[int, int],
    ) -> None:
        if weights.file is None:
            raise UsageError("stage: expected a model from a file, got one made in memory")
        part = Weights(weights.config, layers(weights.graph, *cut), weights.file)
        self._file = weights.file
        self._backend = make(part, engine)
        limits = self._backend.limits
        self.about = StageInfo(
            *cut,
            weights.graph.n_layers,
            weights.file.sha256(),
            numerics.VERSION,
            engine.activation_bits,
            limits.positions,
            limits.pages,
            engine.max_sequences,
            f"{self._backend.name} ({self._backend.device})",
            tuple(self._backend.fused_away),
        )

    def run(
        self, batch: Batch, wanted: Wanted, stages: frozenset[str] | None
    ) -> tuple[Results, TracedStages]:
        """See :class:`Stage`."""
        if self._backend.reads_file:
            self._file.check_unchanged()
        if not stages:
            return self._backend.run(batch, wanted), {}
        return traced(self._backend, batch, wanted, stages)

    def close(self) -> None:
        """See :class:`Stage`."""
        self._backend.close()


class PipelineBackend(Backend):
    """A model whose layers run in stages, one behind the other.

    Raises UsageError for stages that are not the whole model in order, or do not agree.
    """

    name = "pipeline"
    reads_file = True  # a stage may, and what is computed is told to be of this file

    def __init__(self, weights: Weights, engine: EngineConfig, stages: Sequence[Stage]) -> None:
        _agree([s.about for s in stages], weights, engine)
        least = [min(getattr(s.about, n) for s in stages) for n in ("positions", "pages", "states")]
        settled = replace(engine, context=least[0], pages=least[1])
        super().__init__(weights, settled, lambda _: Headroom(inf, 0))  # the stages have the memory
        if self.graph.recurrent:
            self.limits = self.limits._replace(states=least[2])
        self.fused_away = frozenset(key for s in stages for key in s.about.fused_away)
        self._stages = list(stages)
        self._workers = [ThreadPoolExecutor(1) for _ in stages]
        self._barren = 0  # losses since a pass that ended well

    @property
    def device(self) -> str:
        """Each stage's layers and device."""
        each = (f"{s.about.first}:{s.about.end} on {s.about.device}" for s in self._stages)
        return "layers " + ", ".join(each)

    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """See :class:`isobit.backends.base.Backend`."""
        logits = self.compute(batch, LOGITS, tap, stages).logits
        assert logits is not None
        return logits

    def compute(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        """What is wanted, made where the last stage runs."""
        if tap is not None and stages is None:
            stages = frozenset(self.graph.names) - self.graph.on_request
        count = 1 if tap is not None else min(2 * len(self._stages), len(batch.tokens) // _LEAST)
        bounds = np.linspace(0, len(batch.tokens), max(count, 1) + 1).astype(int).tolist()
        whole: dict[str, NDArray[Any]] = {}
        flows = []
        for a, b in pairwise(bounds):
            mine = np.flatnonzero((batch.logit_rows >= a) & (batch.logit_rows < b))
            of_mine, which = _of_rows(wanted, mine)
            flows.append((mine, which, self._flow(batch, a, b, mine, of_mine, stages)))
        for mine, which, flow in flows:
            try:
                results, shown = flow.result()
            except CacheLost as error:  # what is in flight behind it ends before the next pass
                self.losses, self._barren = self.losses + 1, self._barren + 1
                if self._barren > _LOSSES:
                    raise BackendUnavailable(f"{error}, {self._barren} times in turn") from None
                raise
            for name, value in field_values(results).items():
                if value is not None:
                    some, rows = mine, len(batch.logit_rows)
                    if name == "logits" and which is not None:
                        some, rows = which, np.size(wanted.logits)
                    whole.setdefault(name, np.empty((rows, *value.shape[1:]), value.dtype))
                    whole[name][some] = value
            if tap is not None:
                for (name, layer), value in shown.items():
                    tap(name, layer, value)
        self._barren = 0
        return Results(**whole)

    def close(self) -> None:
        """See :class:`isobit.backends.base.Backend`."""
        for worker in self._workers:
            worker.shutdown()
        for stage in self._stages:
            stage.close()

    def _flow(
        self,
        batch: Batch,
        first: int,
        end: int,
        rows: NDArray[np.intp],
        wanted: Wanted,
        stages: frozenset[str] | None,
    ) -> Future[tuple[Results, TracedStages]]:
        """Some tokens of a batch through all stages; each stage's worker takes them in turn."""
        part = replace(
            batch,
            tokens=batch.tokens[first:end],
            positions=batch.positions[first:end],
            sequence=batch.sequence[first:end],
            logit_rows=batch.logit_rows[rows] - np.int32(first),
        )
        every = np.arange(end - first, dtype=np.int32)
        flow: Future[tuple[Results, TracedStages]] | None = None
        for i, (stage, worker) in enumerate(zip(self._stages, self._workers, strict=True)):
            if i == len(self._stages) - 1:
                flow = worker.submit(_step, stage, part, wanted, stages, flow)
            else:
                now = replace(part, logit_rows=every)
                flow = worker.submit(_step, stage, now, LOGITS, stages, flow)
        assert flow is not None
        return flow


def _step(
    stage: Stage,
    batch: Batch,
    wanted: Wanted,
    stages: frozenset[str] | None,
    before: Future[tuple[Results, TracedStages]] | None,
) -> tuple[Results, TracedStages]:
    shown: TracedStages = {}
    if before is not None:
        rows, shown = before.result()
        batch = replace(batch, received=rows.logits)
    results, here = stage.run(batch, wanted, stages)
    return results, shown | here


def _of_rows(wanted: Wanted, rows: NDArray[np.intp]) -> tuple[Wanted, NDArray[np.intp] | None]:
    """What is wanted of some rows, and which of the logits these are if they are wanted of some."""
    given = None if wanted.given is None else wanted.given[rows]
    wanted = replace(wanted, given=given, routes=False)  # the caller takes these from their stages
    if isinstance(wanted.logits, bool):
        return wanted, None
    which = np.flatnonzero(np.isin(wanted.logits, rows))
    places = np.searchsorted(rows, wanted.logits[which]).astype(np.int32)
    return replace(wanted, logits=places), which


def _agree(stages: Sequence[StageInfo], weights: Weights, engine: EngineConfig) -> None:
    n, at = weights.graph.n_layers, 0
    expected: dict[str, object] = {
        "numerics": numerics.VERSION,
        "activation_bits": engine.activation_bits,
    }
    if weights.file is not None:
        expected["model"] = weights.file.sha256()
    for s in stages:
        if s.first != at or s.layers != n:
            raise UsageError(
                f"stages: expected layers from {at} of {n} on, got {s.first}:{s.end} of {s.layers} "
                f"({s.device})"
            )
        at = s.end
        for what, value in expected.items():
            if getattr(s, what) != value:
                raise UsageError(
                    f"stages: {what}: expected {value}, got {getattr(s, what)} ({s.device})"
                )
    if at != n:
        raise UsageError(f"stages: expected layers up to {n}, got them up to {at}")
