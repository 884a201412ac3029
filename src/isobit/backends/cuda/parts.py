"""A model split over several GPUs of one machine, which write to one another's memory in a pass.

Kernels of a device wait for what others send. So all parts run at the same time, each in a thread;
what might make the driver wait for a device (to compile and load a kernel, to capture a graph)
comes before, in a rehearsal; and a pass that cannot end, as a device has failed, is given up: by
the host, or by the kernels when they have waited for long. The parts are out of step then, and the
model has to be loaded again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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
    Progress,
    Results,
    Tap,
    Wanted,
    traced,
    unwatched,
)
from isobit.backends.base.batch import field_values
from isobit.backends.base.kv_pages import Headroom
from isobit.backends.cuda.backend import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.device.protocol import Gpu
from isobit.backends.cuda.steps.programs import Programs, headroom
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.model.parallel.split import split
from isobit.model.weights import Weights

T = TypeVar("T")

_WAIT_MS = 20_000
"""So long a device waits for words of another."""
_NUMBERS = 1 << 31
"""Of exchanges, none of which comes twice while a word with it may lie in an inbox."""


class CudaPartsBackend(Backend):
    """The CUDA backend on ``engine.parts`` GPUs. The bits are those of one."""

    name = "cuda"
    on_device = frozenset({GREEDY})

    def __init__(
        self, weights: Weights, engine: EngineConfig, gpus: Sequence[Gpu] | None = None
    ) -> None:
        """Raises BackendUnavailable with the reason. ``gpus``: others than the first of the
        machine; one may be there twice."""
        ranks = range(engine.parts)
        self._gpus = [CudaGpu(r) for r in ranks] if gpus is None else gpus
        self._pool = ThreadPoolExecutor(engine.parts)
        self._here: list[CudaBackend] = []
        self._times: Counter[tuple[int, tuple[object, ...]]] = Counter()
        try:
            for gpu in self._gpus:
                gpu.reach([other for other in self._gpus if other is not gpu])
            cut = partial(split, expert_shares=engine.expert_shares, shares=engine.shares)
            self._parts = [cut(weights.graph, r, engine.parts) for r in ranks]
            mine = [Weights(weights.config, p.graph, weights.file) for p in self._parts]

            def least(settings: EngineConfig) -> Headroom:
                pairs = zip(mine, self._gpus, strict=True)
                found = self._each([partial(_headroom, w, settings, gpu) for w, gpu in pairs])
                return min(found, key=lambda r: r.free / max(r.page, 1))

            super().__init__(weights, engine, least)
            pairs = zip(mine, self._gpus, strict=True)
            self._here = self._each([partial(_opened, w, self.engine, gpu) for w, gpu in pairs])
            self._flags = self._gpus[0].page_locked(8).view(np.int32)
            """What a pass was given up for (0: it was not), and how long to wait: exchange.cuh."""
            self._flags[:] = 0, _WAIT_MS
            every = [inboxes(b) for b in self._here]
            for rank, (b, gpu) in enumerate(self._pairs()):
                tell(b, gpu, rank, every, self._flags.ctypes.data)
            sites = [i.sites for e in self._here[0].exchanges for i in e.values()]
            self._passes, self._renewed_after = 0, _NUMBERS // max(sites)
            for b in self._here:  # one finds what the one before it compiled
                self._each([b.load_kernels])
        except BaseException:
            self.close()
            raise
        self.plan = self._here[0].plan
        self.plans = [b.plan for b in self._here]
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
        size, kind = len(batch.tokens), (len(batch.pages), len(batch.logit_rows), _form(wanted))
        if tap is None:
            work = [partial(b.compute, batch, wanted, None, None) for b in self._here]
            return self._together(work, size, kind)[0]
        part = self._parts[0]
        named = None if stages is None else stages | part.beside(stages)
        shows = [partial(traced, b, batch, wanted, named) for b in self._here]
        done = self._together(shows, size, (*kind, named))
        results, here = done[0]
        for key in here:
            if stages is None or key[0] in stages:
                tap(*key, part.merged(key, [shown[key] for _, shown in done], here))
        return results

    def compute_greedy(
        self, tokens: I32, positions: I32, pages: I32, count: int, states: I32 | None
    ) -> I32:
        """See :class:`isobit.backends.base.Backend`."""
        asked = tokens, positions, pages, count, states
        work = [partial(b.compute_greedy, *asked) for b in self._here]
        return self._together(work, len(tokens), ("greedy",), passes=count)[0]

    def prepare(self, step: Progress = unwatched) -> str:
        """See :class:`isobit.backends.base.Backend`."""
        made = [self._each([partial(b.prepare, step)])[0] for b in self._here]
        return made[0]

    def close(self) -> None:
        """Free the devices' memory."""
        self._pool.shutdown()
        for gpu in self._gpus:
            gpu.close()

    def _together(
        self,
        work: Sequence[Callable[[], T]],
        size: int,
        kind: tuple[object, ...],
        passes: int = 0,
    ) -> list[T]:
        """A pass of all parts, of ``size`` tokens, or so many; ``kind``: what else decides what
        runs. Of larger passes all is known."""
        if self.lost:
            raise BackendUnavailable(self.lost)
        self._passes += passes or size  # no pass has no token
        if self._passes >= self._renewed_after:
            self._passes = 0
            self._each([partial(renew, b, gpu) for b, gpu in self._pairs()])
        small = size <= CudaBackend.sizes.padded[-1]
        # What comes a second time becomes a graph (graph_cache.py), of few tokens also the first.
        if self._times[size, kind] in ((0, 1) if small else (1,)):
            self._rehearse(work)
        self._times[size, kind] += 1
        try:
            done = self._each([partial(self._watched, w) for w in work])
        except Exception as error:
            self.lost = f"cuda: a part of the model has failed ({error}): load it again"
            raise
        if given_up := int(self._flags[0]):
            self.lost = (
                f"cuda: device {given_up - 1} of {len(work)} has not answered the others for "
                f"{self._flags[1] / 1000:g} s: load the model again"
            )
            raise BackendUnavailable(self.lost)
        return done

    def _pairs(self) -> Iterable[tuple[CudaBackend, Gpu]]:
        return zip(self._here, self._gpus, strict=True)

    def _watched(self, work: Callable[[], T]) -> T:
        """A part's work; when it fails the others wait no longer."""
        try:
            return work()
        except BaseException:
            self._flags[0] = -1
            raise

    def _each(self, work: Sequence[Callable[[], T]]) -> list[T]:
        """Every device's work at the same time, as each waits for the others within it."""
        done = [self._pool.submit(w) for w in work]
        try:
            wait(done)
        except BaseException:  # an interruption: a part does one thing at a time
            wait(done)
            raise
        return [f.result() for f in done]

    def _rehearse(self, work: Sequence[Callable[[], object]]) -> None:
        """Have all that passes need ready, and run none."""
        pairs = zip(self._gpus, work, strict=True)
        self._each([partial(_rehearsed, gpu, w) for gpu, w in pairs])


