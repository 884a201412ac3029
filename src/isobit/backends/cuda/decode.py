"""One token at a time: a step of the pass as one CUDA graph of fused kernels (decode_*.cu).

For models whose matrices are all tiled Q4_K and Q6_K; others run kernel by kernel (backend.py).
Same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from isobit import numerics
from isobit.backends.base import F32, I32
from isobit.backends.cuda import memory
from isobit.backends.cuda.gpu import Gpu
from isobit.backends.cuda.layout import ACT_BYTES, TILE_ROWS
from isobit.backends.cuda.load import DeviceLayer, DeviceModel, DeviceWeight
from isobit.config import ModelConfig
from isobit.numerics import TILE

_WARPS = 16  # of a block of decode.cuh
_FEW_TILES = 4  # FEW_TILES of merge.cuh
MERGE_SHARED = 4 * (512 * 38 + 16)
"""Bytes of MergeShared of decode_merge.cu."""
_KINDS = {"F32": "KIND_F32", "F16": "KIND_F16", "BF16": "KIND_BF16"}


class Decoder:
    """The graph of a step and the buffers it works on."""

    def __init__(self, gpu: Gpu, c: ModelConfig, planes: int, model: DeviceModel) -> None:
        self._gpu, self._c, self._model = gpu, c, model
        self._defines = shape_defines(c, planes)
        self._tiles = -(-model.context // TILE)
        self._plans = {w: LayerPlan.of(c, w, model.output, gpu) for w in model.layers}
        sizes = memory.step_buffers(c, model.context)
        self._b = {name: gpu.allocate(nbytes) for name, nbytes in sizes.items()}
        self._number = 1  # of the next step
        for name in ("chosen", "guess"):  # words with the number of a step, which is not 0
            gpu.upload(self._b[name], np.zeros(sizes[name], np.uint8))
        self._few = gpu.capture(partial(self._queue, many=False))
        self._many = gpu.capture(partial(self._queue, many=True))

    def logits(self, token: int, position: int, pages: I32) -> F32:
        """Append one token; its logits."""
        self._set(token, position, pages)
        self._step(position)
        out = self._gpu.results(self._c.vocab)
        self._gpu.download(self._b["logits"], out)
        return out

    def greedy(self, token: int, position: int, pages: I32, count: int) -> tuple[I32, bool]:
        """Append a token, then the likeliest next, ``count`` in all, without waiting in between.

        Returns the likeliest token after each (int32 [count]) and whether all logits were finite.
        """
        self._set(token, position, pages)
        for i in range(count):
            self._step(position + i)
        out, state = np.empty(count, np.int32), np.empty(5, np.int32)
        self._gpu.download(self._b["generated"] + 4 * position, out)
        self._gpu.download(self._b["step"], state)
        return out, not state[2]

    def _set(self, token: int, position: int, pages: I32) -> None:
        step = np.array([token, position, 0, 0, self._number], np.int32)
        self._gpu.upload(self._b["step"], step)
        self._gpu.upload(self._b["pages"], pages)

    def _step(self, position: int) -> None:
        self._number = self._number % (1 << 30) + 1
        self._gpu.replay(self._few if position < _FEW_TILES * TILE else self._many)

    def _queue(self, *, many: bool) -> None:
        b, c, model = self._b, self._c, self._model
        self._gpu.launch(
            "embedding",
            "embed",
            (1, c.hidden // 256),
            (model.embedding.address, b["step"], c.hidden, b["x"]),
            defines=model.embedding.layout.embedding_defines,
        )
        for i, (layer, cache) in enumerate(zip(model.layers, model.caches, strict=True)):
            self._attention(i, layer, cache, many)
            self._feed_forward(i, layer)
        self._launch(
            "decode_head",
            (b["x"], model.output_norm, c.eps, model.output.address, c.vocab, b["logits"])
            + (b["best"], b["step"], b["generated"]),
            model.layers[-1],
        )

    def _attention(self, i: int, w: DeviceLayer, cache: tuple[int, ...], many: bool) -> None:
        b, c = self._b, self._c
        guess = self._guess(i)
        self._launch(
            "decode_qkv",
            (b["x"], w.attn_norm, c.eps, w.q.address, w.k.address, w.v.address)
            + (b["step"], guess, b["qkv"]),
            w,
        )
        results = (b["max_and_sum"], b["tile_out"])
        at_once, buffers = attention_tiles(c, self._gpu), attention_buffers(c, self._gpu)
        most = min(self._tiles, at_once if many else min(at_once, _FEW_TILES))
        self._gpu.launch(
            "decode_attention",
            "decode_attention",
            (most, c.n_kv_heads),
            (b["qkv"], w.q_norm, w.k_norm, c.eps, *self._model.rope, b["step"] + 4, b["pages"])
            + (float(numerics.attention_scale(c.head_dim)), *cache, self._tiles, *results),
            shared=attention_shared(c, buffers),
            defines=self._defines | {"BUFFERS": str(buffers)},
            overlap=True,
        )
        if many:
            self._gpu.launch(
                "decode_merge",
                "decode_merge",
                (c.n_heads * c.head_dim // 32,),
                (b["step"], *results, self._tiles, b["attention"]),
                shared=MERGE_SHARED,
                defines=self._defines,
                overlap=True,
            )
        self._launch(
            "decode_attn_out",
            (b["attention"], b["step"], results[0], 0 if many else results[1], self._tiles)
            + (w.attn_output.address, w.router.address if w.router else 0, w.ffn_norm)
            + (w.gate.address, w.up.address, w.down.address)
            + (w.gate.matrix_bytes, w.down.matrix_bytes, self._fetches_ahead(w), guess, b["x"]),
            w,
            plan="decode_attn_out" if many else "decode_attn_out alone",
        )

    def _feed_forward(self, i: int, w: DeviceLayer) -> None:
        b, c = self._b, self._c
        if w.router is not None:
            self._launch(
                "decode_router",
                (b["x"], w.ffn_norm, c.eps, w.router.address, b["router_logits"], b["acts"]),
                w,
                blocks=max(c.n_experts, self._gpu.multiprocessors),
            )
        choice = (b["step"], b["chosen"] + 8 * i * c.n_experts_used)
        self._launch(
            "decode_gate_up",
            (b["acts"], b["router_logits"], int(c.normalise_experts), b["x"], w.ffn_norm, c.eps)
            + (w.gate.address, w.up.address, b["step"], self._guess(i), choice[1], b["swiglu"]),
            w,
        )
        self._launch("decode_down", (b["swiglu"], *choice, w.down.address, b["x"]), w)

    def _guess(self, i: int) -> int:
        """The words of layer i's guess (guess.cuh)."""
        return self._b["guess"] + 8 * i * (1 + self._c.n_experts)

    def _fetches_ahead(self, w: DeviceLayer) -> int:
        """Whether the device's shared cache has room for a layer's experts, and for the rest."""
        used = self._c.n_experts_used * sum(m.matrix_bytes for m in (w.gate, w.up, w.down))
        return int(2 * used <= self._gpu.cache_bytes)

    def _launch(
        self,
        kernel: str,
        arguments: tuple[int | float, ...],
        w: DeviceLayer,
        blocks: int | None = None,
        plan: str = "",
    ) -> None:
        shared, defines = self._plans[w].kernels[plan or kernel]
        self._gpu.launch(
            kernel,
            kernel,
            (blocks or self._gpu.multiprocessors,),
            arguments,
            shared=shared,
            defines=self._defines | defines,
            overlap=True,
        )


