"""The operations of a pass as dispatches: shapes in, steps out."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from isobit import numerics
from isobit.backends.wgpu.device import MAX_GROUPS, Device, Kernel, Step
from isobit.backends.wgpu.layout import superblock_bytes, superblocks
from isobit.backends.wgpu.load import DeviceMatrix, Part, Segment

CHUNK = 8
"""Items that share one read of the weights: CHUNK of items.wgsl."""
_LANES = 256  # of a workgroup of matmul.wgsl
_LANES_A_ROW = 8
_READERS = {
    **{"Q4_K": "q4_k", "Q6_K": "q6_k"},
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4"), "iq4"),
}
"""The file that reads a format's superblocks; other formats have formats.wgsl."""


@dataclass(frozen=True)
class Experts:
    """How the items of a product are spread over a stack's matrices: moe.wgsl's plan."""

    plan: Any
    entries: int
    groups: int
    divide: int
    """Item i reads activation row i // divide."""


@dataclass(frozen=True)
class Heads:
    """The shape of attention."""

    n_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class CachePart:
    """The buffer of key-value heads ``first`` … ``first + heads - 1`` of one layer's KV cache."""

    buffer: Any
    first: int
    heads: int


@dataclass(frozen=True)
class BatchAt:
    """Word offsets into the batch's buffer, which begins with the tokens' positions."""

    slots: int
    """page * 64 + position in it, of each token"""
    tables: int
    """of each token's page table, less ``pages``"""
    rows: int
    """tokens whose logits are wanted"""
    turns: int
    """head_dim / 2 cosines, then sines, of each token"""
    pages: int

    @classmethod
    def of(cls, tokens: int, rows: int, head_dim: int) -> "BatchAt":
        """For a pass of that many tokens and rows of logits."""
        turns = 3 * tokens + rows
        return cls(tokens, 2 * tokens, 3 * tokens, turns, turns + tokens * head_dim)


