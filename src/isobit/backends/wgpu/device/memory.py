"""What a lowered graph needs of the device's memory, and whether its limits allow it.

WebGPU limits a buffer that a kernel binds (128 MiB by default, more where the adapter has it).
Weights are divided into as many buffers as they need, the KV cache by heads, and a batch into as
many passes; what cannot be divided further is refused with the arithmetic.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from isobit.backends.base import Limits
from isobit.backends.base.kv_pages import Headroom
from isobit.backends.base.workspace import BATCH, TILES
from isobit.backends.wgpu.device.gpu import MAX_GROUPS, Device, OutOfDeviceMemory
from isobit.backends.wgpu.lowering import STATES, CachePart, KvCache, Lowering, Slot
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.model.weights import Weights
from isobit.numerics import KV_PAGE
from isobit.numerics.ops import LOGIT_ROWS, TOKENS

_PARTIAL_BYTES = 32 << 20
_LOGIT_ROWS = 64
_LIMIT = "maxStorageBufferBindingSize"
_USED = 0.9  # of what is free


@dataclass(frozen=True)
class Plan:
    """How a lowered graph's buffers are cut to a device's limit."""

    pages: int
    """Of the KV cache."""
    rows: Mapping[str, int]
    """Rows of each kind that a slot has room for: tokens in one pass (larger batches take several),
    logits computed at once, tokens times tiles that attention holds at once, recurrent states."""
    binding: int
    """Bytes that a buffer may have."""

    @classmethod
    def of(cls, g: Lowering, engine: EngineConfig, limits: Limits, binding: int) -> "Plan":
        """Fit what was lowered to ``binding`` bytes a buffer; raises BackendUnavailable if it
        cannot be."""
        tiles, pages = -(-limits.positions // KV_PAGE), limits.pages
        for page in {c.page_bytes for c in g.caches.values()}:
            _check(
                pages * page,
                binding,
                f"one head's KV cache: {pages} pages of {KV_PAGE} positions × {page} bytes",
                "use a smaller context or fewer sequences",
            )
        kinds = TOKENS, LOGIT_ROWS, TILES, STATES
        of = {kind: [s for s in g.slots if s.rows == kind] for kind in kinds}
        for slot in sorted(of[TOKENS], key=lambda s: -s.words)[:1]:
            what = f"one token's {slot.name}"
            _check(4 * (slot.words + slot.more), binding, what, "the model is too wide")
        for slot in of[LOGIT_ROWS]:
            what = f"{slot.name}: {slot.words} × 4 bytes"
            _check(4 * slot.words, binding, what, "the vocabulary is too large")
        states = limits.states
        for slot in sorted(of[STATES], key=lambda s: -s.words)[:1]:
            size = 4 * slot.words
            what = f"{slot.name}: {engine.max_sequences} sequences × {size} bytes"
            _check(engine.max_sequences * size, binding, what, "use fewer sequences")
            states = min(states, binding // size)  # as many are kept as have room
        for slot in g.own.values():
            what = f"{slot.name}: {slot.words} × 4 bytes"
            _check(4 * slot.words, binding, what, "the model is too wide")
        tile_bytes = max((4 * s.words for s in of[TILES]), default=4)
        what = f"attention: {tiles} tiles × {tile_bytes} bytes"
        _check(tiles * tile_bytes, binding, what, "use a smaller context")
        fits = [(binding - 4 * s.more) // (4 * s.words) for s in of[TOKENS] if s.words]
        tokens = min(engine.chunk, MAX_GROUPS // g.most_rows, *fits)
        logit_rows = min(_LOGIT_ROWS, tokens, *(binding // (4 * s.words) for s in of[LOGIT_ROWS]))
        most = min(tokens * tiles * tile_bytes, _PARTIAL_BYTES, binding)
        tiles_held = max(most // tile_bytes, tiles)
        rows = {TOKENS: tokens, LOGIT_ROWS: logit_rows, TILES: tiles_held, BATCH: 1}
        return cls(pages, rows | {STATES: states}, binding)

    def bytes(self, slot: Slot) -> int:
        """Of a slot's buffer."""
        return 4 * (slot.words * self.rows[slot.rows] + slot.more)

    def parts(self, cache: KvCache) -> Iterator[tuple[int, int]]:
        """First head and number of heads of each buffer of a KV cache."""
        at_once = min(cache.kv_heads, self.binding // (self.pages * cache.page_bytes))
        for first in range(0, cache.kv_heads, at_once):
            yield first, min(at_once, cache.kv_heads - first)

    def load(self, g: Lowering, device: Device) -> None:
        """Make the buffers but those of the KV cache, and bring the weights there."""
        g.device = device
        for slot in g.slots:
            slot.capacity = self.rows[slot.rows]
            slot.buffer = device.empty(self.bytes(slot))
        if g.norms:
            device.write(
                g.vectors.buffer, np.concatenate([w.float32().reshape(-1) for w in g.norms])
            )
        for weight, slot in g.own.items():
            device.write(slot.buffer, weight.float32())
        for matrix in g.matrices:
            matrix.load(device)

    def load_caches(self, g: Lowering, device: Device) -> None:
        """Make the buffers of the KV cache. Raises OutOfDeviceMemory, and then has made none."""
        made: list[Any] = []
        try:
            for cache in set(g.caches.values()):
                head, parts = self.pages * cache.page_bytes, []
                for first, heads in self.parts(cache):
                    with device.guarded():
                        made.append(device.empty(heads * head))
                    parts.append(CachePart(made[-1], first, heads))
                cache.parts = tuple(parts)
        except OutOfDeviceMemory:
            for buffer in made:
                buffer.destroy()
            raise


def headroom(g: Lowering, weights: Weights, engine: EngineConfig, device: Device) -> Headroom:
    """What a KV cache may have: of one cache a head cannot have more than a buffer, and all of them
    no more than is free, where anyone says how much that is, beside the rest of the model.

    Raises BackendUnavailable if the rest does not fit.
    """
    caches = set(g.caches.values())
    if not caches:
        return Headroom(inf, 0)
    page = sum(c.kv_heads * c.page_bytes for c in caches)
    most = device.binding_bytes // max(c.page_bytes for c in caches)
    memory = device.memory()
    if memory is None:
        return Headroom(inf, page, most)
    limits = Limits.of(weights, engine, keeps=True)
    pages = min(limits.pages, most)
    limits = limits._replace(pages=pages, positions=min(limits.positions, pages * KV_PAGE))
    plan = Plan.of(g, engine, limits, device.binding_bytes)
    taken = sum(plan.bytes(slot) for slot in g.slots) + sum(m.nbytes for m in g.matrices)
    left = _USED * memory.free - taken
    if left < 0:
        raise BackendUnavailable(
            f"wgpu: {device.name}: the model takes {taken / 1e9:.2f} GB beside its KV cache, "
            f"{_USED * memory.free / 1e9:.2f} GB of memory are left for it"
        )
    return Headroom(left, page, most)


def _check(needed: int, binding: int, what: str, remedy: str) -> None:
    if needed > binding:
        raise BackendUnavailable(
            f"wgpu: {what} = {needed:,} bytes in one buffer, the device's {_LIMIT} is "
            f"{binding:,}: {remedy}"
        )