def shape_defines(c: ModelConfig, planes: int) -> dict[str, str]:
    """The definitions that decode.cuh asks for."""
    return {
        "PLANES": str(planes),
        "HIDDEN": str(c.hidden),
        "HEADS": str(c.n_heads),
        "KV_HEADS": str(c.n_kv_heads),
        "HEAD_DIM": str(c.head_dim),
        "FFN": str(c.ffn),
        "EXPERTS": str(c.n_experts),
        "USED": str(max(c.n_experts_used, 1)),
    }


def attention_shared(c: ModelConfig, buffers: int) -> int:
    """Bytes of AttentionShared of decode_attention.cu."""
    columns = -(-c.n_heads // c.n_kv_heads // 8) * 8
    tiles = buffers * (4 * TILE * c.head_dim + 8 * TILE + 16)
    return tiles + columns * (2 * c.head_dim + 8 * TILE + 16 + 8) + 4 * c.head_dim + 8


def attention_tiles(c: ModelConfig, gpu: Gpu, sequences: int = 1) -> int:
    """Tiles of a key-value head that blocks take at once: three blocks of a multiprocessor, of
    which one computes while others wait for their tiles."""
    return max(1, 3 * gpu.multiprocessors // (c.n_kv_heads * sequences))


def attention_buffers(c: ModelConfig, gpu: Gpu) -> int:
    """Tiles a block of the attention kernel holds: the next one is fetched if there is room."""
    return 2 if attention_shared(c, 2) <= gpu.shared_most // 3 else 1


@dataclass(frozen=True)
class LayerPlan:
    """How the kernels that read a layer's weights are compiled and launched."""

    kernels: dict[str, tuple[int, dict[str, str]]]
    """Dynamic shared memory and definitions of each."""

    @classmethod
    def of(cls, c: ModelConfig, w: DeviceLayer, output: DeviceWeight, gpu: Gpu) -> "LayerPlan":
        """Shared memory is a fixed part, slots for tiles on their way (as deep as fits), and a
        float for each row of a block's tiles."""
        hidden, heads, ffn = (memory.supers(n) for n in (c.hidden, c.n_heads * c.head_dim, c.ffn))
        k, kv = max(c.n_experts_used, 1), c.n_kv_heads * c.head_dim
        router = "F32" if w.router is None else w.router.layout.format.name
        buffer = 1024  # floats of a block's sum
        router_kind = {"ROUTER_KIND": _KINDS[router]}
        # So much that a multiprocessor takes one block of the router beside decode_attn_out's, not
        # two: decode_gate_up's block, which has room beside one, would have to wait for both.
        router_shared = max(2 * buffer, gpu.shared_most * 2 // 5)
        kernels = {"decode_router": (router_shared, router_kind)}

        def tiles(rows: int, supers: int) -> int:
            return -(-rows // TILE_ROWS // gpu.multiprocessors) * supers

        def plan(kernel: str, fixed: int, *parts: tuple[str, DeviceWeight, int]) -> None:
            fixed += 64 + sum(4 * TILE_ROWS * n for _, _, n in parts)
            room = gpu.shared_most - 1024 - fixed
            used, defines = 0, {}
            for i, (role, matrix, n) in enumerate(parts):
                slot = 4 * TILE_ROWS * matrix.layout.format.block_bytes
                steps = -(-n // 4)
                deepest = max(1, (room - used) // (len(parts) - i) // (slot * _WARPS))
                depth = min(-(-steps // _WARPS), deepest, 4)
                defines[f"{role}WEIGHT"] = f"Tiled{matrix.layout.format.name}"
                defines[f"{role}DEPTH"] = str(depth)
                used += min(steps, depth * _WARPS) * slot + 8 * depth * _WARPS
            if kernel in ("decode_attn_out", "decode_gate_up"):  # which guess
                defines |= router_kind
            kernels[kernel] = fixed + used, defines

        acts = hidden * ACT_BYTES
        plan(
            "decode_qkv",
            acts + buffer,
            ("QK_", w.q, tiles(c.n_heads * c.head_dim + kv, hidden)),
            ("V_", w.v, tiles(kv, hidden)),
        )
        plan(
            "decode_attn_out",
            heads * ACT_BYTES + 4 * _WARPS,
            ("", w.attn_output, tiles(c.hidden, heads)),
        )
        # With few tiles, when some multiprocessors have their registers taken by attention: more
        # than half of the memory, where there is room, so that no multiprocessor takes two blocks.
        # The second is late, and keeps the router's and decode_gate_up's away: all wait for it.
        shared, defines = kernels["decode_attn_out"]
        half = gpu.shared_most // 2 + 1
        room = gpu.shared_most - 3072 - max(kernels["decode_qkv"][0], router_shared)
        kernels["decode_attn_out alone"] = max(shared, half if half <= room else 0), defines
        choosing = 4 * _WARPS * (c.n_experts + 1) + 2 * c.n_experts if c.n_experts else buffer
        gate_tiles = 2 * tiles(k * c.ffn, hidden)
        plan("decode_gate_up", acts + choosing + 17 * k + 8, ("", w.gate, gate_tiles))
        down_tiles = tiles(c.hidden, k * ffn)
        plan("decode_down", k * ffn * ACT_BYTES + 8 * k, ("", w.down, down_tiles))
        plan("decode_head", acts + buffer + 256, ("", output, tiles(c.vocab, hidden)))
        return cls(kernels)


def supported(
    c: ModelConfig, layers: Sequence[DeviceLayer], output: DeviceWeight, gpu: Gpu
) -> bool:
    """Whether a step can run as a graph of these kernels."""
    matrices = [output]
    for w in layers:
        matrices += [w.q, w.k, w.v, w.attn_output, w.gate, w.up, w.down]
    return (
        all(m.layout.fused for m in matrices)
        and all(w.q.layout == w.k.layout and w.gate.layout == w.up.layout for w in layers)
        and all(w.router is None or w.router.layout.kind == "floats" for w in layers)
        and c.head_dim % 64 == 0
        and c.n_experts <= 512
        and c.n_experts_used <= 32
        and attention_shared(c, 1) <= gpu.shared_most
        and all(
            shared <= gpu.shared_most
            for w in layers
            for shared, _ in LayerPlan.of(c, w, output, gpu).kernels.values()
        )
    )
