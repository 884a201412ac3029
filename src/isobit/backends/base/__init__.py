"""What a backend is: a model's weights made ready on a device, and passes over batches.

A backend is created by ``open_backend(name, ...)`` in :mod:`isobit.backends` and passed around;
there is no global one. Which sequence has which pages is decided above (:mod:`isobit.runtime`); a
backend only owns the memory of its pages.

A new one has to say what it is called and runs on, and to give logits, in
:meth:`Backend.compute_logits`; what a device can make of them before they leave it, and the rows
that they are made of, go into :meth:`Backend.compute`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from math import inf
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isobit import machine
from isobit.arrays import F32, I32
from isobit.backends.base.batch import (
    ARGMAX,
    CHOSEN,
    HIDDEN,
    LOGITS,
    Batch,
    Following,
    Limits,
    Memory,
    Results,
    Routes,
    Tap,
    Wanted,
    by_sequence,
    check_wanted,
)
from isobit.backends.base.kv_pages import Headroom, fit_kv_cache, host_headroom
from isobit.backends.cpu._cpu import check_batch
from isobit.backends.cpu.sampler import NOT_FINITE, RowSampler
from isobit.backends.hardware import read_bandwidth
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, UsageError
from isobit.model.graph import Graph, Key
from isobit.model.weights import Weights
from isobit.numerics import KV_PAGE
from isobit.numerics.ops import Receive

__all__ = [
    "ARGMAX",
    "CHOSEN",
    "F32",
    "GREEDY",
    "HIDDEN",
    "I32",
    "LOGITS",
    "ROUTES",
    "Backend",
    "Batch",
    "Following",
    "Limits",
    "Memory",
    "Progress",
    "Results",
    "Routes",
    "Tap",
    "Wanted",
    "by_sequence",
    "traced",
    "unwatched",
]

Progress = Callable[[int, int], None]
"""Is told how far something is: done, of so many."""


def unwatched(done: int, total: int) -> None:
    """Nobody wants to know."""


GREEDY, ROUTES = "greedy", "routes"
"""What a device may make by itself (``Backend.on_device``)."""


def host_memory() -> Memory | None:
    """The host's; None where the system does not tell."""
    if inf in (free := machine.free_memory(), total := machine.total_memory()):
        return None
    return Memory(int(free), int(total))


