"""Ablation: what a guess about an operation's arithmetic is worth, as a figure.

Runs the specification with chosen stages in another arithmetic and measures how far the result is
from the oracle, beside how far the specification itself is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isobit.backends.base import I32
from isobit.errors import GateFailed, NothingCompared, UsageError
from isobit.model.weights import Weights
from isobit.numerics import quantise
from isobit.verify import coarse, graph
from isobit.verify.arithmetic import Array, Float64Arithmetic, SpecArithmetic
from isobit.verify.metrics import kl_divergence

SPECIFICATION = "specification"


@dataclass(frozen=True)
class Outcome:
    """One run's logits and experts beside the oracle's and the specification's."""

    name: str
    relative_rms: float
    """Of the logits, against the oracle's."""
    mean_kl: float
    """KL(oracle || run) of the next-token distributions, in nats."""
    token_layers: int
    changed_sets: int
    """Token-layers whose set of experts is not the oracle's."""
    argmax_changed: int
    """Tokens whose likeliest successor is not the oracle's."""
    sets_moved: int
    """Token-layers whose set of experts is not the specification's."""
    argmax_moved: int
    """Tokens whose likeliest successor is not the specification's."""
    factor: float
    """relative_rms over the specification's."""

    @property
    def share(self) -> float:
        """The share of the specification's squared error that is gone: 1 - factor², at least 0."""
        return max(0.0, 1 - self.factor**2)


@dataclass(frozen=True)
class _Result:
    logits: Array
    experts: list[Array]


class Ablation:
    """A model and tokens to try hypotheses on. Runs the oracle and the specification once.

    Raises GateFailed for a run whose logits are not finite.
    """

    def __init__(self, weights: Weights, tokens: Sequence[int], planes: int = 2) -> None:
        if len(tokens) < 2:
            raise NothingCompared(f"tokens: expected at least 2, got {len(tokens)}")
        self._graph = weights.graph
        self.stages = tuple(s for s in self._graph.names if s != "embedding")
        """Stages whose arithmetic can be exchanged."""
        self.n_layers = self._graph.n_layers
        self._tokens = np.array(tokens, np.int32)
        self._spec = SpecArithmetic(planes)
        self._float64 = Float64Arithmetic()
        self._reversed = coarse.ReversedArithmetic(planes)
        self._oracle = self._run(
            lambda r, stage, layer, inputs: r.compute(stage, layer, inputs, self._float64)
        )
        self._base = self._run(self._compute({}, frozenset()))
        self.specification = self._outcome(SPECIFICATION, self._base)

    def parse(self, text: str) -> tuple[str, str]:
        """``STAGE=ARITHMETIC`` as a pair; raises UsageError with the valid names."""
        stage, _, arithmetic = text.partition("=")
        if stage not in self.stages:
            raise UsageError(f"stage: expected one of {', '.join(self.stages)}; got {stage!r}")
        coarse.rounding(arithmetic)
        return stage, arithmetic

    def try_out(self, choices: Mapping[str, str], layers: Iterable[int] | None = None) -> Outcome:
        """Run with stages in other arithmetics (``{"qkv_matmul": "int8/256"}``), in all layers.

        ``layers`` limits the stages that belong to a layer. With attn_scores or attn_softmax,
        attention is weighed from the softmax in float64 over values as the KV cache rounds them.
        """
        name = " ".join(f"{stage}={arithmetic}" for stage, arithmetic in choices.items())
        if len(choices) > 2:
            name = f"{len(choices)} stages together"
        wanted = frozenset(range(self.n_layers) if layers is None else layers)
        maps = not self._graph.on_request.isdisjoint(choices)
        return self._outcome(name, self._run(self._compute(choices, wanted), maps=maps))

    def rank(
        self,
        arithmetic: str,
        layers: Iterable[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Outcome]:
        """Try every stage by itself; the largest effect on the error first."""
        found = []
        for i, stage in enumerate(self.stages):
            found.append(self.try_out({stage: arithmetic}, layers))
            if progress is not None:
                progress(i + 1, len(self.stages))
        return sorted(found, key=lambda o: -abs(o.factor**2 - 1))

    def _compute(self, choices: Mapping[str, str], layers: frozenset[int]) -> graph.Compute:
        maps = not self._graph.on_request.isdisjoint(choices)

        def compute(
            run: graph.Run, stage: str, layer: int | None, inputs: Sequence[Array]
        ) -> Array:
            here = layer is None or layer in layers
            if stage == "attention" and maps and here and stage not in choices:
                v, dv = quantise(np.ascontiguousarray(inputs[2]), planes=2)
                out = weigh(run.value("attn_softmax", layer), v * dv[..., None])
                return out.reshape(len(out), -1).astype(np.float32)
            arithmetic = choices.get(stage) if here else None
            if arithmetic is None:
                return run.compute(stage, layer, inputs, self._spec)
            if arithmetic == "f32-reversed":
                return run.compute(stage, layer, inputs, self._reversed)
            rounded = coarse.rounding(arithmetic)
            if rounded is not None:
                inputs = [x if x.dtype.kind == "i" else rounded(x) for x in inputs]
            value = run.compute(stage, layer, inputs, self._float64)
            return value if value.dtype.kind == "i" else value.astype(np.float32)

        return compute

    def _run(self, compute: graph.Compute, *, maps: bool = False) -> _Result:
        experts: list[Array] = []

        def tap(stage: str, _: int | None, value: Array) -> None:
            if stage == "moe_router_indices":
                experts.append(np.sort(value, axis=1))

        positions: I32 = np.arange(len(self._tokens), dtype=np.int32)
        stages = frozenset({"moe_router_indices"}) | (self._graph.on_request if maps else set())
        logits = graph.forward(
            graph.Run(self._graph), self._tokens, positions, compute, tap, stages
        )
        if not np.isfinite(logits).all():
            raise GateFailed("expected finite logits, got NaN or infinity")
        return _Result(logits, experts)

    def _outcome(self, name: str, got: _Result) -> Outcome:
        true = self._oracle.logits
        rms = float(np.linalg.norm(got.logits - true) / np.linalg.norm(true))
        base = self.specification.relative_rms if name != SPECIFICATION else rms

        def sets(other: _Result) -> int:
            pairs = zip(got.experts, other.experts, strict=True)
            return sum(int(np.count_nonzero((a != b).any(axis=1))) for a, b in pairs)

        def tops(other: _Result) -> int:
            changed = got.logits.argmax(axis=1) != other.logits.argmax(axis=1)
            return int(np.count_nonzero(changed))

        return Outcome(
            name=name,
            relative_rms=rms,
            mean_kl=float(kl_divergence(true, got.logits).mean()),
            token_layers=sum(len(e) for e in got.experts),
            changed_sets=sets(self._oracle),
            argmax_changed=tops(self._oracle),
            sets_moved=sets(self._base),
            argmax_moved=tops(self._base),
            factor=rms / base if base else 1.0,
        )


def weigh(weights: Array, values: Array) -> Array:
    """Values [N, G, size] weighed by softmax weights [T, H, N], in float64: [T, H, size]."""
    out = np.empty((*weights.shape[:2], values.shape[2]))
    for h in range(out.shape[1]):
        v = values[:, h * values.shape[1] // out.shape[1]].astype(np.float64)
        out[:, h] = weights[:, h].astype(np.float64) @ v
    return out
