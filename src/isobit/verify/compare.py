"""Comparing two runs stage by stage: bits first, then figures."""

from collections.abc import Iterable
from functools import partial

import numpy as np

from isobit.backends.base import I32
from isobit.errors import NothingCompared
from isobit.model.graph import Key
from isobit.verify.arithmetic import Array
from isobit.verify.diff import ArgmaxChange, Cause, Diff, RouterChange, StageDiff
from isobit.verify.fit import fit, float32_explains
from isobit.verify.forward import flow
from isobit.verify.histogram import Histogram
from isobit.verify.metrics import Distance, differing, kl_divergence, router_margin
from isobit.verify.replay import Replay
from isobit.verify.trace_file import MARGIN, Manifest, Trace, where

NEAR_TIE = 0.01
"""Router margins up to this are near-ties: the last chosen expert's probability is within 1 % of
the first one's left out. Logits that moved further than this (1 % of a probability) did so by more
than a rounding."""
ONE_TOKEN = (
    "one token: attention is trivial, its only weight is 1, so scores, softmax and the cache are "
    "not put to the test"
)
_NONE = np.empty((0, 1), np.int32)
_KEPT_CHANGES = 2000  # of each kind; all are counted
_KEPT_POSITIONS = 400  # of a picture of layers and tokens
_KEPT_MARGINS = 5000  # of a picture of the router


