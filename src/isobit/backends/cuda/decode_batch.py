"""One token of each of several sequences: a step of the pass as one CUDA graph.

Weights are read once for every eight sequences that need them (batch_matmul.cu). Same bits as one
by one, and as kernel by kernel.
"""

from functools import partial

import numpy as np

from isobit import numerics
from isobit.backends.base import F32, I32
from isobit.backends.cuda import decode, memory
from isobit.backends.cuda.gpu import Gpu
from isobit.backends.cuda.layout import ACT_BYTES, TILE_ROWS
from isobit.backends.cuda.load import DeviceLayer, DeviceModel, DeviceWeight, tall
from isobit.backends.cuda.ops import NORM_SHARED, Ops
from isobit.config import EngineConfig, ModelConfig
from isobit.numerics import TILE

COLUMNS = 8
"""Sequences of one tensor-core product: COLUMNS of items.cuh."""
_WARPS = 8  # of a block of batch_matmul.cu
_MANY = 8  # sequences from which the output product is faster by matmul_mma.cu


class BatchDecoder:
    """The graphs of a step, one for each number of sequences, and the buffers they work on."""

    def __init__(self, gpu: Gpu, c: ModelConfig, model: DeviceModel, engine: EngineConfig) -> None:
        self._gpu, self._c, self._model = gpu, c, model
        self._ops = Ops(gpu, engine.activation_planes, overlap=True)
        self.most = memory.in_step(engine)
        self._defines = decode.shape_defines(c, engine.activation_planes)
        self._tiles = -(-model.context // TILE)
        sizes = memory.batch_buffers(c, model.context, self.most)
        self._b = {name: gpu.allocate(nbytes) for name, nbytes in sizes.items()}
        self._graphs: dict[int, object] = {}

    def logits(self, tokens: I32, positions: I32, pages: I32) -> F32:
        """Append a token to each sequence; float32 [n, vocabulary]."""
        self._set(tokens, positions, pages)
        self._gpu.replay(self._graph(len(tokens)))
        out = self._gpu.results(len(tokens) * self._c.vocab)
        self._gpu.download(self._b["logits"], out)
        return out.reshape(-1, self._c.vocab)

    def greedy(self, tokens: I32, positions: I32, pages: I32, count: int) -> tuple[I32, bool]:
        """Append a token to each sequence, then the likeliest next, ``count`` in all.

        Returns the likeliest token after each, int32 [count, n], and whether logits were finite.
        """
        self._set(tokens, positions, pages)
        graph = self._graph(len(tokens))
        for _ in range(count):
            self._gpu.replay(graph)
        generated = np.empty((len(tokens), self._model.context + 1), np.int32)
        self._gpu.download(self._b["generated"], generated)
        bad = np.empty(1, np.int32)
        self._gpu.download(self._b["not_finite"], bad)
        places = positions[:, None] + np.arange(count)
        return np.ascontiguousarray(np.take_along_axis(generated, places, 1).T), not bad[0]

    def _set(self, tokens: I32, positions: I32, pages: I32) -> None:
        table = np.zeros((len(tokens), self._tiles), np.int32)
        table[:, : pages.shape[1]] = pages[:, : self._tiles]
        for name, values in (
            ("tokens", tokens),
            ("positions", positions),
            ("pages", table),
            ("not_finite", np.zeros(1, np.int32)),
        ):
            self._gpu.upload(self._b[name], values)

    def _graph(self, n: int) -> object:
        if n not in self._graphs:
            groups = np.zeros((-(-n // COLUMNS), 4), np.int32)
            groups[:, 1] = np.arange(0, n, COLUMNS)
            groups[:, 2] = np.minimum(COLUMNS, n - groups[:, 1])
            address = self._gpu.allocate(16 + groups.nbytes)
            self._gpu.upload(address, np.array([len(groups), 0, 0, 0], np.int32))
            self._gpu.upload(address + 16, groups)
            self._graphs[n] = self._gpu.capture(partial(self._queue, n, (address, address + 16)))
        return self._graphs[n]

    def _queue(self, n: int, every: tuple[int, int]) -> None:
        """A step of n sequences; ``every``: their number in groups, and the groups."""
        b, c, o, model = self._b, self._c, self._ops, self._model
        o.embed(model.embedding, b["tokens"], n, b["x"])
        first = True
        for layer, cache in zip(model.layers, model.caches, strict=True):
            self._norm(layer.attn_norm, n, "" if first else "experts" if c.is_moe else "out")
            self._attention(layer, cache, n, every)
            self._norm(layer.ffn_norm, n, "out")
            self._feed_forward(layer, n, every)
            first = False
        self._norm(model.output_norm, n, "experts" if c.is_moe else "out")
        if n > _MANY:
            o.matmul(model.output, b["h"], b["acts"], b["logits"], n)
        else:
            self._product(model.output, b["acts"], every, b["logits"], c.vocab)
        self._gpu.launch(
            "next_token",
            "next_token",
            (n,),
            (b["logits"], c.vocab, model.context + 1, b["tokens"], b["positions"])
            + (b["generated"], b["not_finite"]),
            overlap=True,
        )

    def _norm(self, weight: int, n: int, residual: str) -> None:
        """Norm of x, after what is still to be added to it: ``out``, or the sum of the experts."""
        b, c = self._b, self._c
        add, experts = b.get(residual, 0), (0, 1)
        if residual == "experts":
            experts = (b["router_weights"], c.n_experts_used)
        out = (b["h"], b["acts"])
        self._ops.norm_quantise(b["x"], add, weight, c.eps, c.hidden, n, *out, experts=experts)

    def _attention(
        self, w: DeviceLayer, cache: tuple[int, ...], n: int, every: tuple[int, int]
    ) -> None:
        b, c, gpu = self._b, self._c, self._gpu
        width, column = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, 0
        for matrix in tall((w.q, w.k, w.v)):
            self._product(matrix, b["acts"], every, b["qkv"] + 4 * column, width)
            column += matrix.rows
        results = (b["max_and_sum"], b["tile_out"])
        buffers = decode.attention_buffers(c, gpu)
        gpu.launch(
            "decode_attention",
            "decode_attention",
            (min(self._tiles, decode.attention_tiles(c, gpu, n)), c.n_kv_heads, n),
            (b["qkv"], w.q_norm, w.k_norm, c.eps, *self._model.rope, b["positions"], b["pages"])
            + (float(numerics.attention_scale(c.head_dim)), *cache, self._tiles, *results),
            shared=decode.attention_shared(c, buffers),
            defines=self._defines | {"BUFFERS": str(buffers)},
            overlap=True,
        )
        supers = n * memory.supers(c.n_heads * c.head_dim)
        gpu.launch(
            "batch_merge",
            "batch_merge",
            (-(-supers // _WARPS),),
            (b["positions"], *results, self._tiles, supers, b["acts"]),
            defines=self._defines,
            overlap=True,
        )
        self._product(w.attn_output, b["acts"], every, b["out"], c.hidden)

    def _feed_forward(self, w: DeviceLayer, n: int, every: tuple[int, int]) -> None:
        b, c, o = self._b, self._c, self._ops
        k = max(c.n_experts_used, 1)
        if w.router is None:
            self._product(w.gate, b["acts"], every, b["swiglu"], c.ffn, up=w.up)
            o.quantise(b["swiglu"], c.ffn, n, b["ffn_acts"])
            self._product(w.down, b["ffn_acts"], every, b["out"], c.hidden)
            return
        o.matmul(w.router, b["h"], b["acts"], b["router_logits"], n)
        chosen = (b["router_ids"], b["router_weights"])
        o.router_top_k(b["router_logits"], c.n_experts, k, c.normalise_experts, n, *chosen)
        groups, order = (b["n_groups"], b["groups"]), b["order"]
        o.sort_pairs(chosen[0], n * k, c.n_experts, order, b["offset"], groups[::-1])
        self._product(
            w.gate, b["acts"], groups, b["swiglu"], c.ffn, (order, k), up=w.up, planned=False
        )
        o.quantise(b["swiglu"], c.ffn, n * k, b["ffn_acts"])
        self._product(
            w.down, b["ffn_acts"], groups, b["experts"], c.hidden, (order, 1), dense=False
        )

    def _product(
        self,
        w: DeviceWeight,
        acts: int,
        groups: tuple[int, int],
        y: int,
        stride: int,
        items: tuple[int, int] = (0, 1),
        *,
        up: DeviceWeight | None = None,
        planned: bool = True,
        dense: bool = True,
    ) -> None:
        """``y = W x``, or with ``up`` the SwiGLU of both products. items: order and divide.

        planned: the groups were known before the kernel ahead began, so weights are fetched early.
        dense: one matrix for all, so that its units are all there are.
        """
        supers = memory.supers(w.columns)
        per_multiprocessor, depth = fit(self._gpu, w)
        blocks = per_multiprocessor * self._gpu.multiprocessors
        units = w.rows // (TILE_ROWS if up else 2 * TILE_ROWS)
        defines = {"WEIGHT": f"Tiled{w.layout.format.name}", "DEPTH": str(depth)}
        defines |= {"GATED": "1"} if up else {}
        defines |= {"PLANNED": "1"} if planned else {}
        # Fewer units than would keep all warps busy for long, and superblocks for each of them.
        split = (
            dense
            and not up
            and supers >= _WARPS
            and units < 2 * _WARPS * blocks
            and _shared(w, depth, split=True) <= room(self._gpu, per_multiprocessor)
        )
        defines |= {"SPLIT": "1"} if split else {}
        self._gpu.launch(
            "batch_matmul",
            "batch_matmul",
            (blocks,),
            (w.address, up.address if up else 0, w.matrix_bytes)
            + (units, supers, acts, *groups, *items)
            + (y, stride),
            shared=_shared(w, depth, split=split),
            defines=self._defines | defines,
            overlap=True,
        )


def room(gpu: Gpu, blocks: int) -> int:
    """Shared memory of each of so many blocks of a multiprocessor."""
    return gpu.shared_most // blocks - 1024


def _shared(w: DeviceWeight, depth: int, *, split: bool = False) -> int:
    """Bytes of shared memory: a group's activations, each warp's superblocks on their way, and,
    where a unit is split, the parts of two."""
    slot = 2 * TILE_ROWS * w.layout.format.block_bytes
    a_super = COLUMNS * ACT_BYTES + (2 * 4 * 2 * TILE_ROWS * COLUMNS if split else 0)
    return memory.supers(w.columns) * a_super + _WARPS * (64 + depth * slot)


def fit(gpu: Gpu, w: DeviceWeight) -> tuple[int, int]:
    """Blocks of a multiprocessor, and superblocks on their way to a warp; depth 0 if none fits."""
    for blocks, least in ((2, 2), (1, 1)):
        depth = next((d for d in (4, 3, 2, 1) if _shared(w, d) <= room(gpu, blocks)), 0)
        if depth >= least:
            return blocks, depth
    return 1, 0


def supported(c: ModelConfig, model: DeviceModel, gpu: Gpu) -> bool:
    """Whether a step can run so, given that :func:`decode.supported` holds."""
    matrices = [model.output]
    for w in model.layers:
        matrices += [*tall((w.q, w.k, w.v)), w.attn_output, w.gate, w.down]
    return (
        all(m.rows % (2 * TILE_ROWS) == 0 and fit(gpu, m)[1] > 0 for m in matrices)
        and c.n_heads * c.head_dim % 256 == 0
        and c.vocab % 4 == 0
        and 4 * c.hidden <= NORM_SHARED
    )