class Backend(ABC):
    """A model on a device. May be used by one thread at a time."""

    name: ClassVar[str]
    on_host: ClassVar[bool] = False
    """Whether it computes in the host's memory."""
    yardstick: ClassVar[bool] = False
    """Whether the bits of others are held against its, on the same machine."""
    reads_file: ClassVar[bool] = False
    """Whether a pass reads weights where the model's file is mapped."""
    survives_fork: ClassVar[bool] = False
    """Whether the child of a fork may go on with it; else it is refused there."""
    on_device: ClassVar[frozenset[str]] = frozenset()
    """What it makes without bringing logits (GREEDY) or stages (ROUTES) to the host; else that is
    made of them there, which costs more and has the same bits."""
    losses: int = 0
    """How often what was in its KV cache has gone; CacheLost said so each time."""
    lost: str | None = None
    """Why it gives nothing any more until the model is loaded again, as a device has failed."""
    fused_away: frozenset[Key] = frozenset()
    """Stages that lie inside of what one launch does, in prompts or in steps of decoding: no tap
    gets them, unless they are asked for by name and a way to run has them."""
    goes_ahead: ClassVar[bool] = False
    """Whether it heeds ``Wanted.following``."""
    padded: Sequence[int] = ()
    """Ascending numbers of tokens that passes are padded to, up to the last."""
    copies_states: ClassVar[bool] = False
    """Whether recurrent states can be kept, for texts that go on from there."""
    inexact: tuple[str, ...] = ()
    """Primitives in which the device differs from the specification: none, unless allowed."""
    engine: EngineConfig
    """The caller's settings, context and pages settled."""
    settled: str | None
    """A line that says so if they are less than was asked for, and why."""
    no_routes: Routes
    """The experts of no tokens: [0, layers, experts used]."""

    def __init__(
        self,
        weights: Weights,
        engine: EngineConfig,
        headroom: Callable[[EngineConfig], Headroom] | None = None,
    ) -> None:
        """Settle how many pages there are (kv_pages.py); without ``headroom``, what the host has.

        Raises BackendUnavailable if what the caller named does not fit.
        """
        self.graph: Graph = weights.graph
        self._process = os.getpid()
        self.engine, self.settled = fit_kv_cache(
            weights, engine, headroom or (lambda settings: host_headroom(weights, settings))
        )
        self.limits = Limits.of(weights, self.engine, keeps=self.copies_states)
        self.no_routes = _no_routes(self.graph)
        widths = (op.operation.width for op in self.graph.ops if isinstance(op.operation, Receive))
        self._receives = next(widths, None)

    @property
    @abstractmethod
    def device(self) -> str:
        """The device in words, e.g. a processor's name and the SIMD level in use."""

    @property
    def driver(self) -> str | None:
        """The version of the device's driver, where it is known and not part of the device's
        name."""
        return None

    @cached_property
    def rows(self) -> RowSampler:
        """Works on rows of logits in the host's memory."""
        return RowSampler(threads=self.engine.cores)

    def copy_state(self, source: int, target: int) -> None:
        """Copy a recurrent state to another's place; both are below the limit.

        Of a backend that says it ``copies_states``.
        """
        raise NotImplementedError

    def prepare(self, step: Progress = unwatched) -> str:  # noqa: ARG002
        """Make ready what the first pass of a kind would have to wait for, whatever comes: a server
        does before it answers. Says what was made, "" if nothing had to be; ``step`` is told how
        far it is: done, of so many.
        """
        return ""

    def memory(self) -> Memory | None:
        """Of the device; None where nobody says."""
        return host_memory() if self.on_host else None

    def read_bandwidth(self) -> float | None:
        """Bytes a second that the device reads from its memory; None where it is not known."""
        return read_bandwidth(self.engine.cores) if self.on_host else None

    def run(
        self,
        batch: Batch,
        wanted: Wanted = LOGITS,
        tap: Tap | None = None,
        stages: frozenset[str] | None = None,
    ) -> Results:
        """Run a batch, append its keys and values to their pages, and give what is wanted.

        ``tap`` receives the stages named in ``stages`` (all but those ``ON_REQUEST``, if None); it
        changes no bit. A backend may leave out stages that are ON_REQUEST or ``fused_away``, and no
        others.

        Raises UsageError for a batch or ids that are not what they should be, and then nothing ran.
        """
        self._check(batch)
        if wanted is not LOGITS and wanted is not ARGMAX:
            check_wanted(wanted, len(batch.logit_rows), self.graph.logits.shape.width)
        if wanted.drawn is None or self.draws(wanted):
            return self._computed(batch, wanted, tap, stages)
        draws, logits, rows = wanted.drawn, wanted.logits, wanted.drawn.rows
        places: NDArray[np.integer] = rows
        if logits is not True:
            mine = rows[:0] if logits is False else logits
            union = np.union1d(mine, rows)
            places = np.searchsorted(union, rows)
            wanted = replace(wanted, logits=len(union) == len(batch.logit_rows) or union)
        results = self._computed(batch, replace(wanted, drawn=None), tap, stages)
        assert results.logits is not None
        all_in_order = np.array_equal(places, np.arange(len(results.logits)))
        of_draws = results.logits if all_in_order else results.logits[places]
        drawn, logprobs = draws.choose(self.rows, of_draws)
        kept: F32 | None = results.logits
        if logits is not True:
            kept = None if logits is False else results.logits[np.searchsorted(union, logits)]
        return replace(results, logits=kept, drawn=drawn, drawn_logprobs=logprobs)

    def forward(
        self, batch: Batch, tap: Tap | None = None, stages: frozenset[str] | None = None
    ) -> F32:
        """:meth:`run` for the logits alone: float32 [R, vocabulary]."""
        logits = self.run(batch, LOGITS, tap, stages).logits
        assert logits is not None
        return logits

    def greedy(
        self, tokens: I32, positions: I32, pages: I32, count: int, states: I32 | None = None
    ) -> I32:
        """Append a token to each sequence and then its most likely next, ``count`` tokens in all.

        tokens, positions: int32 [n]; pages: int32 [n, P], for positions up to position + count - 1;
        states: see :class:`Batch`. Returns the most likely token after each, int32 [count, n], the
        lowest id among equals; -1 from the step on whose logits are not finite. Raises UsageError
        for what :meth:`run` refuses, and for steps beyond the context or the pages.
        """
        each = np.arange(len(tokens), dtype=np.int32)
        self._check(Batch(tokens, positions, each, pages, each[:0], states))
        positions_left = min(self.limits.positions, KV_PAGE * pages.shape[1]) - int(positions.max())
        if not 1 <= count <= positions_left:
            raise UsageError(f"greedy: expected 1 to {positions_left} tokens, got {count}")
        return self.compute_greedy(tokens, positions, pages, count, states)

    @abstractmethod
    def close(self) -> None:
        """Free the device's memory; the backend cannot be used afterwards."""

    # For backends

    @abstractmethod
    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """Run a checked batch; logits [R, vocabulary] in the host's memory."""

    def draws(self, wanted: Wanted) -> bool:  # noqa: ARG002
        """Whether :meth:`compute` gives ``drawn``, too; else it is drawn from logits."""
        return False

    def compute_greedy(
        self, tokens: I32, positions: I32, pages: I32, count: int, states: I32 | None
    ) -> I32:
        """:meth:`greedy`, its arguments checked; here, pass by pass."""
        out = np.full((count, len(tokens)), NOT_FINITE, np.int32)
        going = np.arange(len(tokens), dtype=np.int32)
        for step in range(count):
            batch = Batch(
                tokens=tokens[going] if step == 0 else out[step - 1, going],
                positions=positions[going] + np.int32(step),
                sequence=going,
                pages=pages,
                logit_rows=np.arange(len(going), dtype=np.int32),
                states=states,
            )
            found = self.run(batch, ARGMAX).argmax
            assert found is not None
            out[step, going] = found
            going = going[found >= 0]
            if not len(going):
                break
        return out

    def compute(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        """Run a checked batch for all that is wanted but ``routes`` and ``drawn``, unless it says
        that it makes them; here, by way of the logits."""
        if wanted.hidden:
            raise BackendUnavailable(f"hidden rows: {self.name} gives logits alone")
        return self._measured(self.compute_logits(batch, tap, stages), wanted)

    def _measured(self, logits: F32 | None, wanted: Wanted, hidden: F32 | None = None) -> Results:
        """What is wanted, of logits [R, vocabulary] in the host's memory; beside ``hidden`` rows,
        or of these alone."""
        if logits is None:
            assert hidden is not None
            return Results(np.array(np.isfinite(hidden).all(axis=1)), hidden=hidden)
        ids = np.empty((len(logits), 0), np.int32) if wanted.given is None else wanted.given
        argmax, given, top_ids, top = self.rows.measure(logits, ids, wanted.top)
        drawn = logprobs = None
        if wanted.drawn is not None:
            drawn, logprobs = wanted.drawn.choose(self.rows, logits[wanted.drawn.rows])
        kept: F32 | None = logits
        if not isinstance(wanted.logits, bool):
            kept = logits[wanted.logits]
        elif not wanted.logits:
            kept = None
        return Results(
            argmax != NOT_FINITE,
            kept,
            argmax if wanted.argmax else None,
            top_ids if wanted.top else None,
            top if wanted.top else None,
            None if wanted.given is None else given,
            drawn=drawn,
            drawn_logprobs=logprobs,
            hidden=hidden,
            digests=self.rows.digests(logits) if wanted.digests else None,
        )

    def _computed(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        if wanted.hidden and self.graph.hidden is None:
            raise BackendUnavailable("hidden rows: expected a model that has them, got none")
        if wanted.routes and ROUTES not in self.on_device:
            return self._with_routes(batch, wanted, tap, stages)
        return self.compute(batch, wanted, tap, stages)

    def _with_routes(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        """A pass with the experts taken from their stages."""
        routes: list[Routes] = []

        def keep(name: str, layer: int | None, value: NDArray[np.generic]) -> None:
            if name == CHOSEN:
                routes.append(value.astype(self.no_routes.dtype))
            if tap is not None and (stages is None or name in stages):
                tap(name, layer, value)

        asked: frozenset[str] | None = frozenset({CHOSEN})
        if tap is not None:
            asked = None if stages is None else stages | {CHOSEN}
        results = self.compute(batch, wanted, keep, asked)
        shape = len(batch.tokens), *self.no_routes.shape[1:]
        found = np.stack(routes, axis=1) if routes else np.empty(shape, self.no_routes.dtype)
        return replace(results, routes=found)

    def _check(self, batch: Batch) -> None:
        """Raises UsageError for indices that would leave their memory, BackendUnavailable after a
        fork that the backend does not survive."""
        if not self.survives_fork and os.getpid() != self._process:
            raise BackendUnavailable(
                f"{self.name}: the model was loaded before this process was forked; load it again"
            )
        check_batch(
            batch.tokens,
            batch.positions,
            batch.sequence,
            batch.pages,
            batch.logit_rows,
            batch.states,
            self.limits,
        )
        if batch.received is None and self._receives is None:
            return
        expected = self._receives and (len(batch.tokens), self._receives)
        x = batch.received
        got = None if x is None else x.shape
        if got != expected or (
            x is not None and (x.dtype != np.float32 or not x.flags.c_contiguous)
        ):
            raise UsageError(f"batch received: expected float32 {expected}, got {got}")


def _no_routes(graph: Graph) -> Routes:
    chosen = [op for op in graph.ops for v in op.outputs if v.name == CHOSEN]
    used = chosen[0].outputs[-1].shape.width if chosen else 0
    few = not chosen or chosen[0].inputs[0].shape.width <= 256
    return np.empty((0, len(chosen), used), np.uint8 if few else np.int16)


def traced(
    backend: "Backend", batch: Batch, wanted: Wanted, stages: frozenset[str] | None
) -> tuple[Results, dict[Key, NDArray[np.generic]]]:
    """A pass's results, and copies of its stages."""
    shown: dict[Key, NDArray[np.generic]] = {}

    def tap(name: str, layer: int | None, value: NDArray[np.generic]) -> None:
        shown[name, layer] = np.array(value)

    return backend.run(batch, wanted, tap, stages), shown
