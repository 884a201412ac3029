"""Ablation: the effect of another arithmetic on chosen operations, as a figure.

Runs the specification with chosen stages in another arithmetic and measures how far the result is
from the oracle, beside how far the specification itself is. A ranking goes the other way: one stage
alone is as the specification has it, all others are exact, and every layer takes the oracle's
experts. So a stage is blamed for what it does itself: errors that meet cancel or add up, which a
repair of one of them shows with either sign; and one other expert moves the logits by more than any
rounding does. Over several prompts, so that a figure comes with its uncertainty.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from isobit.backends.base import I32
from isobit.errors import GateFailed, NotRun, UsageError, did_you_mean
from isobit.model.weights import Weights
from isobit.numerics import quantise
from isobit.numerics.ops import TopK
from isobit.verify import forward as graph
from isobit.verify import other_arithmetics
from isobit.verify.arithmetic import Arithmetic, Array, Float64Arithmetic, SpecArithmetic
from isobit.verify.fit import Fit, fit
from isobit.verify.metrics import kl_divergence

SPECIFICATION = "specification"
OWN = "own"
"""The specification's arithmetic, as a choice among others."""
_ROUTER = ("moe_router", "moe_router_indices")
_FAR = 300.0  # below the largest logit: no weight left in float64 either
Experts = Mapping[int, Array]
"""By layer, the sets of experts, int [T, k], ascending; a dense layer has none."""


@dataclass(frozen=True)
class Outcome:
    """The runs of one choice over all prompts, beside the oracle's and the specification's."""

    name: str
    relative_rms: float
    """Of all logits, against the oracle's."""
    mean_kl: float
    """KL(oracle || run) of the next-token distributions, in nats."""
    tokens: int
    token_layers: int
    changed_sets: int
    """Token-layers whose set of experts is not the oracle's; with pinned experts, would not be."""
    argmax_changed: int
    """Tokens whose most likely successor is not the oracle's."""
    sets_moved: int
    """Token-layers whose set of experts is not (or would not be) the specification's."""
    argmax_moved: int
    """Tokens whose most likely successor is not the specification's."""
    factor: float
    """relative_rms over the specification's."""
    shares: tuple[float, ...]
    """Of each prompt: the share of the specification's squared error that is gone, negative where
    the error has grown; for a stage alone, the share that there is."""
    pinned: bool
    """The oracle's experts were used in every layer."""
    alone: bool = False
    """All other stages were exact."""

    @property
    def share(self) -> float:
        """The mean of ``shares``."""
        return float(np.mean(self.shares))

    @property
    def uncertainty(self) -> float | None:
        """Twice the standard error of ``share`` over the prompts; None for a single one."""
        n = len(self.shares)
        return float(2 * np.std(self.shares, ddof=1) / np.sqrt(n)) if n > 1 else None


def by_share(found: Iterable[Outcome]) -> list[Outcome]:
    """The largest share of the error first."""
    return sorted(found, key=lambda outcome: -outcome.share)


@dataclass(frozen=True)
class _Result:
    logits: Array
    experts: dict[int, Array]
    """By each layer's own logits, whether they were used or not."""


