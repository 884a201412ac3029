"""What differs between two runs: where they part, by how much, and what it changed."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal, cast

import numpy as np

from isobit.config import with_planes
from isobit.verify.fit import Fit
from isobit.verify.histogram import Histogram
from isobit.verify.metrics import Distance
from isobit.verify.replay import Origin
from isobit.verify.trace_file import Manifest, where

Cause = Literal["near-tie", "error", "selection", "unknown"]


@dataclass
class StageDiff:
    """One stage of one layer in both runs."""

    stage: str
    layer: int | None
    shape: tuple[int, ...]
    distance: Distance = field(default_factory=Distance)
    origin: Origin | None = None
    """What replay says of a difference; None if there is none or nothing was replayed."""
    own_error: Distance | None = None
    """Replayed: how far A's operation alone is off, on A's own inputs, where they were looked at:
    everywhere in float64, else in chunks that differ."""
    histogram: Histogram | None = None
    beyond_float32: bool = False
    """Replayed beside an oracle or another engine: A's operation alone is off by more than float32
    would be."""
    fit: Fit | None = None
    """The arithmetic that a faulty operation was done in, if one was found to fit: of the first
    layer of its stage that is faulty."""

    @property
    def where(self) -> str:
        """The stage and layer in words."""
        return where(self.stage, self.layer)


@dataclass
class RouterChange:
    """A token whose set of experts differs."""

    layer: int
    position: int
    only_a: list[int]
    only_b: list[int]
    margin_a: float | None
    margin_b: float | None
    """Router margins, see ``router_margin``."""
    drift: float | None
    """Largest difference between the two runs' router logits of this token."""
    cause: Cause
    """near-tie: both margins and the drift are at most 1 %. error: they are not; the router's input
    or logits moved too far. selection: a run did not choose the experts its own logits say."""


@dataclass
class ArgmaxChange:
    """A token after which the most likely next token differs."""

    position: int
    a: int
    b: int
    gap_a: float
    gap_b: float
    """How far the two tokens' logits lie apart in each run."""