class Ops:
    """Makes steps for one device and number of activation planes."""

    def __init__(self, device: Device, planes: int) -> None:
        self._device = device
        self._planes = planes
        self._nothing = device.empty(16)

    def norm(
        self,
        state_in: Any,
        state: Any,
        vectors: Any,
        acts: Any,
        *,
        n: int,
        rows: int,
        region: int,
        weight_at: int,
        eps: np.float32,
        output: Any = None,
        outputs: int = 0,
        router_weights: Any = None,
        batch: Any = None,
        rows_at: int | None = None,
    ) -> Step:
        """Add ``outputs`` rows of ``output`` to each row of a state, then norm and quantise it."""
        return Step(
            self._kernel("norm", "reduce", "quantise", PLANES=self._planes),
            (
                state_in,
                output or self._nothing,
                router_weights or self._nothing,
                vectors,
                batch or self._nothing,
                state,
                acts,
            ),
            (
                n,
                outputs,
                int(router_weights is not None),
                weight_at,
                bits(eps),
                region,
                0 if rows_at is None else rows_at + 1,
            ),
            (superblocks(n), rows),
        )

    def swiglu(self, gate_up: Any, result: Any, acts: Any, *, n: int, rows: int) -> Step:
        """SwiGLU of rows [gate, up] of 2 × n values, and its quantisation."""
        return Step(
            self._kernel("swiglu", "reduce", "quantise", PLANES=self._planes),
            (gate_up, result, acts),
            (n,),
            (superblocks(n), rows),
        )

    def matmul(
        self,
        w: DeviceMatrix,
        x: Any,
        x_at: int,
        acts: Any,
        y: Any,
        *,
        items: int,
        experts: Experts | None = None,
    ) -> list[Step]:
        """``y = W x``: float32 [items, w.rows]; float weights read ``x``, others ``acts``."""
        steps = []
        for segment in w.segments:
            for part in segment.parts:
                make = self._quantised if segment.format.quantized else self._floats
                steps.append(make(w, segment, part, (x, x_at, acts, y), items, experts))
        return steps

    def _quantised(
        self,
        w: DeviceMatrix,
        segment: Segment,
        part: Part,
        data: tuple[Any, int, Any, Any],
        items: int,
        experts: Experts | None,
    ) -> Step:
        _, _, acts, y = data
        supers = superblocks(w.columns)
        lanes = 1
        while lanes < min(supers, _LANES_A_ROW):
            lanes *= 2
        name, size = segment.format.name, superblock_bytes(segment.format)
        constants = {"LANES": _LANES, "SUPERS": lanes, "PLANES": self._planes, "TILE": size // 2}
        reader = _READERS.get(name, "formats")
        if reader in ("formats", "iq4"):
            constants["FORMAT"] = segment.format.ggml_type
        if reader == "formats":
            constants["BYTES"] = size
        files = ("scalar", self._device.dot, reader, "items", "matmul")
        kernel = self._device.kernel(files, "matmul", **constants)
        start, end = (part.first, part.last) if segment.matrices == 1 else (0, segment.units)
        groups = -(-(end - start) // (_LANES // 8 // lanes))
        return Step(
            kernel,
            (part.buffer, acts, experts.plan if experts else self._nothing, y),
            (
                *(supers, segment.rows, segment.units, part.first, part.last, start, w.rows),
                *(segment.column, *_items(items, experts)),
            ),
            (groups, _groups(items, experts)),
        )

    def _floats(
        self,
        w: DeviceMatrix,
        segment: Segment,
        part: Part,
        data: tuple[Any, int, Any, Any],
        items: int,
        experts: Experts | None,
    ) -> Step:
        x, x_at, _, y = data
        start, end = (part.first, part.last) if segment.matrices == 1 else (0, segment.units)
        return Step(
            self._kernel("matmul_floats", "reduce", "items", FORMAT=segment.format.ggml_type),
            (part.buffer, x, experts.plan if experts else self._nothing, y),
            (
                *(w.columns, segment.rows, part.first, part.last, start, w.rows, segment.column),
                *(x_at, *_items(items, experts)),
            ),
            (min(end - start, MAX_GROUPS), _groups(items, experts)),
        )

    def top_k(
        self,
        logits: Any,
        probabilities: Any,
        router_weights: Any,
        plan: Any,
        *,
        experts: int,
        k: int,
        normalise: bool,
        tokens: int,
    ) -> tuple[list[Step], Experts]:
        """The k experts of each token, their weights, and the plan of the experts' products."""
        pairs = tokens * k
        order, entries, counts = pairs, 2 * pairs, 5 * pairs
        # One token's experts differ; else those of several tokens share a read of the weights.
        groups = pairs if tokens == 1 else min(pairs, experts + pairs // CHUNK)
        buffers = (logits, probabilities, router_weights, plan)
        parameters = (experts, k, int(normalise), pairs, order, entries, groups, counts)
        steps = [
            Step(
                self._kernel("moe", "reduce", "items", entry="top_k"),
                buffers,
                parameters,
                (tokens,),
            )
        ]
        if tokens > 1:
            sort = self._kernel("moe", "reduce", "items", entry="sort_pairs")
            steps.append(Step(sort, buffers, parameters, (1,)))
        return steps, Experts(plan, entries, groups, k)

    def head_vectors(
        self,
        h: Heads,
        cache: CachePart,
        qkv: Any,
        vectors: Any,
        batch: Any,
        rope: Any,
        queries: Any,
        *,
        q_norm_at: int,
        k_norm_at: int,
        eps: np.float32,
        at: BatchAt,
        tokens: int,
    ) -> Step:
        """Norm, rotate and quantise a part's heads; store its keys and values."""
        scale = bits(numerics.attention_scale(h.head_dim))
        return Step(
            self._kernel("head_vectors", "reduce", "cache"),
            (qkv, vectors, batch, rope, queries, cache.buffer),
            (
                *(h.n_heads, h.kv_heads, h.head_dim, cache.first, cache.heads),
                *(q_norm_at, k_norm_at, bits(eps), scale, at.slots, at.turns),
                tokens * h.n_heads * h.head_dim,
            ),
            (cache.heads * (h.n_heads // h.kv_heads + 2), tokens),
        )

    def attention(
        self,
        h: Heads,
        cache: CachePart,
        queries: Any,
        batch: Any,
        partial: Any,
        *,
        at: BatchAt,
        first: int,
        tokens: int,
        tiles: int,
    ) -> Step:
        """Tiles of a part's query heads, for tokens ``first`` … ``first + tokens - 1``."""
        return Step(
            self._kernel("attention", self._device.dot, "reduce", "cache"),
            (queries, batch, cache.buffer, partial),
            (
                *(h.n_heads, h.kv_heads, h.head_dim, cache.first, cache.heads),
                *(first, tiles, at.tables, at.pages),
            ),
            (cache.heads * (h.n_heads // h.kv_heads), tiles, tokens),
        )

    def merge(
        self,
        h: Heads,
        partial: Any,
        batch: Any,
        result: Any,
        acts: Any,
        *,
        first: int,
        tokens: int,
        tiles: int,
    ) -> Step:
        """Merge the tiles of :meth:`attention` and quantise the result."""
        return Step(
            self._kernel("merge", "reduce", "quantise", PLANES=self._planes),
            (partial, batch, result, acts),
            (h.n_heads, h.head_dim, first, tiles),
            (superblocks(h.n_heads * h.head_dim), tokens),
        )

    def _kernel(self, last: str, *between: str, entry: str = "", **constants: int) -> Kernel:
        return self._device.kernel(("scalar", *between, last), entry or last, **constants)


def bits(value: np.float32) -> int:
    """A float as its bit pattern."""
    return int(np.float32(value).view(np.uint32))


def _items(items: int, experts: Experts | None) -> tuple[int, int, int, int]:
    """The last parameters of a product: planned, items, entries, divide."""
    if experts is None:
        return 0, items, 0, 1
    return 1, items, experts.entries, experts.divide


def _groups(items: int, experts: Experts | None) -> int:
    return -(-items // CHUNK) if experts is None else experts.groups