class Comparer:
    """Builds a :class:`Diff` from stages as they come, in graph order, chunk after chunk."""

    def __init__(
        self,
        a: Manifest,
        b: Manifest,
        replay: Replay | None = None,
        *,
        layers: range | None = None,
        accuracy: bool = False,
        histograms: bool = False,
    ) -> None:
        self._layers = layers  # the others are what these are replayed from
        self.diff = Diff(a, b, notes=_notes(a, b), accuracy=accuracy)
        self._replay = replay
        self._histograms = histograms
        if histograms and replay is not None:
            self.diff.flow = flow(replay.graph)
        self._at: dict[Key, StageDiff] = {}
        self._logits: tuple[Array, Array] | None = None
        self._experts: tuple[int, Array, Array] = -1, _NONE, _NONE  # of which layer
        self._fitted: set[str] = set()

    def start(self, tokens: I32, positions: I32) -> None:
        """A chunk begins."""
        self._positions = positions
        self.diff.tokens += len(positions)
        if self._replay is not None:
            self._replay.start(tokens, positions)

    @np.errstate(all="ignore")  # what is compared may be NaN or infinite
    def add(
        self,
        stage: str,
        layer: int | None,
        a: Array,
        b: Array,
        margins: tuple[Array | None, Array | None] = (None, None),
    ) -> None:
        """Compare one stage's values [T, …]; ``margins`` stand in for router logits not given."""
        shaped = a.ndim > 2 and b.ndim > 2  # else one of them is of a file that says no shapes
        if a.size != b.size or len(a) != len(b) or not a.size or (shaped and a.shape != b.shape):
            raise NothingCompared(
                f"{stage}: expected values of one shape in both runs, got {a.shape} and {b.shape}"
            )
        if stage == "moe_router_indices" and not a.dtype.kind == b.dtype.kind == "i":
            raise NothingCompared(f"{stage}: expected integers, got {a.dtype} and {b.dtype}")
        if self._replay is not None:
            a = self._replay.shaped(stage, layer, a)
        elif a.ndim < b.ndim:  # a file that says no shapes
            a = a.reshape(b.shape)
        b = b.reshape(a.shape)
        if layer is not None and self._layers is not None and layer not in self._layers:
            if self._replay is not None:
                self._replay.put(stage, layer, a, b)
            return
        entry = self._at.get((stage, layer))
        if entry is None:
            entry = self._at[stage, layer] = StageDiff(stage, layer, a.shape)
            self.diff.stages.append(entry)
        before = entry.distance.differing
        shown = self._same_experts(stage, layer, a, b)
        entry.distance.add(*shown)
        if self._histograms:
            self._picture(entry, *shown)
        if self._replay is not None:
            self._judge(entry, a, b, differs=entry.distance.differing > before)
            self._replay.put(stage, layer, a, b)
        if stage == "moe_router_logits":
            self._logits = (a, b)
        elif stage == "moe_router_indices" and layer is not None and a.ndim == 2:
            self._compare_experts(layer, a, b, margins)
            self._logits = None
            self._experts = (layer, a, b)
        elif stage == "lm_head":
            self._compare_logits(a, b)

    def _picture(self, entry: StageDiff, a: Array, b: Array, positions: I32) -> None:
        """Note what a page shows: a histogram, and of each token the first stage that differs."""
        entry.histogram = entry.histogram or Histogram()
        entry.histogram.add(a, b)
        if entry.layer is None or entry.distance.identical:
            return
        rows = differing(a, b).reshape(len(a), -1).any(axis=1)
        for position in np.unique(positions[rows]).tolist():
            if position < _KEPT_POSITIONS:
                self.diff.parted.setdefault((entry.layer, position), entry.stage)

    def _same_experts(
        self, stage: str, layer: int | None, a: Array, b: Array
    ) -> tuple[Array, Array, I32]:
        """Values to measure and their positions; an expert's with the same expert's, if any."""
        of, ids_a, ids_b = self._experts
        if of != layer or not stage.startswith("moe_expert_") or a.shape[1] % ids_a.shape[1]:
            return a, b, self._positions
        if (ids_a == ids_b).all():
            return a, b, self._positions
        both, place = _places(ids_a, ids_b)
        if not both.any():
            return a, b, self._positions
        a, b = (x.reshape(*both.shape, -1) for x in (a, b))
        ordered = np.take_along_axis(b, place[..., None], axis=1)
        return a[both], ordered[both], np.broadcast_to(self._positions[:, None], both.shape)[both]

    def _judge(self, entry: StageDiff, a: Array, b: Array, *, differs: bool) -> None:
        assert self._replay is not None
        own = entry.own_error or Distance()
        if not self._replay.exact:
            self._replay.own_error(entry.stage, entry.layer, a, own)
            self._beyond(entry, a, own.relative_rms or 0.0)
        elif differs:
            origin = self._replay.origin(entry.stage, entry.layer, a, b, own)
            if entry.origin is None or origin.startswith("faulty"):
                entry.origin = origin
            if origin == "faulty in B":
                self._fit(entry, b, of_b=True)
            elif origin.startswith("faulty") and self.diff.a.numerics is None:
                self._beyond(entry, a, self._off(entry, a))  # none of isobit's: floats, perhaps
            elif origin.startswith("faulty"):
                self._fit(entry, a, of_b=False)
        entry.own_error = own if own.values else None

    def _off(self, entry: StageDiff, a: Array) -> float:
        """How far A's operation alone is from float64: relative RMS."""
        assert self._replay is not None
        inputs, total = self._replay.inputs(entry.stage, entry.layer), Distance()
        if inputs is not None:
            expected = self._replay.in_float64(entry.stage, entry.layer, inputs)
            total.add(a, expected, self._positions)
        return total.relative_rms or 0.0

    def _beyond(self, entry: StageDiff, a: Array, off: float) -> None:
        """Note an operation that is off by more than float32 is, and what it was done in."""
        if off > float32_explains(entry.stage, int(self._positions[-1])):
            entry.beyond_float32 = True
            self._fit(entry, a, of_b=False)

    def _fit(self, entry: StageDiff, value: Array, *, of_b: bool) -> None:
        """Find the arithmetic of a faulty operation; once a stage, for its first layer."""
        assert self._replay is not None
        if entry.stage in self._fitted:
            return
        self._fitted.add(entry.stage)
        inputs = self._replay.inputs(entry.stage, entry.layer, of_b=of_b)
        if inputs is not None and all(np.isfinite(x).all() for x in (value, *inputs)):
            compute = partial(self._replay.in_float64, entry.stage, entry.layer)
            entry.fit = fit(value, inputs, compute)

    def _compare_experts(
        self, layer: int, a: Array, b: Array, margins: tuple[Array | None, Array | None]
    ) -> None:
        d = self.diff
        d.router_rows += len(a)
        k = a.shape[1]
        wrong = np.zeros(len(a), bool)
        drift = None
        if self._logits is not None and self._logits[0].shape[1] < k:
            raise NothingCompared(
                f"moe_router_indices of layer {layer}: expected at most "
                f"{self._logits[0].shape[1]} experts, as many as there are logits, got {k}"
            )
        if self._logits is not None:
            margins = (router_margin(self._logits[0], k), router_margin(self._logits[1], k))
            drift = np.abs(self._logits[0].astype(np.float64) - self._logits[1]).max(axis=1)
            others = _not_top(self._logits[0], a), _not_top(self._logits[1], b)
            wrong = others[0] | others[1]
            if (others[0] & others[1]).any():  # a bias or groups have a part in the choice, too
                wrong[:], margins = False, (None, None)
        same_order = (a == b).all(axis=1)
        same_set = (np.sort(a, axis=1) == np.sort(b, axis=1)).all(axis=1)
        d.router_reordered += int(np.count_nonzero(same_set & ~same_order))
        a_margins, b_margins = margins
        if self._histograms and drift is not None and a_margins is not None:
            assert b_margins is not None
            least = np.minimum(a_margins.astype(np.float64), b_margins)
            rows = zip(self._positions, least, drift, ~same_set, strict=True)
            more = [
                (layer, int(p), float(m), float(x), bool(c))
                for p, m, x, c in rows
                if np.isfinite(m) and np.isfinite(x)
            ]
            d.margins += more[: _KEPT_MARGINS - len(d.margins)]
        for i in np.flatnonzero(~same_set).tolist():
            pair = tuple(None if m is None else float(m[i]) for m in margins)
            cause: Cause = "unknown"
            if wrong[i]:
                cause = "selection"
            elif pair[0] is not None and pair[1] is not None:
                moved = 0.0 if drift is None else float(drift[i])
                cause = "near-tie" if max(pair[0], pair[1], moved) <= NEAR_TIE else "error"
            d.router_changed += 1
            d.router_causes[cause] += 1
            if len(d.router) < _KEPT_CHANGES:
                set_a, set_b = set(a[i].tolist()), set(b[i].tolist())
                d.router.append(
                    RouterChange(
                        layer,
                        int(self._positions[i]),
                        sorted(set_a - set_b),
                        sorted(set_b - set_a),
                        pair[0],
                        pair[1],
                        None if drift is None else float(drift[i]),
                        cause,
                    )
                )

    def _compare_logits(self, a: Array, b: Array) -> None:
        d = self.diff
        finite = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
        d.nonfinite_rows += int(np.count_nonzero(~finite))
        a, b, positions = a[finite], b[finite], self._positions[finite]
        if not len(a):
            return
        d.logit_rows += len(a)
        kl = kl_divergence(b, a)
        d.kl_sum += float(kl.sum())
        d.kl_max = max(d.kl_max, float(kl.max()))
        room = _KEPT_CHANGES - len(d.kl)
        d.kl += list(zip(positions.tolist(), kl.tolist(), strict=True))[:room]
        top_a, top_b = a.argmax(axis=1), b.argmax(axis=1)
        for i in np.flatnonzero(top_a != top_b).tolist():
            d.argmax_changed += 1
            if len(d.argmax) < _KEPT_CHANGES:
                x, y = int(top_a[i]), int(top_b[i])
                gap_a, gap_b = float(a[i, x] - a[i, y]), float(b[i, y] - b[i, x])
                d.argmax.append(ArgmaxChange(int(positions[i]), x, y, gap_a, gap_b))


