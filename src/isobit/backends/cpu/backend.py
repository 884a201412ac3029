"""The CPU backend: hands a model's mapped tensors to the extension, which runs whole passes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from isobit import numerics
from isobit.backends.base import F32, LOGITS, ROUTES, Backend, Batch, Results, Tap, Wanted
from isobit.backends.base.rope_rows import RopeRows
from isobit.backends.cpu import _cpu, shown_level
from isobit.backends.cpu.lowering import Lowering
from isobit.backends.hardware import processor
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, UsageError
from isobit.model.weights import Weights

_CACHED = 64 << 20
"""Bytes of weights that a processor's caches hold, about."""
_LANE_TOKENS = 16
"""Tokens that make it worth while to read them for one thread alone: lanes.cpp."""
_BROKEN, _MORE_ROPE = 1, 2
"""What the extension says of how a pass ended; 0 is well."""


class CpuBackend(Backend):
    """Runs passes in C++ on all cores; the bits are the reference's.

    ``simd`` names a level (see :func:`simd_levels`) instead of the machine's best; for tests.
    ``exchange``: of one part of a split model, the memory that all parts share, this part's number,
    and how many there are; see :mod:`isobit.backends.distributed.parts`.
    """

    name = "cpu"
    on_host = yardstick = reads_file = survives_fork = True
    copies_states = True
    on_device = frozenset({ROUTES})

    def __init__(
        self,
        weights: Weights,
        engine: EngineConfig,
        *,
        simd: str | None = None,
        exchange: tuple[NDArray[np.uint8], int, int] | None = None,
    ) -> None:
        super().__init__(weights, engine)
        levels = _cpu.simd_levels()
        if simd is not None and simd not in levels:
            raise BackendUnavailable(f"simd: expected one of {', '.join(levels)}, got {simd}")
        self._simd = simd or levels[0]
        self._threads = engine.cores
        lowered = Lowering(weights.graph)
        program = lowered.program() | {
            "planes": engine.planes,
            "pages": self.limits.pages,
            "sequences": self.limits.states,
            "lane_tokens": _LANE_TOKENS if _weights_bytes(weights) <= _CACHED else 0,
        }
        try:
            self._engine: _cpu.Engine | None = _cpu.Engine(
                program, self._simd, self._threads, exchange
            )
        except MemoryError:
            raise BackendUnavailable(
                f"KV cache: no room for {self.limits.pages} pages of {numerics.KV_PAGE} positions; "
                "ask for a smaller context"
            ) from None
        except RuntimeError as error:  # threads
            raise BackendUnavailable(f"cpu: {error}") from None
        self._stages = weights.graph.names
        self._vocab = weights.graph.logits.shape.width
        self._width = weights.graph.hidden.shape.width if weights.graph.hidden else 0
        self._rope = [RopeRows(table) for table in lowered.tables]
        self._extend_rope(-1)

    @property
    def device(self) -> str:
        """Processor, SIMD level and threads."""
        return f"{processor()}, {shown_level(self._simd)}, {self._threads} threads"

    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """See :class:`isobit.backends.base.Backend`."""
        logits = self._run(batch, LOGITS, tap, stages).logits
        assert logits is not None
        return logits

    def compute(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        """What is wanted, made some rows at a time where not all logits are handed out."""
        if tap is None or wanted is LOGITS:
            return self._run(batch, wanted, tap, stages)
        # The tap may want to see all logits.
        seen = replace(LOGITS, routes=wanted.routes, hidden=wanted.hidden)
        found = self._run(batch, seen, tap, stages)
        return replace(self._measured(found.logits, wanted, found.hidden), routes=found.routes)

    def _run(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        rows, given, k = len(batch.logit_rows), wanted.given, min(wanted.top, self._vocab)
        argmax, finite = np.empty(rows, np.int32), np.empty(rows, np.bool_)
        logits = places = routes = None
        if wanted.logits is True:
            logits = np.empty((rows, self._vocab), np.float32)
        elif wanted.logits is not False:
            logits = np.empty((len(wanted.logits), self._vocab), np.float32)
            places = np.full(rows, -1, np.int32)
            places[wanted.logits] = np.arange(len(logits))
        values = None if given is None else np.empty(given.shape, np.float32)
        top_ids = np.empty((rows, k), np.int32) if k else None
        top = np.empty((rows, k), np.float32) if k else None
        digests = np.empty((rows, 32), np.uint8) if wanted.digests else None
        hidden = np.empty((rows, self._width), np.float32) if wanted.hidden else None
        if wanted.routes:
            none = self.no_routes
            routes = np.empty((len(batch.tokens), *none.shape[1:]), none.dtype)
        shown: Sequence[str] = ()
        if tap is not None:
            shown = [s for s in self._stages if stages is None or s in stages]
        while True:
            if self._engine is None:
                raise UsageError("forward: expected an open backend, got a closed one")
            ended = self._engine.forward(
                batch.tokens,
                batch.positions,
                batch.sequence,
                batch.pages,
                batch.logit_rows,
                batch.states,
                batch.received,
                logits,
                places,
                argmax,
                finite,
                given,
                values,
                top_ids,
                top,
                digests,
                None if routes is None else routes[..., None].view(np.uint8),
                hidden,
                wanted.only_hidden,
                tap,
                shown,
            )
            if ended != _MORE_ROPE:
                break
            self._extend_rope(int(batch.positions.max()))
        if ended == _BROKEN:
            raise BackendUnavailable("a part of the split model has ended; load the model again")
        if places is not None and logits is not None and len(logits) > 1:
            logits = logits[places[wanted.logits]]  # a row can be wanted twice
        if wanted.only_hidden:
            return replace(self._measured(None, wanted, hidden), routes=routes)
        return Results(
            finite,
            logits,
            argmax if wanted.argmax else None,
            top_ids,
            top,
            values,
            hidden=hidden,
            digests=digests,
            routes=routes,
        )

    def _extend_rope(self, last: int) -> None:
        """Have tables up to a position, and beyond it."""
        assert self._engine is not None
        self._engine.set_rope([rows.upto(last) for rows in self._rope])

    def copy_state(self, source: int, target: int) -> None:
        """See :class:`isobit.backends.base.Backend`."""
        if self._engine is not None:
            self._engine.copy_state(source, target)

    def close(self) -> None:
        """Free the KV cache and end the threads."""
        self._engine = None


def _weights_bytes(weights: Weights) -> int:
    return sum(weight.data.nbytes for weight in weights.graph.weights.values())
