"""Promises against evidence: which obligation holds on which backend, as far as was measured."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from isobit import numerics
from isobit.backend_names import BACKENDS
from isobit.contracts.check import depends_on, described
from isobit.contracts.evidence import Evidence, Result
from isobit.contracts.kinds import FIGURES, SPEED, Measure, never_fails
from isobit.contracts.references import obligation_id, served
from isobit.contracts.schema import SHIPPED, Contract, FalsificationTest
from isobit.contracts.target import sample_digest

State = Literal["discharged", "stale", "not run", "failing"]
_WORST: tuple[State, ...] = ("failing", "not run", "stale", "discharged")
NOWHERE = "-"
"""The column of a contract that measures nothing."""


@dataclass(frozen=True)
class Flips:
    """Of the prompts tried on two sides, how many go on with another token."""

    tried: int = 0
    flipped: int = 0

    def __str__(self) -> str:
        if not self.tried:
            return "no prompt was tried on two sides"
        which = "none" if not self.flipped else str(self.flipped)
        return f"of {self.tried} prompts tried, {which} flipped"


@dataclass(frozen=True)
class TestState:
    """What the evidence says of one test on one backend."""

    test: str
    state: State
    why: str
    """The figures of a pass, or the reason of anything else."""
    flips: Flips = Flips()
    """Failing: of the prompts tried between the two sides that it is about."""


Side = tuple[str, str, int, str]
"""What runs on one side, and what it is held to: backend, the model's digest, activation bits,
and "oracle", "hf" or, of any backend, nothing. What prompts do between other sides says nothing."""
Tried = dict[Side, dict[tuple[int, ...], bool]]
"""By side, the prompts that were tried, and which of them flipped."""


@dataclass
class Row:
    """One obligation; ``cells`` by backend. A backend that it does not speak of has no cell."""

    id: str
    property: str
    divergence: str | None = None
    """The class that the contract gives it."""
    is_runtime: bool = False
    """Only speed or memory is measured of it, not what is computed."""
    cells: dict[str, list[TestState]] = field(default_factory=dict)

    def title(self) -> str:
        """Id, promise and class."""
        return f"{self.id}: {self.property}" + (f" [{self.divergence}]" if self.divergence else "")

    def state(self, backend: str) -> State | None:
        """The worst state of its tests; None if it does not speak of the backend."""
        states = {t.state for t in self.cells.get(backend, [])}
        return next((s for s in _WORST if s in states), None)


@dataclass
class Status:
    """A contract's obligations × backends."""

    name: str
    version: str
    declared: str | None
    """What the contract's authors say."""
    backends: list[str]
    rows: list[Row]
    evidence: list[str]
    """What there is, one line each."""
    flips: Flips = Flips()
    """Of fresh evidence, all sides together."""
    shipped: dict[str, list[str]] = field(default_factory=dict)
    """Stages that are said to be there ("M-1 is SHIPPED"), and the obligations that they are to
    discharge."""

    def summary(self) -> str:
        """How many cells there are of each state."""
        return ", ".join(f"{self.count(s)} {s}" for s in reversed(_WORST))

    def count(self, state: State) -> int:
        """Cells of a state."""
        return sum(row.state(b) == state for row in self.rows for b in self.backends)


def status(
    contract: Contract, stem: str, evidence: Sequence[Evidence], folder: Path | None = None
) -> Status:
    """Compare a contract (the file ``stem``.yaml in ``folder``) with the evidence there is."""
    path = (folder or Path()) / f"{stem}.yaml"
    mine = [e for e in evidence if e.contract == stem]
    tests = contract.falsification_tests
    named: set[str] = {b for t in tests if t.measure is not None for b in t.measure.backends}
    backends = [b for b in BACKENDS if b in named] or [NOWHERE]
    current = {b: depends_on(contract, b, path) for b in backends if b != NOWHERE}
    tried = _tried(contract, mine, current)
    ids = [obligation_id(o) or f"#{i + 1}" for i, o in enumerate(contract.proof_obligations)]
    known = frozenset(ids)
    serving = served(contract)
    rows = [
        Row(name, o.property or "", o.divergence)
        for name, o in zip(ids, contract.proof_obligations, strict=True)
    ]
    for row in rows:
        mine_of = [t for t in tests if row.id in serving[t.id]]
        kinds = {t.measure.kind for t in mine_of if t.measure is not None}
        row.is_runtime = bool(kinds) and kinds <= {*SPEED}
        row.cells = _cells(mine_of, backends, mine, current, tried)
    for t in tests:  # a failure is shown even where it refutes nothing that was promised
        if not serving[t.id] & known and t.measure is not None:
            cells = _cells([t], backends, mine, current, tried)
            rows.append(Row(t.id, f"(no obligation) {t.rule or t.prediction}", cells=cells))
    return Status(
        name=contract.name or stem,
        version=contract.metadata.version,
        declared=contract.declared,
        backends=backends,
        rows=rows,
        evidence=[_line(e, current.get(e.backend)) for e in mine],
        flips=_counted(tried, tried),
        shipped={
            f"{stage.id} is {stage.status}": list(stage.expected_acceptance)
            for stage in contract.implementation_stages
            if stage.status in SHIPPED
        },
    )


def _cells(
    tests: Sequence[FalsificationTest],
    backends: Sequence[str],
    evidence: Sequence[Evidence],
    current: dict[str, str],
    tried: Tried,
) -> dict[str, list[TestState]]:
    """The states of an obligation's tests, on each backend that one of them measures.

    A test without a measure was not run anywhere, whatever its text says.
    """
    cells: dict[str, list[TestState]] = {}
    measured = [t for t in tests if t.measure is not None]
    words = [TestState(t.id, "not run", "it has no measure") for t in tests if t.measure is None]
    for b in backends:
        here = [t for t in measured if t.measure is not None and b in t.measure.backends]
        if here:
            cells[b] = [_state(t, b, evidence, current[b], tried) for t in here] + words
        elif not measured:
            cells[b] = words or [TestState("-", "not run", "no test of it has a measure")]
    return cells


