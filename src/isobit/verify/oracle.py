"""The float64 oracle: what the model's weights say, with no rounding of activations.

A yardstick for accuracy and nothing else: no backend computes like this, and nothing is ever
called identical to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import I32
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.verify import forward as graph
from isobit.verify.arithmetic import Array, Float64Arithmetic
from isobit.verify.metrics import router_margin
from isobit.verify.trace import Emit, pieces
from isobit.verify.trace_file import Manifest

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class OracleRun:
    """One sequence of T tokens through L layers."""

    logits: F64
    """[T, vocabulary]"""
    experts: I32
    """[L, T, k], most likely first; [0, T, 0] for a dense model."""
    margins: F64
    """[L, T]: see ``router_margin``."""


class Oracle:
    """A model's weights in float64."""

    def __init__(self, weights: Weights, model: str = "", sha256: str | None = None) -> None:
        self.weights, self.graph = weights, weights.graph
        self.config = weights.config
        self.arithmetic = Float64Arithmetic()
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
            stages=list(self.graph.names),
        )

    def run(
        self,
        tokens: Sequence[int],
        chunk: int,
        stages: frozenset[str],
        emit: Emit,
        *,
        step: bool = False,
    ) -> None:
        """Run a sequence in chunks and emit its stages."""
        run = graph.Run(self.graph)
        for start, stop in pieces(len(tokens), chunk, step=step):
            part = np.array(tokens[start:stop], np.int32)
            positions = np.arange(start, stop, dtype=np.int32)

            def tap(stage: str, layer: int | None, value: Array, at: I32 = positions) -> None:
                emit(stage, layer, at, value)

            graph.forward(run, part, positions, self._compute, tap, stages)

    def evaluate(self, tokens: Sequence[int]) -> OracleRun:
        """Every token's logits and experts, for a sequence that starts at position 0."""
        seen: dict[str, list[Array]] = {"moe_router_indices": [], "moe_router_logits": []}
        ids = np.array(tokens, np.int32)
        logits = graph.forward(
            graph.Run(self.graph),
            ids,
            np.arange(len(ids), dtype=np.int32),
            self._compute,
            lambda stage, _, value: seen[stage].append(value),
            frozenset(seen),
        )
        k, chosen = self.config.n_experts_used, seen["moe_router_indices"]
        experts = np.array(chosen, np.int32).reshape(len(chosen), len(ids), k)
        margins = [router_margin(z, k) for z in seen["moe_router_logits"]]
        return OracleRun(logits, experts, np.array(margins).reshape(len(margins), len(ids)))

    def _compute(
        self, run: graph.Run, stage: str, layer: int | None, inputs: Sequence[Array]
    ) -> Array:
        return run.compute(stage, layer, inputs, self.arithmetic)
