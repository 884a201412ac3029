"""The float64 oracle: what the model's weights say, with no rounding of activations.

A yardstick for accuracy and nothing else: no backend computes like this, and nothing is ever
called identical to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32
from isobit.config import ModelConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.numerics import Weight
from isobit.verify import graph
from isobit.verify.arithmetic import Array, Kept, masked
from isobit.verify.metrics import router_margin
from isobit.verify.trace import Emit, Manifest

F64 = NDArray[np.float64]
_UNPACKED = 1 << 24  # values


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
        """``x @ w.T``, so many rows of w at a time that they are unpacked in 128 MiB."""
        x, step = x.astype(np.float64), max(1, _UNPACKED // w.shape[1])
        starts = range(0, w.shape[0], step)
        parts = [x @ self._unpack(w.rows(i, min(i + step, w.shape[0]))).T for i in starts]
        return np.concatenate(parts, axis=1)

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
    margins: F64
    """[L, T]: see ``router_margin``."""


class Oracle:
    """A model's weights in float64."""

    def __init__(self, weights: Weights, model: str = "", sha256: str | None = None) -> None:
        self.weights = weights
        self.config = weights.config
        self.arithmetic = Float64Arithmetic(weights.config)
        self._model, self._sha256 = model, sha256

    @classmethod
    def of(cls, file: GGUFFile) -> "Oracle":
        """The oracle of an open file."""
        return cls(Weights.from_file(file), file.path.name, file.sha256())

    def manifest(self, tokens: Sequence[int]) -> Manifest:
        """What a recording says of itself."""
        return Manifest(
            tokens=[int(t) for t in tokens],
            positions=list(range(len(tokens))),
            backend="oracle",
            device="float64",
            model=self._model,
            model_sha256=self._sha256,
            architecture=self.config.architecture,
        )

    def run(self, tokens: Sequence[int], chunk: int, stages: frozenset[str], emit: Emit) -> None:
        """Run a sequence in chunks and emit its stages."""
        run = graph.Run(self.weights)
        for start in range(0, len(tokens), chunk):
            part = np.array(tokens[start : start + chunk], np.int32)
            positions = np.arange(start, start + len(part), dtype=np.int32)

            def tap(stage: str, layer: int | None, value: Array, at: I32 = positions) -> None:
                emit(stage, layer, at, value)

            graph.forward(run, part, positions, self._compute, tap, stages)

    def evaluate(self, tokens: Sequence[int]) -> OracleRun:
        """Every token's logits and experts, for a sequence that starts at position 0."""
        seen: dict[str, list[Array]] = {"moe_router_indices": [], "moe_router_logits": []}
        ids = np.array(tokens, np.int32)
        logits = graph.forward(
            graph.Run(self.weights),
            ids,
            np.arange(len(ids), dtype=np.int32),
            self._compute,
            lambda stage, _, value: seen[stage].append(value),
            frozenset(seen),
        )
        k = self.config.n_experts_used
        experts = np.array(seen["moe_router_indices"], np.int32).reshape(-1, len(ids), k)
        margins = [router_margin(z, k) for z in seen["moe_router_logits"]]
        return OracleRun(logits, experts, np.array(margins).reshape(-1, len(ids)))

    def _compute(
        self, run: graph.Run, stage: str, layer: int | None, inputs: Sequence[Array]
    ) -> Array:
        return run.compute(stage, layer, inputs, self.arithmetic)