def _headroom(weights: Weights, settings: EngineConfig, gpu: Gpu) -> Headroom:
    gpu.activate()
    return headroom(Programs(weights, settings, gpu), Limits.of(weights, settings), gpu.memory()[0])


def _opened(weights: Weights, engine: EngineConfig, gpu: Gpu) -> CudaBackend:
    gpu.activate()
    return CudaBackend(weights, engine, gpu)


def _form(wanted: Wanted) -> tuple[object, ...]:
    """What decides which kernels make it."""
    return tuple(v if isinstance(v, int) else v is not None for v in field_values(wanted).values())


def _rehearsed(gpu: Gpu, work: Callable[[], object]) -> None:
    with gpu.rehearsal():
        work()


Addresses = list[dict[str, int]]
"""Of each program by the rows of gathered values: where the inbox is."""


def inboxes(backend: CudaBackend) -> Addresses:
    """Where others reach a part."""
    return [{rows: i.own[0].address for rows, i in e.items()} for e in backend.exchanges]


def tell(backend: CudaBackend, gpu: Gpu, rank: int, every: Sequence[Addresses], flags: int) -> None:
    """Let a part know where all parts are reached, the flags of the pass, the words of half an
    inbox, and which it is: ExchangeTable of exchange.cuh."""
    gpu.activate()
    for program, exchanges in enumerate(backend.exchanges):
        for rows, own in exchanges.items():
            first, second = own.own
            half = (second.address - first.address) // 8
            words = *(a[program][rows] for a in every), flags, half, rank
            gpu.upload(own.table.address, np.array(words, np.int64))


def renew(backend: CudaBackend, gpu: Gpu) -> None:
    """Empty a part's inboxes, and count its exchanges from 0, while none runs."""
    gpu.activate()
    for exchanges in backend.exchanges:
        for own in exchanges.values():
            first, second = (slot.address for slot in own.own)
            gpu.upload(first, np.zeros(2 * (second - first), np.uint8))
            gpu.upload(own.count, np.zeros(1, np.int32))
