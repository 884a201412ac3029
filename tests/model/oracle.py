"""What a model's weights say, in float64: the yardstick for accuracy, and nothing else.

Reads a GGUF file's hyper-parameters and dequantised weights by itself (no role table, no numerics
of the engine) and runs Qwen3 or Qwen3-MoE over one sequence in plain NumPy float64.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isobit.gguf.formats import dequantize
from isobit.gguf.reader import GGUFFile

F64 = NDArray[np.float64]
_QUERIES_AT_ONCE = 512


@dataclass(frozen=True)
class OracleRun:
    """One sequence of T tokens through L layers."""

    ids: NDArray[np.int64]
    """[T]"""
    logits: F64
    """[T, vocabulary]"""
    experts: NDArray[np.int64]
    """[L, T, k], most likely first; [0, T, 0] for a dense model."""
    margins: F64
    """[L, T]: how far the first expert left out lies below the last chosen, (p_k - p_k+1) / p_k."""

    def first(self, n: int) -> "OracleRun":
        """The run of the first n tokens alone: no token sees a later one."""
        return OracleRun(self.ids[:n], self.logits[:n], self.experts[:, :n], self.margins[:, :n])


class Oracle:
    """A model's weights in float64."""

    def __init__(self, path: str | Path) -> None:
        with GGUFFile.open(path) as file:
            self.metadata = file.metadata
            self.weights: dict[str, NDArray[np.float32]] = {
                name: dequantize(info.format, file.data(name), info.shape)
                for name, info in file.tensors.items()
            }
        self.arch = str(self.metadata["general.architecture"])

    def of(self, key: str) -> int | float:
        """A hyper-parameter, by its key without the architecture."""
        value = self.metadata[f"{self.arch}.{key}"]
        assert isinstance(value, int | float), key
        return value

    @cached_property
    def _float64(self) -> dict[str, F64]:
        return {name: w.astype(np.float64) for name, w in self.weights.items()}

    def run(self, ids: list[int]) -> OracleRun:
        """Every token's logits and experts, for a sequence that starts at position 0."""
        w = self._float64
        x = w["token_embd.weight"][ids]
        experts, margins = [], []
        for i in range(int(self.of("block_count"))):
            layer = {
                name.removeprefix(f"blk.{i}.").removesuffix(".weight"): a
                for name, a in w.items()
                if name.startswith(f"blk.{i}.")
            }
            x = x + self._attention(layer, self._rms(x, layer["attn_norm"]))
            h = self._rms(x, layer["ffn_norm"])
            if "ffn_gate_inp" in layer:
                out, chosen, margin = self._experts(layer, h)
                experts.append(chosen)
                margins.append(margin)
            else:
                out = _swiglu(h, layer["ffn_gate"], layer["ffn_up"], layer["ffn_down"])
            x = x + out
        x = self._rms(x, w["output_norm.weight"])
        return OracleRun(
            ids=np.array(ids),
            logits=x @ w.get("output.weight", w["token_embd.weight"]).T,
            experts=np.array(experts).reshape(len(experts), len(ids), -1 if experts else 0),
            margins=np.array(margins).reshape(len(margins), len(ids)),
        )

    def _rms(self, x: F64, weight: F64) -> F64:
        eps = self.of("attention.layer_norm_rms_epsilon")
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight

    def _rope(self, x: F64) -> F64:
        """NEOX rotation of x [T, heads, head_dim], token t at position t."""
        half = x.shape[2] // 2
        angle = np.outer(
            np.arange(len(x)), float(self.of("rope.freq_base")) ** (-np.arange(half) / half)
        )
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    def _attention(self, layer: dict[str, F64], h: F64) -> F64:
        tokens = len(h)
        n_heads = int(self.of("attention.head_count"))
        group = n_heads // int(self.of("attention.head_count_kv"))
        head_dim = len(layer["attn_q_norm"])
        q, k, v = (
            (h @ layer[name].T).reshape(tokens, -1, head_dim)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        q = self._rope(self._rms(q, layer["attn_q_norm"]))
        k = self._rope(self._rms(k, layer["attn_k_norm"]))
        out = np.empty((tokens, n_heads, head_dim))
        for start in range(0, tokens, _QUERIES_AT_ONCE):
            rows = np.arange(start, min(start + _QUERIES_AT_ONCE, tokens))
            n = rows[-1] + 1
            hidden = np.arange(n) > rows[:, None]
            for head in range(n_heads):
                s = q[rows, head] @ k[:n, head // group].T / np.sqrt(head_dim)
                s[hidden] = -np.inf
                out[rows, head] = _softmax(s) @ v[:n, head // group]
        return out.reshape(tokens, -1) @ layer["attn_output"].T

    def _experts(self, layer: dict[str, F64], h: F64) -> tuple[F64, NDArray[np.int64], F64]:
        k = int(self.of("expert_used_count"))
        p = _softmax(h @ layer["ffn_gate_inp"].T)
        order = np.argsort(-p, axis=1, kind="stable")
        chosen = order[:, :k]
        weight = np.take_along_axis(p, chosen, axis=1)
        following = np.take_along_axis(p, order[:, k : k + 1], axis=1)
        margin = 1 - following[:, 0] / weight[:, -1] if following.size else np.ones(len(h))
        weight = weight / weight.sum(axis=1, keepdims=True)
        out = np.zeros_like(h)
        for e in np.unique(chosen):
            token, rank = np.nonzero(chosen == e)
            stacks = (layer[f"ffn_{name}_exps"][e] for name in ("gate", "up", "down"))
            out[token] += weight[token, rank, None] * _swiglu(h[token], *stacks)
        return out, chosen, margin


def _softmax(x: F64) -> F64:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _swiglu(h: F64, gate: F64, up: F64, down: F64) -> F64:
    g = h @ gate.T
    return (g / (1 + np.exp(-g)) * (h @ up.T)) @ down.T
