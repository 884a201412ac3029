"""The CPU backend: hands a model's mapped tensors to the extension, which runs whole passes."""

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isobit import numerics
from isobit.backends.base import F32, Batch, Tap
from isobit.backends.cpu import _cpu
from isobit.backends.cpu.ops import matrix
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, UsageError
from isobit.model.weights import Layer, Weights

_MATRICES = ("q", "k", "v", "attn_output", "router", "gate", "up", "down")
_VECTORS = ("attn_norm", "q_norm", "k_norm", "ffn_norm")
_TABLE_STEP = 1024


class CpuBackend:
    """Runs passes in C++ on all cores; the bits are the reference's.

    ``simd`` names a level (see :func:`simd_levels`) instead of the machine's best; for tests.
    """

    name = "cpu"

    def __init__(self, weights: Weights, engine: EngineConfig, *, simd: str | None = None) -> None:
        c = weights.config
        levels = _cpu.simd_levels()
        if simd is not None and simd not in levels:
            raise BackendUnavailable(f"simd: expected one of {', '.join(levels)}, got {simd}")
        self._simd = simd or levels[0]
        self._threads = engine.cores
        context = engine.context or c.context_length
        pages = -(-context // numerics.TILE) * engine.max_sequences
        config = {
            "hidden": c.hidden,
            "n_heads": c.n_heads,
            "n_kv_heads": c.n_kv_heads,
            "head_dim": c.head_dim,
            "ffn": c.ffn,
            "n_experts": c.n_experts,
            "n_experts_used": c.n_experts_used,
            "vocab": c.vocab,
            "eps": float(np.float32(c.eps)),
            "attention_scale": float(numerics.attention_scale(c.head_dim)),
            "normalise_experts": c.normalise_experts,
            "planes": engine.activation_planes,
            "pages": pages,
        }
        try:
            self._engine: _cpu.Engine | None = _cpu.Engine(
                config,
                [_tensors(layer) for layer in weights.layers],
                matrix(weights.token_embd),
                weights.output_norm,
                matrix(weights.output),
                self._simd,
                self._threads,
            )
        except MemoryError:
            raise BackendUnavailable(
                f"KV cache: no room for {engine.max_sequences} sequences of {context} positions; "
                "ask for a smaller context"
            ) from None
        except RuntimeError as error:  # threads
            raise BackendUnavailable(f"cpu: {error}") from None
        self._stages = weights.graph.names
        self._vocab = c.vocab
        self._rope = _RopeTable(c.head_dim, c.rope_base)

    @property
    def device(self) -> str:
        """Processor, SIMD level and threads."""
        return f"{_processor()}, {self._simd}, {self._threads} threads"

    def forward(
        self, batch: Batch, tap: Tap | None = None, stages: frozenset[str] | None = None
    ) -> F32:
        """Run a batch; see :class:`isobit.backends.base.Backend`."""
        if self._engine is None:
            raise UsageError("forward: expected an open backend, got a closed one")
        wanted: Sequence[str] = ()
        if tap is not None:
            wanted = [s for s in self._stages if stages is None or s in stages]
        cos, sin = self._rope.at(batch.positions)
        logits = np.empty((len(batch.logit_rows), self._vocab), np.float32)
        self._engine.forward(
            batch.tokens,
            batch.positions,
            batch.sequence,
            batch.pages,
            batch.logit_rows,
            cos,
            sin,
            logits,
            tap,
            wanted,
        )
        return logits

    def close(self) -> None:
        """Free the KV cache and end the threads."""
        self._engine = None


def _tensors(layer: Layer) -> dict[str, object]:
    """A layer's norm vectors and matrices as the extension takes them, by name."""
    tensors: dict[str, object] = {name: getattr(layer, name) for name in _VECTORS}
    for name in _MATRICES:
        weight = getattr(layer, name)
        if weight is not None:
            tensors[name] = matrix(weight)
    return tensors


class _RopeTable:
    """Cosines and sines by position, computed when a position is first used."""

    def __init__(self, head_dim: int, base: float) -> None:
        self._frequencies = numerics.inverse_frequencies(head_dim, base)
        self._cos = self._sin = np.empty((0, head_dim // 2), np.float32)

    def at(self, positions: np.ndarray[tuple[int], np.dtype[np.int32]]) -> tuple[F32, F32]:
        """Tables float32 [T, head_dim / 2] for positions int32 [T]."""
        start, last = len(self._cos), int(positions.max(initial=0))
        if last >= start:
            stop = (last // _TABLE_STEP + 1) * _TABLE_STEP
            cos, sin = numerics.rope_table(self._frequencies, start, stop)
            self._cos = np.concatenate([self._cos, cos])
            self._sin = np.concatenate([self._sin, sin])
        return self._cos[positions], self._sin[positions]


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