@dataclass
class Diff:
    """All that differs between run A and run B; B is the one measured against."""

    a: Manifest
    b: Manifest
    stages: list[StageDiff] = field(default_factory=list)
    tokens: int = 0
    """Tokens whose values were compared; a trace may hold some of a run's alone."""
    router_rows: int = 0
    """Token-layers whose experts were compared."""
    router_changed: int = 0
    router_reordered: int = 0
    """Token-layers with the same experts in another order."""
    router_causes: Counter[str] = field(default_factory=Counter)
    router: list[RouterChange] = field(default_factory=list)
    logit_rows: int = 0
    """Tokens whose logits were compared as distributions; those below were not."""
    nonfinite_rows: int = 0
    """Tokens with a NaN or an infinity among either run's logits."""
    argmax_changed: int = 0
    argmax: list[ArgmaxChange] = field(default_factory=list)
    kl_sum: float = 0.0
    kl_max: float = 0.0
    kl: list[tuple[int, float]] = field(default_factory=list)
    """KL of each token's distribution, by position, of the first of them."""
    parted: dict[tuple[int, int], str] = field(default_factory=dict)
    """By layer and position, the first stage that differs; filled where histograms are."""
    margins: list[tuple[int, int, float, float, bool]] = field(default_factory=list)
    """Layer, position, the smaller of the two runs' router margins, how far the logits moved, and
    whether other experts were chosen; of the first token-layers, filled where histograms are."""
    flow: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    """By layer, which stage is read by which; filled where histograms are and something is
    replayed."""
    not_compared: list[str] = field(default_factory=list)
    """Stages one of the backends does not hold."""
    notes: list[str] = field(default_factory=list)
    accuracy: bool = False
    """B is an oracle or another engine: nothing is called identical."""

    @property
    def identical(self) -> bool:
        """Whether every compared bit is equal."""
        return all(s.distance.identical for s in self.stages)

    @property
    def first(self) -> StageDiff | None:
        """The first stage in graph order that differs."""
        return next((s for s in self.stages if not s.distance.identical), None)

    @property
    def floats(self) -> bool:
        """Whether A is another engine that computes in floats, and B isobit's own bits: most of its
        operations then differ by themselves, by rounding at the least. One whose bits are meant to
        be isobit's differs in few."""
        return self.a.numerics is None and 2 * len(self._wrong) > len(self.stages)

    @property
    def _wrong(self) -> list[StageDiff]:
        return [s for s in self.stages if s.origin is not None and s.origin.startswith("faulty")]

    @property
    def faulty(self) -> list[StageDiff]:
        """Stages that replay found to be wrong by themselves; of an engine that computes in
        floats, those that float32 rounding does not explain."""
        return self.beyond if self.floats else self._wrong

    @property
    def beyond(self) -> list[StageDiff]:
        """Stages that are off by themselves by more than float32 rounding explains."""
        return [s for s in self.stages if s.beyond_float32]

    @property
    def mean_kl(self) -> float | None:
        """Mean KL(B || A) of the next-token distributions, in nats."""
        return self.kl_sum / self.logit_rows if self.logit_rows else None

    def apart(self) -> list[tuple[StageDiff, float]]:
        """Layers that stand apart from the stage's others that differ; how many times their median.

        By relative RMS on a log scale: more than 3.5 robust deviations above and twice the median.
        """
        found = []
        for stage in dict.fromkeys(s.stage for s in self.stages if s.layer is not None):
            rows = [s for s in self.stages if s.stage == stage and s.distance.relative_rms]
            if len(rows) < 4:
                continue
            x = np.log10([s.distance.relative_rms or 1.0 for s in rows])
            middle = np.median(x)
            spread = 1.4826 * np.median(np.abs(x - middle)) + 0.05
            apart = ((x - middle) / spread > 3.5) & (x - middle > np.log10(2))
            found += [(rows[i], float(10 ** (x[i] - middle))) for i in np.flatnonzero(apart)]
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        first = self.first
        out = {
            "identical": None if self.accuracy else self.identical,
            "first": first and {"stage": first.stage, "layer": first.layer},
            "a": _run_json(self.a),
            "b": _run_json(self.b),
            "tokens_compared": self.tokens,
            "stages": [_stage_json(s, accuracy=self.accuracy) for s in self.stages],
            "router": {
                "rows": self.router_rows,
                "changed": self.router_changed,
                "reordered": self.router_reordered,
                "causes": dict(self.router_causes),
                "changes": [asdict(c) for c in self.router],
            },
            "argmax": {
                "rows": self.logit_rows,
                "nonfinite": self.nonfinite_rows,
                "changed": self.argmax_changed,
                "changes": [asdict(c) for c in self.argmax],
            },
            "kl": {
                "mean": self.mean_kl,
                "max": self.kl_max if self.logit_rows else None,
                "by_position": self.kl,
            },
            "apart": [
                {"stage": s.stage, "layer": s.layer, "times_median": t} for s, t in self.apart()
            ],
            "floats": self.floats,
            "not_compared": self.not_compared,
            "notes": self.notes,
        }
        return cast(dict[str, Any], finite(out))


def finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _run_json(run: Manifest) -> dict[str, Any]:
    return with_planes(asdict(run))


def _stage_json(s: StageDiff, *, accuracy: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"stage": s.stage, "layer": s.layer, "shape": list(s.shape)}
    out["identical"] = None if accuracy else s.distance.identical
    out |= _distance_json(s.distance) | {"origin": s.origin}
    if s.own_error is not None:
        out["own_relative_rms"] = s.own_error.relative_rms
    if s.beyond_float32:
        out["beyond_float32"] = True
    if s.fit is not None:
        out["fit"] = asdict(s.fit)
    return out


def _distance_json(d: Distance) -> dict[str, Any]:
    return {
        "values": d.values,
        "differing": d.differing,
        "max_ulp": d.max_ulp,
        "max_abs": d.max_abs,
        "cosine": d.cosine,
        "relative_rms": d.relative_rms,
        "nonfinite_a": d.nonfinite_a,
        "nonfinite_b": d.nonfinite_b,
        "first_position": d.first_position,
        "worst": [
            [w.position, w.index, *(v if np.isfinite(v) else str(v) for v in (w.a, w.b))]
            for w in d.worst
        ],
    }
