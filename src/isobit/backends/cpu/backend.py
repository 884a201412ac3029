"""The CPU backend: hands a model's mapped tensors to the extension, which runs whole passes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isobit import numerics
from isobit.backends.base import F32, Backend, Batch, Tap
from isobit.backends.cpu import _cpu
from isobit.backends.cpu.lower import Lowering
from isobit.backends.hardware import processor
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, UsageError
from isobit.model.weights import Weights
from isobit.numerics import RopeTable

_TABLE_STEP = 1024


class CpuBackend(Backend):
    """Runs passes in C++ on all cores; the bits are the reference's.

    ``simd`` names a level (see :func:`simd_levels`) instead of the machine's best; for tests.
    ``exchange``: of one part of a split model, the memory that all parts share, this part's number,
    and how many there are; see :mod:`isobit.backends.parts`.
    """

    name = "cpu"
    on_host = True

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
            "planes": engine.activation_planes,
            "pages": self.limits.pages,
            "sequences": self.limits.states,
        }
        try:
            self._engine: _cpu.Engine | None = _cpu.Engine(
                program, self._simd, self._threads, exchange
            )
        except MemoryError:
            raise BackendUnavailable(
                f"KV cache: no room for {self.limits.pages} pages of {numerics.TILE} positions; "
                "ask for a smaller context"
            ) from None
        except RuntimeError as error:  # threads
            raise BackendUnavailable(f"cpu: {error}") from None
        self._stages = weights.graph.names
        self._vocab = weights.graph.logits.shape.width
        self._rope = [_RopeRows(table) for table in lowered.tables]

    @property
    def device(self) -> str:
        """Processor, SIMD level and threads."""
        return f"{processor()}, {self._simd}, {self._threads} threads"

    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """See :class:`isobit.backends.base.Backend`."""
        if self._engine is None:
            raise UsageError("forward: expected an open backend, got a closed one")
        wanted: Sequence[str] = ()
        if tap is not None:
            wanted = [s for s in self._stages if stages is None or s in stages]
        states = batch.states
        if states is None:
            states = np.arange(len(batch.pages), dtype=np.int32)
        logits = np.empty((len(batch.logit_rows), self._vocab), np.float32)
        whole = self._engine.forward(
            batch.tokens,
            batch.positions,
            batch.sequence,
            batch.pages,
            batch.logit_rows,
            states,
            batch.received,
            [rows.at(batch.positions) for rows in self._rope],
            logits,
            tap,
            wanted,
        )
        if not whole:
            raise BackendUnavailable("a part of the split model has ended; load the model again")
        return logits

    def close(self) -> None:
        """Free the KV cache and end the threads."""
        self._engine = None


class _RopeRows:
    """Cosines and sines by position, computed when a position is first used."""

    def __init__(self, table: RopeTable) -> None:
        self._table = table
        self._cos = self._sin = np.empty((0, table.size // 2), np.float32)

    def at(self, positions: np.ndarray[tuple[int], np.dtype[np.int32]]) -> tuple[F32, F32]:
        """Tables float32 [T, head_dim / 2] for positions int32 [T]."""
        start, last = len(self._cos), int(positions.max(initial=0))
        if last >= start:
            stop = (last // _TABLE_STEP + 1) * _TABLE_STEP
            cos, sin = self._table.rows(start, stop)
            self._cos = np.concatenate([self._cos, cos])
            self._sin = np.concatenate([self._sin, sin])
        return self._cos[positions], self._sin[positions]