def _places(wanted: Array, ids: Array) -> tuple[Array, Array]:
    """Which of ``wanted``, int32 [T, k], are in the same row of ``ids``, and where; by sorting, as
    a file may say that a token has thousands of experts."""
    order = np.argsort(ids, axis=1, kind="stable")
    row = np.arange(len(ids), dtype=np.int64)[:, None] << 32  # so that rows stay apart
    there = (row + np.take_along_axis(ids, order, axis=1)).ravel()
    found = np.searchsorted(there, row + wanted).clip(0, there.size - 1)
    return there[found] == row + wanted, order.ravel()[found]


def _not_top(logits: Array, chosen: Array) -> Array:
    """Rows whose chosen experts are not the largest logits, beyond a rounding's tie."""
    outside = np.ones(logits.shape, bool)
    np.put_along_axis(outside, chosen.clip(0, logits.shape[1] - 1), False, axis=1)
    best_outside = np.where(outside, logits, -np.inf).max(axis=1)
    worst_chosen = np.where(outside, np.inf, logits).min(axis=1)
    wrong = best_outside - worst_chosen > 1e-6 * np.abs(worst_chosen).clip(1)
    distinct = (~outside).sum(axis=1) == chosen.shape[1]
    out: Array = wrong | ~distinct
    return out


def _notes(a: Manifest, b: Manifest) -> list[str]:
    alone = [ONE_TOKEN] if len(a.tokens) == 1 else []
    names = ("model_sha256", "activation_bits", "numerics", "isobit")
    return alone + [
        f"{name}: A has {x}, B has {y}"
        for name in names
        if (x := getattr(a, name)) != (y := getattr(b, name)) and None not in (x, y)
    ]


