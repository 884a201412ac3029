"""Promises against evidence: which obligation holds on which backend, as far as was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from isobit import numerics
from isobit.contracts.check import code_of, described
from isobit.contracts.evidence import Evidence, Result, code_digest
from isobit.contracts.lint import discharged_by, obligation_id
from isobit.contracts.schema import Contract, FalsificationTest

State = Literal["discharged", "stale", "not run", "failing"]
_WORST: tuple[State, ...] = ("failing", "not run", "stale", "discharged")
BACKENDS = ("reference", "cpu", "cuda", "wgpu")


@dataclass(frozen=True)
class TestState:
    """What the evidence says of one test on one backend."""

    test: str
    state: State
    why: str
    """The figures of a pass, or the reason of anything else."""


@dataclass
class Row:
    """One obligation; ``cells`` by backend. A backend that it does not speak of has no cell."""

    id: str
    property: str
    cells: dict[str, list[TestState]] = field(default_factory=dict)

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

    def count(self, state: State) -> int:
        """Cells of a state."""
        return sum(row.state(b) == state for row in self.rows for b in self.backends)


def status(contract: Contract, stem: str, evidence: Sequence[Evidence]) -> Status:
    """Compare a contract (of file ``stem``.yaml) with the evidence there is."""
    mine = [e for e in evidence if e.contract == stem]
    tests = [t for t in contract.falsification_tests if t.measure is not None]
    named: set[str] = {b for t in tests if t.measure is not None for b in t.measure.backends}
    backends = [b for b in BACKENDS if b in named]
    current = {b: code_digest(code_of(contract, b)) for b in backends}
    ids = [obligation_id(o) or f"#{i + 1}" for i, o in enumerate(contract.proof_obligations)]
    rows = []
    for name, obligation in zip(ids, contract.proof_obligations, strict=True):
        row = Row(name, obligation.property)
        serving = [t for t in tests if name in discharged_by(t, frozenset(ids))]
        for b in backends:
            here = [t for t in serving if t.measure is not None and b in t.measure.backends]
            if here:
                row.cells[b] = [_state(t, b, mine, current[b]) for t in here]
            elif not serving:
                row.cells[b] = [TestState("-", "not run", "no test of it has a measure")]
        rows.append(row)
    return Status(
        name=contract.name or stem,
        version=contract.metadata.version,
        declared=contract.status,
        backends=backends,
        rows=rows,
        evidence=[_line(e, current.get(e.backend)) for e in mine],
    )


def _state(
    test: FalsificationTest, backend: str, evidence: Sequence[Evidence], code: str
) -> TestState:
    """A failure that is fresh outweighs a pass; a pass that is fresh outweighs old evidence."""
    found: dict[State, str] = {}
    for e in evidence:
        for result in e.results:
            if e.backend != backend or result.test != test.id:
                continue
            state, why = _judged(result, e, test, code)
            if state != "not run" or "not run" not in found:
                found[state] = why
    order: tuple[State, ...] = ("failing", "discharged", "stale", "not run")
    state = next((s for s in order if s in found), "not run")
    return TestState(test.id, state, found.get(state, "there is no evidence"))


def _judged(
    result: Result, evidence: Evidence, test: FalsificationTest, code: str
) -> tuple[State, str]:
    if result.outcome == "not run":
        return "not run", result.reason
    then = "passed" if result.outcome == "passed" else "failed"
    since = f"has changed since it {then} on {evidence.created[:10]}; check again"
    if evidence.code != code or evidence.numerics != numerics.VERSION:
        return "stale", f"the code {since}"
    if result.measure != described(test):
        return "stale", f"the measure {since}"
    if result.outcome == "failing":
        return "failing", result.reason
    assert test.measure is not None
    shown = []
    for name, bound in test.measure.threshold.items():
        value = result.figures.get(name, math.nan)
        if not bound.holds(value):
            return "failing", f"{name} is {value:.6g}, expected {bound}"
        shown.append(f"{name} {value:.6g}")
    return "discharged", ", ".join(shown)


def _line(e: Evidence, code: str | None) -> str:
    fresh = "" if e.code == code else "; STALE"
    driver = f", driver {e.driver}" if e.driver else ""
    model = f"{e.model.get('name')} ({str(e.model.get('sha256', '?'))[:12]})"
    return f"{e.backend}: {e.created[:16]}, {e.device}{driver}, {model}, commit {e.commit}{fresh}"


def markdown(status: Status) -> str:
    """A table, what is not discharged and why, and the evidence."""
    lines = [f"## {_cell(status.name)} {status.version}", ""]
    lines += [f"Declared: {status.declared or 'nothing'}. Measured:", ""]
    lines.append("| obligation | " + " | ".join(status.backends) + " |")
    lines.append("|---" * (len(status.backends) + 1) + "|")
    for row in status.rows:
        cells = [row.state(b) or "" for b in status.backends]
        lines.append("| " + " | ".join([_cell(f"{row.id}: {row.property}"), *cells]) + " |")
    lines += ["", ", ".join(f"{status.count(s)} {s}" for s in reversed(_WORST)), ""]
    open_ends = [
        _cell(f"- {b}, {row.id}, {t.test}: {t.state}: {t.why}")
        for b in status.backends
        for row in status.rows
        for t in row.cells.get(b, [])
        if t.state != "discharged"
    ]
    lines += [*open_ends, *([""] if open_ends else [])]
    lines += ["Evidence:", "", *([_cell(f"- {e}") for e in status.evidence] or ["- none"]), ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def to_json(status: Status) -> dict[str, Any]:
    """Everything, in JSON's types."""
    return {
        "contract": status.name,
        "version": status.version,
        "declared": status.declared,
        "obligations": [
            {
                "id": row.id,
                "property": row.property,
                "backends": {
                    b: {"state": row.state(b), "tests": [vars(t) for t in row.cells[b]]}
                    for b in row.cells
                },
            }
            for row in status.rows
        ],
        "evidence": status.evidence,
    }


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%}td,th{border:1px solid #ccc;padding:.4rem .6rem;
text-align:left;vertical-align:top;overflow-wrap:anywhere}
td p{margin:.2rem 0;font-size:.85em;color:#444}
.discharged{background:#dff3e0}.failing{background:#f9d6d5}.stale{background:#fdf0c8}
@media(prefers-color-scheme:dark){body{background:#12151d;color:#e7eaf1}td,th{border-color:#333b4d}
td p{color:#98a2b8}.discharged{background:#1e3327}.failing{background:#4a2226}
.stale{background:#463a16}}"""


def html(statuses: Sequence[Status]) -> str:
    """One page that needs no network."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width"><title>Contracts</title>',
        f"<style>{_STYLE}</style><h1>Contracts</h1>",
    ]
    for s in statuses:
        heads = "".join(f"<th>{b}" for b in s.backends)
        parts.append(f"<h2>{escape(s.name)} {escape(s.version)}</h2>")
        parts.append(f"<p>Declared: {escape(s.declared or 'nothing')}. Measured:</p>")
        parts.append(f"<table><tr><th>obligation{heads}")
        for row in s.rows:
            cells = "".join(_html_cell(row, b) for b in s.backends)
            parts.append(f"<tr><td><b>{escape(row.id)}</b> {escape(row.property)}{cells}")
        parts.append("</table><h3>Evidence</h3><ul>")
        parts += [f"<li>{escape(e)}" for e in s.evidence or ["none"]]
        parts.append("</ul>")
    return "\n".join(parts) + "\n"


def _html_cell(row: Row, backend: str) -> str:
    state = row.state(backend)
    if state is None:
        return "<td>"
    tests = "".join(f"<p>{escape(t.test)}: {escape(t.why)}</p>" for t in row.cells[backend])
    return f'<td class="{state}">{state}{tests}'