class Ablation:
    """A model and prompts to try hypotheses on. Runs the oracle and the specification once.

    Raises GateFailed for a run whose logits are not finite.
    """

    def __init__(self, weights: Weights, prompts: Sequence[Sequence[int]], planes: int = 2) -> None:
        if not prompts or not all(prompts):
            raise UsageError("tokens: expected at least 1 in each prompt, got none")
        self._config, self._graph = weights.config, weights.graph
        self.stages = tuple(s for s in self._graph.names if s != "embedding")
        """Stages whose arithmetic can be exchanged."""
        self.n_layers = self._graph.n_layers
        self._prompts = [np.array(tokens, np.int32) for tokens in prompts]
        self._spec = SpecArithmetic(planes)
        self._float64 = Float64Arithmetic()
        self._reversed = other_arithmetics.ReversedArithmetic(planes)
        self._pins: list[Experts | None] = [None] * len(prompts)
        self._oracle = self._run(
            lambda r, stage, layer, inputs: r.compute(stage, layer, inputs, self._float64)
        )
        self._pins = [found.experts for found in self._oracle]
        self._base = {False: self._run(self._compute({}, frozenset()))}
        self.specification = self._outcome(SPECIFICATION, self._base[False], pinned=False)

    def parse(self, text: str) -> tuple[str, str]:
        """``STAGE=ARITHMETIC`` as a pair; raises UsageError with the valid names."""
        stage, _, arithmetic = text.partition("=")
        if stage not in self.stages:
            near = did_you_mean(stage, self.stages) or f"; expected {', '.join(self.stages)}"
            raise UsageError(f"--stage: no such stage: {stage!r}{near}")
        other_arithmetics.rounding(arithmetic)
        return stage, arithmetic

    def pinned_specification(self) -> Outcome:
        """The specification with the oracle's experts in every layer."""
        if True not in self._base:
            self._base[True] = self._run(self._compute({}, frozenset()), pinned=True)
        return self._outcome(f"{SPECIFICATION}, experts pinned", self._base[True], pinned=True)

    def everything(self) -> Outcome:
        """What the stages of a ranking are shares of: the specification with the oracle's
        experts."""
        self.pinned_specification()
        name = f"{SPECIFICATION}, experts pinned"
        return self._outcome(name, self._base[True], pinned=True, alone=True)

    def try_out(
        self,
        choices: Mapping[str, str],
        layers: Iterable[int] | None = None,
        *,
        pinned: bool = False,
    ) -> Outcome:
        """Run with stages in other arithmetics (``{"qkv_matmul": "int8/256"}``), in all layers.

        ``layers`` limits the stages that belong to a layer. With attn_scores or attn_softmax,
        attention is weighed from the softmax in float64 over values as the KV cache rounds them.
        ``pinned``: with the oracle's experts, beside the specification with the same.
        """
        if pinned:
            self.pinned_specification()
        name = " ".join(f"{stage}={arithmetic}" for stage, arithmetic in choices.items())
        if len(choices) > 2:
            name = f"{len(choices)} stages together"
        wanted = self._wanted(choices, layers)
        maps = not self._graph.on_request.isdisjoint(choices)
        found = self._run(self._compute(choices, wanted), maps=maps, pinned=pinned)
        return self._outcome(name, found, pinned=pinned)

    def alone(
        self, stage: str, arithmetic: str = OWN, layers: Iterable[int] | None = None
    ) -> Outcome:
        """Run one stage in the specification's arithmetic, or another, and all others in float64,
        with the oracle's experts: what it does to the logits by itself."""
        self.pinned_specification()
        wanted = self._wanted([stage], layers)
        compute = self._compute({stage: arithmetic}, wanted, others=self._float64)
        found = self._run(compute, maps=stage in self._graph.on_request, pinned=True)
        name = stage if arithmetic == OWN else f"{stage}={arithmetic}"
        return self._outcome(name, found, pinned=True, alone=True)

    def rank(self, arithmetic: str = OWN, layers: Iterable[int] | None = None) -> Iterator[Outcome]:
        """Every stage of these layers alone, in the graph's order."""
        layers = None if layers is None else [*layers]
        for stage in filter(lambda stage: self._places(stage, layers), self.stages):
            yield self.alone(stage, arithmetic, layers)

    def _places(self, stage: str, layers: Iterable[int] | None) -> list[int | None]:
        """The layers that a stage is exchanged in, None for one that belongs to no layer."""
        wanted = {None, *(range(self.n_layers) if layers is None else layers)}
        return [layer for name, layer in self._graph.stages if name == stage and layer in wanted]

    def _wanted(self, stages: Iterable[str], layers: Iterable[int] | None) -> frozenset[int]:
        """The layers to exchange stages in. Raises UsageError where one of them is in none: it
        would be found to do nothing."""
        wanted = frozenset(range(self.n_layers) if layers is None else layers)
        for stage in stages:
            if not self._places(stage, wanted):
                raise UsageError(f"layers: expected one with {stage}, got {sorted(wanted)}")
        return wanted

    def fits(self, layers: Iterable[int] | None = None) -> dict[str, Fit]:
        """The arithmetic that the specification does each stage in, as far as one that has a name
        explains its error: of the first layer, on the inputs of a run of the first prompt."""
        wanted = frozenset(range(self.n_layers) if layers is None else layers)
        found: dict[str, Fit] = {}
        tried: set[str] = set()

        def compute(
            run: graph.Run, stage: str, layer: int | None, inputs: Sequence[Array]
        ) -> Array:
            value = run.compute(stage, layer, inputs, self._spec)
            if stage in tried or (layer is not None and layer not in wanted):
                return value
            tried.add(stage)
            again = partial(run.compute, stage, layer, a=self._float64)
            if (best := fit(value, inputs, again)) is not None:
                found[stage] = best
            return run.compute(stage, layer, inputs, self._spec)  # its state, too

        self._one(compute, self._prompts[0], self._pins[0], maps=False)
        return found

    def _compute(
        self,
        choices: Mapping[str, str],
        layers: frozenset[int],
        others: Arithmetic | None = None,
    ) -> graph.Compute:
        """Chosen stages in their arithmetics, the others in ``others`` (the specification's)."""
        others = others or self._spec
        maps = not self._graph.on_request.isdisjoint(choices)

        def compute(
            run: graph.Run, stage: str, layer: int | None, inputs: Sequence[Array]
        ) -> Array:
            here = layer is None or layer in layers
            if stage == "attention" and maps and here and stage not in choices:
                values = inputs[2]
                if others is self._spec:
                    v, dv = quantise(np.ascontiguousarray(values), planes=2)
                    values = v * dv[..., None]
                out = weigh(run.value("attn_softmax", layer), values)
                return out.reshape(len(out), -1).astype(inputs[0].dtype)
            arithmetic = choices.get(stage) if here else None
            if arithmetic is None:
                return run.compute(stage, layer, inputs, others)
            if arithmetic in (OWN, "f32-reversed"):
                chosen = self._spec if arithmetic == OWN else self._reversed
                inputs = [x if x.dtype.kind == "i" else x.astype(np.float32) for x in inputs]
                return run.compute(stage, layer, inputs, chosen)
            rounded = other_arithmetics.rounding(arithmetic)
            if rounded is not None:
                if stage in _ROUTER:  # experts that are pinned away have no part in its scale
                    hidden = inputs[0] < inputs[0].max() - _FAR
                    seen = rounded(np.where(hidden, 0, inputs[0]))
                    inputs = [np.where(hidden, inputs[0], seen)]
                else:
                    inputs = [x if x.dtype.kind == "i" else rounded(x) for x in inputs]
            value = run.compute(stage, layer, inputs, self._float64)
            return value if value.dtype.kind == "i" else value.astype(np.float32)

        return compute

    def _run(
        self, compute: graph.Compute, *, maps: bool = False, pinned: bool = False
    ) -> list[_Result]:
        pins = self._pins if pinned else [None] * len(self._prompts)
        return [
            self._one(compute, tokens, pin, maps=maps)
            for tokens, pin in zip(self._prompts, pins, strict=True)
        ]

    def _one(
        self, compute: graph.Compute, tokens: I32, pin: Experts | None, *, maps: bool
    ) -> _Result:
        experts: dict[int, Array] = {}

        def pinning(
            run: graph.Run, stage: str, layer: int | None, inputs: Sequence[Array]
        ) -> Array:
            if layer is None or stage not in _ROUTER:
                return compute(run, stage, layer, inputs)
            own = compute(run, stage, layer, inputs)
            if stage == "moe_router_indices":
                experts[layer] = np.sort(own, axis=1)
            if pin is None:
                return own
            masked, kept = self._masked(inputs[0], pin[layer])
            value = compute(run, stage, layer, [masked])
            if stage == "moe_router_indices" and (np.sort(value, axis=1) != pin[layer]).any():
                raise NotRun(f"layer {layer}: expected a router whose experts can be pinned")
            choice = next(o.operation for o in self._graph.stages[stage, layer].ops)
            if stage == "moe_router" and isinstance(choice, TopK) and choice.softmax:
                value = value if choice.normalise else value * kept[:, None].astype(value.dtype)
            return value

        positions: I32 = np.arange(len(tokens), dtype=np.int32)
        stages = self._graph.on_request if maps else frozenset[str]()
        run = graph.Run(self._graph)
        logits = graph.forward(run, tokens, positions, pinning, None, stages)
        if not np.isfinite(logits).all():
            raise GateFailed("expected finite logits, got NaN or infinity")
        return _Result(logits, experts)

    @staticmethod
    def _masked(scores: Array, chosen: Array) -> tuple[Array, Array]:
        """What a router chooses from, so that it is ``chosen``; the share that these have of the
        softmax of all."""
        outside = np.ones(scores.shape, bool)
        np.put_along_axis(outside, chosen, False, axis=1)
        top = scores.max(axis=1, keepdims=True)
        e = np.exp(scores.astype(np.float64) - top)
        kept = np.where(outside, 0, e).sum(axis=1) / e.sum(axis=1)
        return np.where(outside, scores.min() - np.float32(_FAR), scores), kept

    def _outcome(
        self, name: str, got: list[_Result], *, pinned: bool, alone: bool = False
    ) -> Outcome:
        base = self._base[pinned]
        off = np.array([_off(g, o) for g, o in zip(got, self._oracle, strict=True)])
        off_base = np.array([_off(b, o) for b, o in zip(base, self._oracle, strict=True)])
        size = sum(float(np.sum(o.logits**2)) for o in self._oracle)
        rms, rms_base = np.sqrt(off.sum() / size), np.sqrt(off_base.sum() / size)
        nothing = np.full_like(off, 0 if alone else 1)
        there = np.divide(off, off_base, out=nothing, where=off_base > 0)
        kl = [kl_divergence(o.logits, g.logits) for g, o in zip(got, self._oracle, strict=True)]
        return Outcome(
            name=name,
            relative_rms=float(rms),
            mean_kl=float(np.concatenate(kl).mean()),
            tokens=sum(map(len, self._prompts)),
            token_layers=sum(len(e) for g in got for e in g.experts.values()),
            changed_sets=_sets(got, self._oracle),
            argmax_changed=_tops(got, self._oracle),
            sets_moved=_sets(got, base),
            argmax_moved=_tops(got, base),
            factor=float(rms / rms_base) if rms_base else 1.0,
            shares=tuple((there if alone else 1 - there).tolist()),
            pinned=pinned,
            alone=alone,
        )


def _off(got: _Result, true: _Result) -> float:
    """The sum of squared differences of the logits."""
    return float(np.sum((got.logits - true.logits) ** 2))


def _sets(a: list[_Result], b: list[_Result]) -> int:
    """Token-layers with other experts."""
    pairs = [
        (x, o.experts[layer]) for g, o in zip(a, b, strict=True) for layer, x in g.experts.items()
    ]
    return sum(int(np.count_nonzero((x != y).any(axis=1))) for x, y in pairs)


def _tops(a: list[_Result], b: list[_Result]) -> int:
    """Tokens with another most likely successor."""
    pairs = zip(a, b, strict=True)
    return sum(int((g.logits.argmax(axis=1) != o.logits.argmax(axis=1)).sum()) for g, o in pairs)


def weigh(weights: Array, values: Array) -> Array:
    """Values [N, G, size] weighed by softmax weights [T, H, N], in float64: [T, H, size]."""
    out = np.empty((*weights.shape[:2], values.shape[2]))
    for h in range(out.shape[1]):
        v = values[:, h * values.shape[1] // out.shape[1]].astype(np.float64)
        out[:, h] = weights[:, h].astype(np.float64) @ v
    return out
