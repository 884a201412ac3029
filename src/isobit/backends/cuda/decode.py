"""One token at a time: a step of the pass as one CUDA graph of fused kernels (decode.cu).

For models whose matrices are all tiled; others run kernel by kernel (backend.py). Same bits.
"""

from collections.abc import Sequence

import numpy as np

from isobit import numerics
from isobit.backends.base import F32, I32
from isobit.backends.cuda import memory
from isobit.backends.cuda.gpu import Gpu
from isobit.backends.cuda.layout import ACT_BYTES, TILE_ROWS
from isobit.backends.cuda.load import DeviceLayer, DeviceWeight
from isobit.config import ModelConfig
from isobit.numerics import TILE

_SHARED_MOST = 96 << 10
_KINDS = {"F32": "KIND_F32", "F16": "KIND_F16", "BF16": "KIND_BF16"}


class Decoder:
    """The graph of a step and the buffers it works on."""

    def __init__(
        self,
        gpu: Gpu,
        c: ModelConfig,
        planes: int,
        layers: Sequence[DeviceLayer],
        embedding: DeviceWeight,
        output: DeviceWeight,
        output_norm: int,
        caches: Sequence[tuple[int, ...]],
        rope: tuple[int, int],
        context: int,
    ) -> None:
        """``caches``: each layer's k, v, dk, dv; ``rope``: the tables of cosines and sines."""
        self._gpu, self._c, self._layers = gpu, c, layers
        self._embedding, self._output, self._output_norm = embedding, output, output_norm
        self._caches, self._rope = caches, rope
        self._defines = {
            "PLANES": str(planes),
            "HIDDEN": str(c.hidden),
            "HEADS": str(c.n_heads),
            "KV_HEADS": str(c.n_kv_heads),
            "HEAD_DIM": str(c.head_dim),
            "FFN": str(c.ffn),
            "EXPERTS": str(c.n_experts),
            "USED": str(max(c.n_experts_used, 1)),
        }
        self._tiles = -(-context // TILE)
        self._b = {
            name: gpu.allocate(nbytes) for name, nbytes in buffers(c, context).items()
        }
        gpu.upload(self._b["step"], np.zeros(4, np.int32))
        gpu.upload(self._b["arrived"], np.zeros(c.n_kv_heads, np.int32))
        self._graph = gpu.capture(self._queue)

    def logits(self, token: int, position: int, pages: I32) -> F32:
        """Append one token; its logits."""
        self._set(token, position, pages)
        self._gpu.replay(self._graph)
        out = np.empty(self._c.vocab, np.float32)
        self._gpu.download(self._b["logits"], out)
        return out

    def greedy(self, token: int, position: int, pages: I32, count: int) -> tuple[I32, bool]:
        """Append a token, then the likeliest next, ``count`` in all, without waiting in between.

        Returns the likeliest token after each (int32 [count]) and whether all logits were finite.
        """
        self._set(token, position, pages)
        for _ in range(count):
            self._gpu.replay(self._graph)
        out, state = np.empty(count, np.int32), np.empty(4, np.int32)
        self._gpu.download(self._b["generated"] + 4 * position, out)
        self._gpu.download(self._b["step"], state)
        return out, not state[2]

    def _set(self, token: int, position: int, pages: I32) -> None:
        self._gpu.upload(self._b["step"], np.array([token, position, 0, 0], np.int32))
        self._gpu.upload(self._b["pages"], pages)

    def _queue(self) -> None:
        b, c = self._b, self._c
        self._gpu.launch(
            "embedding",
            "embed",
            (1, c.hidden // 256),
            (self._embedding.address, b["step"], c.hidden, b["x"]),
            defines=self._embedding.layout.embedding_defines,
        )
        for layer, cache in zip(self._layers, self._caches, strict=True):
            self._layer(layer, cache)
        self._launch(
            "decode_head",
            (b["x"], self._output_norm, c.eps, self._output.address, c.vocab, b["logits"])
            + (b["best"], b["step"], b["generated"]),
            self._layers[-1],
        )

    def _layer(self, w: DeviceLayer, cache: tuple[int, ...]) -> None:
        b, c = self._b, self._c
        self._launch(
            "decode_qkv",
            (b["x"], w.attn_norm, c.eps, w.q.address, w.k.address, w.v.address, b["qkv"]),
            w,
        )
        splits = max(1, min(self._tiles, self._gpu.multiprocessors // c.n_kv_heads))
        self._gpu.launch(
            "decode_attention",
            "decode_attention",
            (splits, c.n_kv_heads),
            (b["qkv"], w.q_norm, w.k_norm, c.eps, *self._rope, b["step"], b["pages"])
            + (float(numerics.attention_scale(c.head_dim)), *cache, self._tiles)
            + (b["max_and_sum"], b["tile_out"], b["arrived"], b["attention"]),
            defines=self._defines,
            overlap=True,
        )
        self._launch("decode_attn_out", (b["attention"], w.attn_output.address, b["x"]), w)
        if w.router is not None:
            self._launch(
                "decode_router",
                (b["x"], w.ffn_norm, c.eps, w.router.address, b["router_logits"], b["acts"]),
                w,
                blocks=max(c.n_experts, self._gpu.multiprocessors),
            )
        self._launch(
            "decode_gate_up",
            (b["acts"], b["router_logits"], int(c.normalise_experts), b["x"], w.ffn_norm, c.eps)
            + (w.gate.address, w.up.address, b["ids"], b["weights"], b["swiglu"]),
            w,
        )
        self._launch(
            "decode_down", (b["swiglu"], b["ids"], b["weights"], w.down.address, b["x"]), w
        )

    def _launch(
        self,
        kernel: str,
        arguments: tuple[int | float, ...],
        w: DeviceLayer,
        blocks: int | None = None,
    ) -> None:
        formats = {
            "QK": w.q,
            "V": w.v,
            "OUT": w.attn_output,
            "GATE": w.gate,
            "DOWN": w.down,
            "HEAD": self._output,
        }
        defines = self._defines | {
            f"{role}_WEIGHT": f"Tiled{m.layout.format.name}" for role, m in formats.items()
        }
        router = "F32" if w.router is None else w.router.layout.format.name
        self._gpu.launch(
            "decode",
            kernel,
            (blocks or self._gpu.multiprocessors,),
            arguments,
            shared=shared_bytes(self._c, self._gpu.multiprocessors)[kernel],
            defines=defines | {"ROUTER_KIND": _KINDS[router]},
            overlap=True,
        )


def buffers(c: ModelConfig, context: int) -> dict[str, int]:
    """Bytes of each buffer of a step."""
    tiles, k = -(-context // TILE), max(c.n_experts_used, 1)
    return {
        "step": 16,
        "pages": 4 * tiles,
        "generated": 4 * (context + 1),
        "x": 4 * c.hidden,
        "qkv": 4 * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim,
        "max_and_sum": 8 * tiles * c.n_heads,
        "tile_out": 4 * tiles * c.n_heads * c.head_dim,
        "arrived": 4 * c.n_kv_heads,
        "attention": 4 * c.n_heads * c.head_dim,
        "router_logits": 4 * c.n_experts,
        "acts": ACT_BYTES * memory.supers(c.hidden),
        "ids": 4 * k,
        "weights": 4 * k,
        "swiglu": 4 * k * c.ffn,
        "logits": 4 * c.vocab,
        "best": 8 * 1024,
    }


def shared_bytes(c: ModelConfig, blocks: int) -> dict[str, int]:
    """Dynamic shared memory of each kernel of decode.cu: its fixed part, and one float for each
    row of a block's tiles."""
    hidden, heads, ffn = (memory.supers(n) for n in (c.hidden, c.n_heads * c.head_dim, c.ffn))
    k = max(c.n_experts_used, 1)

    def share(rows: int) -> int:
        return -(-rows // TILE_ROWS // blocks)

    def size(acts: int, tiles: int, more: int = 0) -> int:
        return acts * ACT_BYTES + 4 * TILE_ROWS * tiles + more + 2048

    normed = 4 * c.hidden
    kv = c.n_kv_heads * c.head_dim
    qkv_tiles = (share(c.n_heads * c.head_dim + kv) + share(kv)) * hidden
    return {
        "decode_qkv": size(hidden, qkv_tiles, normed),
        "decode_attn_out": size(heads, share(c.hidden) * heads),
        "decode_router": 0,
        "decode_gate_up": size(
            hidden, 2 * share(k * c.ffn) * hidden, normed + 4 * c.n_experts + 2048 + 32 * k
        ),
        "decode_down": size(k * ffn, share(c.hidden) * k * ffn, 4 * k),
        "decode_head": size(hidden, share(c.vocab) * hidden, normed),
    }


def supported(
    c: ModelConfig,
    layers: Sequence[DeviceLayer],
    output: DeviceWeight,
    blocks: int,
) -> bool:
    """Whether a step can run as a graph of decode.cu's kernels."""
    matrices = [output]
    for w in layers:
        matrices += [w.q, w.k, w.v, w.attn_output, w.gate, w.up, w.down]
    return (
        all(m.layout.kind == "tiled" for m in matrices)
        and all(w.q.layout == w.k.layout and w.gate.layout == w.up.layout for w in layers)
        and all(w.router is None or w.router.layout.kind == "floats" for w in layers)
        and c.head_dim % 64 == 0
        and c.n_experts <= 512
        and max(shared_bytes(c, blocks).values()) <= _SHARED_MOST
    )