def compare(
    a: Trace,
    b: Trace,
    stages: frozenset[str] | None = None,
    layers: Iterable[int] | None = None,
    replay: Replay | None = None,
    *,
    histograms: bool = False,
) -> Diff:
    """Compare two traces of the same tokens; stages and layers default to all that were recorded.

    With a ``replay`` (of the model, in B's arithmetic) each difference gets an origin, or, where
    B follows no specification, each operation its own error; with ``histograms`` every stage gets
    one, for the report. Raises NothingCompared if a stage is in one trace only, or if there is
    nothing to compare.
    """
    if a.manifest.tokens != b.manifest.tokens:
        raise NothingCompared(
            "expected two traces of the same tokens, got different ones: "
            + _parting(a.manifest.tokens, b.manifest.tokens)
        )
    positions = np.intersect1d(a.manifest.positions, b.manifest.positions).astype(np.int32)
    if not positions.size:
        raise NothingCompared("expected tokens recorded in both traces, got none in common")
    comparer = Comparer(a.manifest, b.manifest, replay, histograms=histograms)
    comparer.start(np.array(a.manifest.tokens, np.int32)[positions], positions)
    rows_a, rows_b = _rows(a, positions), _rows(b, positions)
    for key in _common(a, b, stages, layers, comparer.diff):
        stage, layer = key
        value_a, value_b = _taken(a, key, rows_a), _taken(b, key, rows_b)
        margins: tuple[Array | None, Array | None] = (None, None)
        if layer is not None and stage == "moe_router_indices":
            margins = _margins(a, layer, rows_a), _margins(b, layer, rows_b)
        comparer.add(stage, layer, value_a, value_b, margins)
    if not comparer.diff.stages:
        raise NothingCompared("expected stages in both traces, got none to compare")
    return comparer.diff


def _parting(a: list[int], b: list[int]) -> str:
    """Where two lists of tokens part."""
    pairs = enumerate(zip(a, b, strict=False))
    at = next((f"A has {x} at position {i}, B {y}" for i, (x, y) in pairs if x != y), None)
    return at or f"A has {len(a)}, B {len(b)}"


_ROWS = ("lm_head", "moe_router_logits", "moe_router_indices")


def _rows(trace: Trace, positions: I32) -> Array:
    return np.searchsorted(trace.manifest.positions, positions)


def _taken(trace: Trace, key: Key, rows: Array) -> Array:
    value, tokens = trace[key], len(trace.manifest.positions)
    if value.ndim < 2 or len(value) != tokens:
        raise NothingCompared(
            f"{key[0]}: expected values of {tokens} tokens, got shape {value.shape}"
        )
    if key[0] in _ROWS and value.ndim != 2:
        raise NothingCompared(f"{where(*key)}: expected one row a token, got shape {value.shape}")
    if (key[0] == "moe_router_indices") != (value.dtype == np.int32):
        expected = "whole numbers" if key[0] == "moe_router_indices" else "floats"
        raise NothingCompared(f"{where(*key)}: expected {expected}, got {value.dtype}")
    return value if len(rows) == len(value) else value[rows]


def _margins(trace: Trace, layer: int, rows: Array) -> Array | None:
    margins, tokens = trace.margin(layer), len(trace.manifest.positions)
    if margins is not None and margins.shape != (tokens,):
        raise NothingCompared(
            f"{MARGIN} of layer {layer}: expected shape {(tokens,)}, got {margins.shape}"
        )
    return None if margins is None else margins[rows]


def _never_recorded(trace: Trace, other: Trace) -> set[str]:
    """Stages of ``other`` that another engine records in no layer: nobody need name the rest."""
    if trace.manifest.numerics is not None:
        return set()
    return {s for s, _ in other.stages()} - {s for s, _ in trace.stages()}


def _common(
    a: Trace, b: Trace, stages: frozenset[str] | None, layers: Iterable[int] | None, diff: Diff
) -> list[Key]:
    """The stages to compare; refuses one that only a single trace has."""
    wanted_layers = None if layers is None else set(layers)

    def chosen(trace: Trace) -> list[Key]:
        return [
            (s, i)
            for s, i in trace.stages()
            if (stages is None or s in stages)
            and (i is None or wanted_layers is None or i in wanted_layers)
        ]

    in_a, in_b = chosen(a), chosen(b)
    silent = set(a.manifest.not_recorded) | set(b.manifest.not_recorded)
    if stages is None:
        silent |= _never_recorded(a, b) | _never_recorded(b, a)
    for mine, theirs, name in ((in_a, set(in_b), "B"), (in_b, set(in_a), "A")):
        for key in mine:
            if key not in theirs and key[0] not in silent:
                raise NothingCompared(
                    f"{where(*key)}: expected in both traces, missing in {name}; record both with "
                    "the same --stages and --layers, or name those to compare"
                )
    diff.not_compared = sorted(silent & {s for s, _ in in_a + in_b})
    if stages is not None:
        absent = stages - {s for s, _ in in_a}
        if absent:
            raise NothingCompared(f"{sorted(absent)[0]}: expected in both traces, found in none")
    for layer in sorted((wanted_layers or set()) - {i for _, i in a.stages()}):
        raise NothingCompared(f"layer {layer}: expected in both traces, found in none")
    common = set(in_b)
    return [key for key in in_a if key in common]
