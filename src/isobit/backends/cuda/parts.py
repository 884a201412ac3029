"""A model split over several GPUs of one machine, which write to one another's memory in a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from isobit.backends.base import (
    F32,
    GREEDY,
    I32,
    LOGITS,
    Backend,
    Batch,
    Limits,
    Memory,
    Results,
    Tap,
    Wanted,
    traced,
)
from isobit.backends.cuda.backend import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu, Gpu
from isobit.backends.cuda.programs import Programs, room
from isobit.backends.pool import Room
from isobit.config import EngineConfig
from isobit.model.split import split
from isobit.model.weights import Weights

T = TypeVar("T")


class CudaPartsBackend(Backend):
    """The CUDA backend on ``engine.parts`` GPUs. The bits are those of one."""

    name = "cuda"
    on_device = frozenset({GREEDY})

    def __init__(
        self, weights: Weights, engine: EngineConfig, gpus: Sequence[Gpu] | None = None
    ) -> None:
        """Raises BackendUnavailable with the reason. ``gpus`` is for tests."""
        ranks = range(engine.parts)
        devices = [CudaGpu(r) for r in ranks] if gpus is None else gpus
        self._parts = [split(weights.graph, r, engine.parts) for r in ranks]
        mine = [Weights(weights.config, p.graph, weights.file) for p in self._parts]

        def least(settings: EngineConfig) -> Room:
            rooms = [
                room(Programs(w, settings, g), Limits.of(w, settings), g)
                for w, g in zip(mine, devices, strict=True)
            ]
            return min(rooms, key=lambda r: r.free / max(r.page, 1))

        super().__init__(weights, engine, least)
        self._pool = ThreadPoolExecutor(engine.parts)
        pairs = zip(mine, devices, strict=True)
        self._here = self._each([partial(CudaBackend, w, self.engine, gpu) for w, gpu in pairs])
        self._introduce(devices)
        self.plan = self._here[0].plan
        self.fused_away = self._here[0].fused_away

    @property
    def device(self) -> str:
        """The devices in words."""
        return f"{len(self._here)} x {self._here[0].device}"

    def memory(self) -> Memory:
        """Of the device that has least free."""
        return min((b.memory() for b in self._here), key=lambda m: m.free)

    def read_bandwidth(self) -> float | None:
        """Of all devices together."""
        one = self._here[0].read_bandwidth()
        return None if one is None else one * len(self._here)

    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """See :class:`isobit.backends.base.Backend`."""
        logits = self.compute(batch, LOGITS, tap, stages).logits
        assert logits is not None
        return logits

    def compute(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        """See :class:`isobit.backends.base.Backend`: every device ends with whole results."""
        if tap is None:
            work = [partial(b.compute, batch, wanted, None, None) for b in self._here]
            return self._each(work)[0]
        plain = replace(wanted, hidden=False)  # the caller takes these from their stage
        done = self._each([partial(traced, b, batch, plain, stages) for b in self._here])
        for key in done[0][1]:
            tap(*key, self._parts[0].merged(key, [shown[key] for _, shown in done]))
        return done[0][0]

    def compute_greedy(
        self, tokens: I32, positions: I32, pages: I32, count: int, states: I32 | None
    ) -> I32:
        """See :class:`isobit.backends.base.Backend`."""
        asked = tokens, positions, pages, count, states
        return self._each([partial(b.compute_greedy, *asked) for b in self._here])[0]

    def close(self) -> None:
        """Free the devices' memory."""
        self._each([b.close for b in self._here])
        self._pool.shutdown()

    def _each(self, work: Sequence[Callable[[], T]]) -> list[T]:
        """Every device's work, at the same time: each waits for the others within it."""
        return [f.result() for f in [self._pool.submit(w) for w in work]]

    def _introduce(self, gpus: Sequence[Gpu]) -> None:
        """Tell every device where the others' inboxes are."""
        for gpu in gpus:
            gpu.reach([other for other in gpus if other is not gpu])
        every = [inboxes(b) for b in self._here]
        for b, gpu in zip(self._here, gpus, strict=True):
            tell(b, gpu, every)


Addresses = list[dict[str, tuple[int, int]]]
"""Of each program by the rows of gathered values: where the two inboxes are."""


def inboxes(backend: CudaBackend) -> Addresses:
    """Where others reach a part."""
    return [
        {rows: (i.own[0].address, i.own[1].address) for rows, i in exchange.items()}
        for exchange in backend.exchanges
    ]


def tell(backend: CudaBackend, gpu: Gpu, every: Sequence[Addresses]) -> None:
    """Let a part know where all parts are reached."""
    gpu.activate()
    for program, exchange in enumerate(backend.exchanges):
        for rows, own in exchange.items():
            pairs = [addresses[program][rows] for addresses in every]
            gpu.upload(own.table.address, np.array(pairs, np.int64).T)
