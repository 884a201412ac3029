"""The float64 oracle: what the model's weights say, with no rounding of activations.

A yardstick for accuracy and nothing else: no backend computes like this, and nothing is ever
called identical to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32, Tap
from isobit.config import ModelConfig
from isobit.model.weights import Weights
from isobit.numerics import Weight
from isobit.verify import graph
from isobit.verify.arithmetic import Array, Kept, masked

F64 = NDArray[np.float64]


class Float64Arithmetic:
    """The operations in float64, over dequantised weights; methods as in ``Arithmetic``."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._unpack = Kept(lambda w: w.float32().astype(np.float64))

    def embedding(self, table: Weight, tokens: I32) -> F64:
        """Rows of a table."""
        rows = [table.rows(t, t + 1).float32() for t in tokens.tolist()]
        return np.concatenate(rows).astype(np.float64)

    def matmul(self, w: Weight, x: Array) -> F64:
        """``x @ w.T``."""
        out: F64 = x.astype(np.float64) @ self._unpack(w).T
        return out

    def rms_norm(self, x: Array, weight: Array) -> F64:
        """RMS norm of the last axis."""
        x = x.astype(np.float64)
        out: F64 = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.eps) * weight
        return out

    def rope(self, x: Array, positions: I32) -> F64:
        """NEOX rotation, angles in float64."""
        half = x.shape[2] // 2
        frequencies = self.config.rope_base ** (-np.arange(half) / half)
        angle = positions[:, None] * frequencies
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        x = x.astype(np.float64)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    def scores(self, q: Array, keys: Array, positions: I32) -> F64:
        """Scores [T, H, N], 0 beyond positions."""
        out = np.empty((*q.shape[:2], len(keys)))
        for h, k in self._heads(q, keys):
            out[:, h] = q[:, h].astype(np.float64) @ k.T / np.sqrt(q.shape[2])
        return masked(out, positions)

    def softmax(self, scores: Array, positions: I32) -> F64:
        """Softmax up to positions."""
        seen = np.arange(scores.shape[2]) <= positions[:, None]
        s = np.where(seen[:, None], scores.astype(np.float64), -np.inf)
        return softmax(s)

    def attention(self, q: Array, keys: Array, values: Array, positions: I32) -> F64:
        """Attention [T, H, head_dim], head by head to bound the memory."""
        out = np.empty(q.shape)
        for h, k in self._heads(q, keys):
            s = self.softmax(self.scores(q[:, h : h + 1], k[:, None], positions), positions)
            out[:, h] = s[:, 0] @ values[:, h * keys.shape[1] // q.shape[1]].astype(np.float64)
        return out

    def weigh(self, weights: Array, values: Array) -> F64:
        """Values [N, G, head_dim] weighed by softmax weights [T, H, N]."""
        out = np.empty((*weights.shape[:2], values.shape[2]))
        for h in range(out.shape[1]):
            v = values[:, h * values.shape[1] // out.shape[1]].astype(np.float64)
            out[:, h] = weights[:, h].astype(np.float64) @ v
        return out

    def top_k(self, logits: Array, k: int, *, normalise: bool) -> tuple[I32, F64]:
        """The k likeliest experts, ties to the lower index."""
        p = softmax(logits.astype(np.float64))
        ids = np.argsort(-p, axis=1, kind="stable")[:, :k].astype(np.int32)
        chosen = np.take_along_axis(p, ids, axis=1)
        return ids, chosen / chosen.sum(axis=1, keepdims=True) if normalise else chosen

    def silu_gate(self, gate: Array, up: Array) -> F64:
        """SwiGLU's pointwise part."""
        g = gate.astype(np.float64)
        with np.errstate(over="ignore"):
            out: F64 = g / (1 + np.exp(-g)) * up
        return out

    def combine(self, weights: Array, outputs: Array) -> F64:
        """Weighted sum over the experts."""
        out: F64 = np.einsum("tk,tkn->tn", weights.astype(np.float64), outputs.astype(np.float64))
        return out

    def add(self, x: Array, y: Array) -> F64:
        """The residual sum."""
        out: F64 = x.astype(np.float64) + y
        return out

    def _heads(self, q: Array, keys: Array):  # type: ignore[no-untyped-def]
        for h in range(q.shape[1]):
            yield h, keys[:, h * keys.shape[1] // q.shape[1]].astype(np.float64)


def softmax(x: Array) -> F64:
    """Softmax of the last axis in float64."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    out: F64 = e / e.sum(axis=-1, keepdims=True)
    return out


@dataclass(frozen=True)
class OracleRun:
    """One sequence of T tokens through L layers."""

    logits: F64
    """[T, vocabulary]"""
    experts: I32
    """[L, T, k], likeliest first; [0, T, 0] for a dense model."""
    router_logits: F64
    """[L, T, E]; [0, T, 0] for a dense model."""


class Oracle:
    """A model's weights in float64; runs sequences that start at position 0."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.arithmetic = Float64Arithmetic(weights.config)

    def forward(
        self, tokens: I32, tap: Tap | None = None, stages: frozenset[str] | None = None
    ) -> F64:
        """Logits of every token, float64 [T, vocabulary]; ``tap`` as for a backend."""
        a = self.arithmetic

        def compute(r: graph.Run, stage: str, layer: int | None, inputs: Sequence[Array]) -> Array:
            return r.compute(stage, layer, inputs, a)

        return graph.forward(self.weights, tokens, compute, tap, stages)

    def run(self, tokens: Sequence[int]) -> OracleRun:
        """Every token's logits, experts and router logits."""
        seen: dict[str, list[Array]] = {"moe_router_indices": [], "moe_router_logits": []}
        ids = np.array(tokens, np.int32)
        logits = self.forward(ids, lambda s, _, value: seen[s].append(value), frozenset(seen))
        ids_, z = seen["moe_router_indices"], seen["moe_router_logits"]
        empty = (0, len(ids), 0)
        return OracleRun(
            logits=logits,
            experts=np.array(ids_, np.int32) if ids_ else np.zeros(empty, np.int32),
            router_logits=np.array(z) if z else np.zeros(empty),
        )
