"""The wgpu backend: a model's weights on a device, batches in, logits and traced stages out."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit import numerics
from isobit.backends.base import F32, I32, Batch, Tap
from isobit.backends.wgpu import driver, memory
from isobit.backends.wgpu.device import Device, Recording, Step, open_device
from isobit.backends.wgpu.graph import Graph, Shape
from isobit.backends.wgpu.load import DeviceWeights
from isobit.backends.wgpu.ops import CachePart, Ops
from isobit.config import EngineConfig
from isobit.errors import UsageError
from isobit.model.weights import Weights
from isobit.numerics import TILE, Weight

_ROPE_STEP = 4096  # positions whose RoPE tables are computed at once
_RECORDINGS = 16  # kept for passes of the same shape

Trace = Callable[[str, int | None, NDArray[np.generic]], None]


class WgpuBackend:
    """Runs a batch of any composition; every stage can be traced."""

    name = "wgpu"

    def __init__(
        self, weights: Weights, engine: EngineConfig, device: Device | None = None
    ) -> None:
        """Refuse a driver that is not exact and a model that exceeds a limit; load the weights.

        Raises BackendUnavailable with the reason. ``device`` is for tests: an open one, tested.
        """
        self._c = c = weights.config
        self._owned = device is None
        self._device = open_device() if device is None else device
        self.inexact: tuple[str, ...] = ()
        """Primitives in which the driver differs from the specification: none, unless allowed."""
        try:
            if device is None:
                self.inexact = driver.require_exact(
                    self._device, allow_inexact=engine.allow_inexact
                )
            self._plan = plan = memory.Plan.of(c, engine, self._device.binding_bytes)
            with self._device.guarded():
                self._b = {name: self._device.empty(n) for name, n in plan.buffers.items()}
                self._cache = [self._layer_cache() for _ in range(c.n_layers)]
                self._staging = self._device.staging(plan.buffers["logits"])
                self._graph = Graph(
                    c,
                    plan,
                    Ops(self._device, engine.activation_planes),
                    DeviceWeights(self._device, weights),
                    self._b,
                    self._cache,
                )
        except BaseException:
            self.close()
            raise
        self._embedding = weights.token_embd
        self._context = engine.context or c.context_length
        self._turns = _Turns(c.head_dim, c.rope_base)
        self._recordings: OrderedDict[tuple[Shape, int], Recording] = OrderedDict()
        self._generation = self._device.generation
        self._ahead: tuple[Shape, Any] | None = None

    @property
    def device(self) -> str:
        """The device in words; says so if it is not exact."""
        inexact = f", INEXACT: {', '.join(self.inexact)}" if self.inexact else ""
        return self._device.name + inexact

    def close(self) -> None:
        """Free the device's memory."""
        if self._owned:
            self._device.close()

    def forward(
        self, batch: Batch, tap: Tap | None = None, stages: frozenset[str] | None = None
    ) -> F32:
        """Run a batch; see :class:`isobit.backends.base.Backend`."""
        self._check(batch)
        logits = np.empty((len(batch.logit_rows), self._c.vocab), np.float32)
        traced: dict[tuple[str, int | None], list[NDArray[np.generic]]] = {}

        def collect(stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
            if stages is None or stage in stages:
                traced.setdefault((stage, layer), []).append(value)

        with self._device.guarded():
            for first in range(0, len(batch.tokens), self._plan.tokens):
                self._pass(batch, first, logits, collect if tap is not None else None)
        if tap is not None:
            for (stage, layer), parts in traced.items():
                tap(stage, layer, parts[0] if len(parts) == 1 else np.concatenate(parts))
            if stages is None or "lm_head" in stages:
                tap("lm_head", None, logits)
        return logits

    def _pass(self, batch: Batch, first: int, logits: F32, trace: Trace | None) -> None:
        """Run as many tokens from ``first`` on as the buffers hold."""
        last = min(first + self._plan.tokens, len(batch.tokens))
        wanted = np.flatnonzero((batch.logit_rows >= first) & (batch.logit_rows < last))
        positions = batch.positions[first:last]
        tiles = int(positions.max()) // TILE + 1
        if last - first == 1:
            # Up to a power of two, so that a recording lasts; what is too many ends at once.
            tiles = min(1 << (tiles - 1).bit_length(), -(-self._context // TILE))
        shape = Shape(last - first, len(wanted), tiles)
        self._upload(
            shape,
            batch.tokens[first:last],
            positions,
            batch.sequence[first:last],
            batch.pages,
            batch.logit_rows[wanted] - first,
        )
        if trace is not None:
            self._run_traced(shape, trace)
        at_once = self._plan.logit_rows
        for row in range(0, max(len(wanted), 1), at_once):
            count = min(at_once, len(wanted) - row)
            self._device.submit(self._command(shape, row, count, traced=trace is not None))
            size = 4 * count * self._c.vocab
            with self._device.fetching(self._staging, size) if count else nullcontext() as rows:
                if row == 0 and shape.tokens == 1 and trace is None:
                    # While the device works: the next token's pass is most likely the same.
                    self._ahead = shape, self._encode(shape, 0, count, traced=False)
                if rows is not None:
                    values = rows().view(np.float32).reshape(count, -1)
                    logits[wanted[row : row + count]] = values

    def _command(self, shape: Shape, row: int, count: int, *, traced: bool) -> Any:
        if self._ahead is not None and not traced and row == 0:
            (ahead, command), self._ahead = self._ahead, None
            if ahead == shape and self._generation == self._device.generation:
                return command
        return self._encode(shape, row, count, traced=traced)

    def _encode(self, shape: Shape, row: int, count: int, *, traced: bool) -> Any:
        """The pass (at the first row of logits, unless it has run traced) and some logits."""
        key = (shape, -1 if traced and row == 0 else row)
        if key not in self._recordings or self._generation != self._device.generation:
            steps: list[Step] = []
            if row == 0 and not traced:
                steps += [s for s in self._graph.steps(shape, traced=False) if isinstance(s, Step)]
            if count:
                steps += self._graph.logits(shape, row, count)
            recording = self._device.record(steps)
            if self._generation != self._device.generation:
                self._generation = self._device.generation
                self._recordings.clear()
            self._recordings[key] = recording
            if len(self._recordings) > _RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        copy = (self._b["logits"], 0, 4 * count * self._c.vocab, self._staging) if count else None
        return self._device.encode(self._recordings[key], copy)

    def _run_traced(self, shape: Shape, trace: Trace) -> None:
        steps: list[Step] = []
        for s in self._graph.steps(shape, traced=True):
            if isinstance(s, Step):
                steps.append(s)
                continue
            if steps:
                self._device.run(steps)
                steps = []
            trace(s.stage, s.layer, s.read(self._device))

    def _upload(
        self, shape: Shape, tokens: I32, positions: I32, sequence: I32, pages: I32, rows: I32
    ) -> None:
        """Put a pass's inputs where ops.BatchAt says they are."""
        page = pages[sequence, positions // TILE]
        table = np.zeros((len(pages), shape.tiles), np.int32)
        table[:, : pages.shape[1]] = pages[:, : shape.tiles]
        parts = (
            positions,
            page * TILE + positions % TILE,
            sequence * shape.tiles,
            rows,
            self._turns.of(positions).view(np.int32),
            table,
        )
        words = np.concatenate([p.reshape(-1) for p in parts]).astype(np.int32, copy=False)
        if words.nbytes > self._b["batch"].size:
            self._b["batch"] = self._device.empty(2 * words.nbytes)
            self._recordings.clear()
            self._ahead = None
        self._device.write(self._b["batch"], words)
        self._device.write(self._b["state_b"], self._embed(tokens))

    def _embed(self, tokens: I32) -> F32:
        """Rows of the embedding: float32 [T, hidden]."""
        w = self._embedding
        data = w.data.reshape(w.shape[0], w.row_bytes)[tokens]
        return Weight(w.name, w.format, (len(tokens), w.shape[1]), data.reshape(-1)).float32()

    def _layer_cache(self) -> list[CachePart]:
        """One layer's KV cache, divided by heads."""
        heads, at_once = self._c.n_kv_heads, self._plan.cache_heads
        parts = []
        for first in range(0, heads, at_once):
            n = min(at_once, heads - first)
            parts.append(CachePart(self._device.empty(n * self._plan.head_bytes), first, n))
        return parts

    def _check(self, batch: Batch) -> None:
        """Refuse indices that would leave their buffers."""
        for name, values, limit in (
            ("tokens", batch.tokens, self._c.vocab),
            ("positions", batch.positions, min(self._context, TILE * batch.pages.shape[1])),
            ("sequence", batch.sequence, len(batch.pages)),
            ("pages", batch.pages, self._plan.pages),
            ("logit_rows", batch.logit_rows, len(batch.tokens)),
        ):
            if values.dtype != np.int32:
                raise UsageError(f"batch {name}: expected int32, got {values.dtype}")
            if values.size and (int(values.min()) < 0 or int(values.max()) >= limit):
                raise UsageError(
                    f"batch {name}: expected 0 to {limit - 1}, got {values.min()} to {values.max()}"
                )
        if not len(batch.tokens) == len(batch.positions) == len(batch.sequence) > 0:
            raise UsageError(
                "batch: expected as many positions and sequences as tokens, at least 1"
            )


class _Turns:
    """RoPE's cosines and sines by position, computed once."""

    def __init__(self, head_dim: int, base: float) -> None:
        self._frequencies = numerics.inverse_frequencies(head_dim, base)
        self._table = np.empty((0, head_dim), np.float32)

    def of(self, positions: I32) -> F32:
        """Float32 [T, head_dim]: cosines, then sines."""
        while len(self._table) <= positions.max():
            start = len(self._table)
            more = numerics.rope_table(self._frequencies, start, start + _ROPE_STEP)
            self._table = np.concatenate([self._table, np.concatenate(more, axis=1)])
        return self._table[positions]
