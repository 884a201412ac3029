"""One pass of Qwen3 and Qwen3-MoE in NumPy: the graph that every backend follows."""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from isobit import numerics
from isobit.backends.base import F32, I32, Batch, Tap
from isobit.backends.reference.cache import Cache
from isobit.config import EngineConfig
from isobit.model.stages import ON_REQUEST
from isobit.model.weights import Layer, Weights
from isobit.numerics import IntegerWeight, Weight

Stage = Callable[[str, NDArray[np.generic]], None]

_KEEP_BYTES = 1 << 30


class ReferenceBackend:
    """Runs docs/numerics.md with ``isobit.numerics``: slow, readable, the definition."""

    name = "reference"

    def __init__(self, weights: Weights, engine: EngineConfig) -> None:
        self._w = weights
        self._c = weights.config
        self._planes = engine.activation_planes
        self._eps = np.float32(self._c.eps)
        self._cache = [Cache(self._c.n_kv_heads, self._c.head_dim) for _ in weights.layers]
        self._unpacked: OrderedDict[str, IntegerWeight] = OrderedDict()
        self._unpacked_bytes = 0
        self._frequencies = numerics.inverse_frequencies(self._c.head_dim, self._c.rope_base)

    @property
    def device(self) -> str:
        """The device in words."""
        return f"NumPy {np.__version__}"

    def close(self) -> None:
        """Forget the cache."""
        self._cache = []

    @np.errstate(all="ignore")  # damaged weights overflow; who asked gets the logits to judge
    def forward(
        self, batch: Batch, tap: Tap | None = None, stages: frozenset[str] | None = None
    ) -> F32:
        """Run a batch; see :class:`isobit.backends.base.Backend`."""

        def traced(stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
            if tap is not None and (stages is None or stage in stages):
                tap(stage, layer, value)

        maps = tap is not None and stages is not None and not ON_REQUEST.isdisjoint(stages)
        x = np.concatenate(
            [self._w.token_embd.rows(t, t + 1).float32() for t in batch.tokens.tolist()]
        )
        traced("embedding", None, x)
        first, last = int(batch.positions.min()), int(batch.positions.max())
        cos, sin = numerics.rope_table(self._frequencies, first, last + 1)
        turn = (cos[batch.positions - first], sin[batch.positions - first])
        for i, layer in enumerate(self._w.layers):

            def t(stage: str, value: NDArray[np.generic], i: int = i) -> None:
                traced(stage, i, value)

            x = self._attention_block(x, layer, self._cache[i], batch, turn, t, maps)
            x = self._feed_forward_block(x, layer, t)
        x = numerics.rms_norm(x, self._w.output_norm, self._eps)
        traced("final_norm", None, x)
        logits = self._matmul(self._w.output, x[batch.logit_rows])
        traced("lm_head", None, logits)
        return logits

    def _matmul(self, w: Weight, x: F32) -> F32:
        return numerics.matmul(w, x, self._planes, self._unpack)

    def _unpack(self, w: Weight) -> IntegerWeight:
        """Unpacked weights, the most recently used of them kept."""
        if w.name in self._unpacked:
            self._unpacked.move_to_end(w.name)
            return self._unpacked[w.name]
        unpacked = self._unpacked[w.name] = IntegerWeight.of(w)
        self._unpacked_bytes += unpacked.nbytes
        while self._unpacked_bytes > _KEEP_BYTES and len(self._unpacked) > 1:
            self._unpacked_bytes -= self._unpacked.popitem(last=False)[1].nbytes
        return unpacked

    def _attention_block(
        self,
        x: F32,
        layer: Layer,
        cache: Cache,
        batch: Batch,
        turn: tuple[F32, F32],
        t: Stage,
        maps: bool,
    ) -> F32:
        c = self._c
        h = numerics.rms_norm(x, layer.attn_norm, self._eps)
        t("attn_norm", h)
        qkv = np.concatenate([self._matmul(w, h) for w in (layer.q, layer.k, layer.v)], axis=1)
        t("qkv_matmul", qkv)
        heads = qkv.reshape(len(x), c.n_heads + 2 * c.n_kv_heads, c.head_dim)
        q, k, v = np.split(heads, [c.n_heads, c.n_heads + c.n_kv_heads], axis=1)
        q = numerics.rope(numerics.rms_norm(q, layer.q_norm, self._eps), *turn)
        k = numerics.rope(numerics.rms_norm(k, layer.k_norm, self._eps), *turn)
        t("q_post_rope", q)
        t("k_post_rope", k)
        cache.append(batch, k, np.ascontiguousarray(v))
        if maps:
            scores, softmax = self._attention_maps(q, cache, batch)
            t("attn_scores", scores)
            t("attn_softmax", softmax)
        a = self._attention(q, cache, batch)
        t("attention", a)
        o = self._matmul(layer.attn_output, a)
        t("attn_out", o)
        x = x + o
        t("post_attn_residual", x)
        return x

    def _attention(self, q: F32, cache: Cache, batch: Batch) -> F32:
        c = self._c
        group = c.n_heads // c.n_kv_heads
        out = np.empty_like(q)
        for s in np.unique(batch.sequence):
            rows = np.flatnonzero(batch.sequence == s)
            positions = batch.positions[rows]
            for kv_head in range(c.n_kv_heads):
                k, dk, v, dv = cache.read(batch.pages[s], int(positions.max()) + 1, kv_head)
                for head in range(kv_head * group, (kv_head + 1) * group):
                    out[rows, head] = numerics.attention(
                        np.ascontiguousarray(q[rows, head]), positions, k, dk, v, dv
                    )
        return out.reshape(len(q), -1)

    def _attention_maps(self, q: F32, cache: Cache, batch: Batch) -> tuple[F32, F32]:
        """Scores and softmax of every head [T, H, N], for a trace."""
        group = self._c.n_heads // self._c.n_kv_heads
        scores = np.zeros((*q.shape[:2], int(batch.positions.max()) + 1), np.float32)
        softmax = np.zeros_like(scores)
        for s in np.unique(batch.sequence):
            rows = np.flatnonzero(batch.sequence == s)
            positions = batch.positions[rows]
            n = int(positions.max()) + 1
            seen = np.arange(n) <= positions[:, None]
            for head in range(q.shape[1]):
                k, dk, _, _ = cache.read(batch.pages[s], n, head // group)
                values = numerics.attention_scores(np.ascontiguousarray(q[rows, head]), k, dk)
                scores[rows, head, :n] = np.where(seen, values, np.float32(0))
                softmax[rows, head, :n] = numerics.attention_softmax(values, positions)
        return scores, softmax

    def _feed_forward_block(self, x: F32, layer: Layer, t: Stage) -> F32:
        h = numerics.rms_norm(x, layer.ffn_norm, self._eps)
        t("ffn_norm", h)
        if layer.router is None:
            gate, up = self._matmul(layer.gate, h), self._matmul(layer.up, h)
            a = numerics.silu_gate(gate, up)
            o = self._matmul(layer.down, a)
            for stage, value in (("gate", gate), ("up", up), ("swiglu", a), ("out", o)):
                t("ffn_" + stage, value)
        else:
            z = self._matmul(layer.router, h)
            t("moe_router_logits", z)
            c = self._c
            ids, w, _ = numerics.top_k(z, c.n_experts_used, normalise=c.normalise_experts)
            t("moe_router", w)
            t("moe_router_indices", ids)
            gate, up, a, y = self._experts(layer, h, ids)
            for stage, value in (("gate", gate), ("up", up), ("swiglu", a), ("out", y)):
                t("moe_expert_" + stage, value)
            o = numerics.combine(w, y)
            t("moe_ffn_out", o)
        x = x + o
        t("post_ffn_residual", x)
        return x

    def _experts(self, layer: Layer, h: F32, ids: I32) -> tuple[F32, F32, F32, F32]:
        """Each token through its experts: gate, up, swiglu [T, k, F] and out [T, k, hidden]."""
        tokens, k = ids.shape
        gate, up, a = (np.empty((tokens, k, self._c.ffn), np.float32) for _ in range(3))
        y = np.empty((tokens, k, self._c.hidden), np.float32)
        for e in np.unique(ids).tolist():
            at = np.nonzero(ids == e)
            gate[at] = self._matmul(layer.gate.expert(e), h[at[0]])
            up[at] = self._matmul(layer.up.expert(e), h[at[0]])
            a[at] = numerics.silu_gate(gate[at], up[at])
            y[at] = self._matmul(layer.down.expert(e), a[at])
        return gate, up, a, y