def _tried(contract: Contract, evidence: Sequence[Evidence], current: dict[str, str]) -> Tried:
    """What fresh evidence says of prompts' next tokens."""
    tests = {t.id: t for t in contract.falsification_tests if t.measure is not None}
    seen: Tried = {}
    for e in evidence:
        for result in e.results:
            test = tests.get(result.test)
            if test is None or e.backend not in current:
                continue
            if _judged(result, e, test, current[e.backend])[0] not in ("failing", "discharged"):
                continue
            if (flipped := flipped_prompts(result)) is not None:
                side = seen.setdefault(_side(test, e), {})
                for i, prompt in enumerate(result.measure.get("prompts", [])):
                    key = tuple(prompt)
                    side[key] = side.get(key, False) or i in flipped
    return seen


def _side(test: FalsificationTest, evidence: Evidence) -> Side:
    measure = test.measure
    assert measure is not None
    held_to = measure.against if measure.kind == "accuracy" else ""
    return evidence.backend, str(evidence.model.get("sha256")), measure.bits, held_to


def _counted(tried: Tried, sides: Iterable[Side]) -> Flips:
    """The prompts of some sides; each counts once a side."""
    found = [tried[side] for side in sides if side in tried]
    return Flips(sum(map(len, found)), sum(sum(prompts.values()) for prompts in found))


def flipped_prompts(result: Result) -> set[int] | None:
    """Which of a result's prompts go on with another token; None if it does not say."""
    about = result.about
    if isinstance(flipped := about.get("flipped"), list):
        return {i for i in flipped if isinstance(i, int)}
    if isinstance(tokens := about.get("next_tokens"), list):
        return {
            i for i, p in enumerate(tokens) if isinstance(p, list) and any(t != p[0] for t in p)
        }
    return None


def _state(
    test: FalsificationTest, backend: str, evidence: Sequence[Evidence], code: str, tried: Tried
) -> TestState:
    """A failure that is fresh outweighs a pass; a pass that is fresh outweighs old evidence."""
    found: dict[State, str] = {}
    failing: set[Side] = set()
    for e in evidence:
        for result in e.results:
            if e.backend != backend or result.test != test.id:
                continue
            state, why = _judged(result, e, test, code)
            if state != "not run" or "not run" not in found:
                found[state] = why
            if state == "failing":
                failing.add(_side(test, e))
    order: tuple[State, ...] = ("failing", "discharged", "stale", "not run")
    state = next((s for s in order if s in found), "not run")
    why = found.get(state, "there is no evidence")
    return TestState(test.id, state, why, _counted(tried, failing))


def _judged(
    result: Result, evidence: Evidence, test: FalsificationTest, code: str
) -> tuple[State, str]:
    why = result.reason if result.outcome == "not run" else _other_model(test, evidence)
    if why is not None:
        return "not run", why
    then = "passed" if result.outcome == "passed" else "failed"
    since = f"has changed since it {then} on {evidence.created[:10]}; check again"
    if evidence.code != code or evidence.numerics != numerics.VERSION:
        text = " or the text" if getattr(test.measure, "text", None) else ""
        return "stale", f"the code{text} {since}"
    if result.measure != described(test):
        return "stale", f"the measure {since}"
    if result.outcome == "failing":
        return "failing", result.reason
    assert test.measure is not None
    return _held(test.measure, result.figures)


def _held(measure: Measure, figures: Mapping[str, float]) -> tuple[State, str]:
    """What the figures of a pass say to the bounds, whatever its outcome was said to be."""
    shown = []
    for name, bound in measure.threshold.items():
        figure, value = FIGURES[measure.kind][name], figures.get(name, math.nan)
        if never_fails(bound, figure):
            return "not run", f"{name}: expected a bound that can be missed, got {bound}"
        if not bound.holds(value):
            return "failing", f"{name} is {value:.6g}, expected {bound}"
        if not figure.low <= value <= figure.high or math.isinf(value):  # nobody measured it
            return "failing", f"{name} is {value:.6g}, which it cannot be; check again"
        shown.append(f"{name} {value:.6g}")
    return "discharged", ", ".join(shown)


def _other_model(test: FalsificationTest, evidence: Evidence) -> str | None:
    """Why a result speaks of a model that the measure does not mean, whatever wrote it."""
    needs = test.measure.model if test.measure is not None else None
    if needs is not None and needs.sample and evidence.model.get("sha256") != sample_digest():
        return f"model: expected the sample model, got {evidence.model.get('name')}"
    for name in ("layers", "vocabulary"):
        wanted, got = getattr(needs, name, None), evidence.model.get(name)
        if wanted is not None and wanted != got:
            return f"model: expected one with {name} {wanted}, got {got}"
    device = test.measure.device.name if test.measure and test.measure.device else None
    if device is not None and device.lower() not in str(evidence.device).lower():
        return f"device: expected {device}, got {evidence.device}"
    return None


def _line(e: Evidence, code: str | None) -> str:
    fresh = "" if e.code == code else "; STALE"
    driver = f", driver {e.driver}" if e.driver else ""
    model = f"{e.model.get('name')} ({str(e.model.get('sha256', '?'))[:12]})"
    return f"{e.backend}: {e.created[:16]}, {e.device}{driver}, {model}, commit {e.commit}{fresh}"
