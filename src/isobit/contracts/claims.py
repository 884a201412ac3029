"""What a status or a class of divergence claims, and the rows of evidence that speak against it.

A status is a claim, and so is "benign". Neither can be typed against the evidence: whoever asks for
one gets the rows that deny it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from isobit.contracts.document import Document, Key
from isobit.contracts.evidence import default_folder, load_all
from isobit.contracts.schema import BENIGN, NOT_BENIGN, STATUSES, Contract
from isobit.contracts.status import Row, State, Status, TestState
from isobit.contracts.status import status as measured
from isobit.errors import GateFailed, UsageError

SHOWN = 5
"""Rows that a refusal names; it says how many more there are."""

_DIVERGES = "ACTIVE_ALGORITHM_LEVEL_WITH_DOCUMENTED_DIVERGENCE"
_ALGORITHM = ("ACTIVE_ALGORITHM_LEVEL", _DIVERGES)
_WITHOUT_EVIDENCE = ("DRAFT", "PROPOSED", "SUPERSEDED", "DEPRECATED")
Classes = Mapping[str, str | None]
"""The class of divergence of each obligation, by id; None for one without."""


def classes_of(found: Status) -> dict[str, str | None]:
    """The classes that the contract's obligations have."""
    return {row.id: row.divergence for row in found.rows}


def denials(found: Status, claimed: str | None, classes: Classes | None = None) -> list[str]:
    """The failing rows that a status cannot stand beside, one line each.

    A status that claims that something holds, one that is nobody's among them, is denied by every
    failure that is fresh; one with a documented divergence by failures of obligations that have no
    class.
    """
    if claimed is None or claimed.upper() in _WITHOUT_EVIDENCE:
        return []
    known = classes_of(found) if classes is None else classes
    return [
        _line(backend, row, test)
        for backend, row, test in _tests(found, "failing")
        if claimed != _DIVERGES or not known.get(row.id)
    ]


def denied_stages(found: Status) -> list[str]:
    """Stages that are said to be shipped, and a failing row of what they are to discharge."""
    failing = [(row.id, _line(b, row, test)) for b, row, test in _tests(found, "failing")]
    return [
        f"{said}: {line}" for said, ids in found.shipped.items() for i, line in failing if i in ids
    ]


def check_evidence(document: Document, contract: Contract) -> None:
    """Add an error for each row of the evidence beside a contract that denies what it says, and
    for each class that is milder than the evidence's; and a warning where evidence for its status
    is missing or stale: a status typed into the file is a claim, too. Raises FileRefused for
    damaged evidence."""
    path = Path(document.path)
    found = measured(contract, path.stem, load_all(default_folder(path)), path.parent)
    at: Key = ("status",) if contract.status is not None else ("metadata", "status")
    denied = denials(found, contract.declared)
    for line in [f"{contract.declared}: {d}" for d in denied] + denied_stages(found):
        message = f"expected what the evidence allows, which denies {line}; use contract amend"
        document.find("status-contradicted", message, at)
    classes = divergences(found)
    for i, row in enumerate(found.rows[: len(contract.proof_obligations)]):
        if row.divergence not in (None, NOT_BENIGN) and classes.get(row.id) == NOT_BENIGN:
            message = f"expected {NOT_BENIGN}, as the evidence has {row.id}, got {row.divergence}"
            place: Key = ("proof_obligations", i, "divergence")
            document.find("status-contradicted", f"{message}; use contract amend", place)
    if not denied and (unseen := missing(found, contract.declared)):
        message = (
            f"expected what the evidence shows, got {contract.declared}, which the evidence does "
            f"not show: {listed(unseen)}; use contract check"
        )
        document.find("status-not-shown", message, at, "warning")


def missing(found: Status, claimed: str | None, classes: Classes | None = None) -> list[str]:
    """What a status claims and the evidence does not show, apart from failures; one line each.

    Whatever claims that something holds is denied by every row that is stale. ACTIVE_RUNTIME, and
    what is not known to claim less, needs every obligation discharged on every backend. A status of
    the algorithm needs each of them discharged on some backend, but for speed and memory, which are
    the runtime's; one with a documented divergence has classes in place of what fails.
    """
    if claimed is None or claimed.upper() in _WITHOUT_EVIDENCE:
        return []
    lacking = [_line(*cell) for cell in _tests(found, "stale")]
    if claimed not in _ALGORITHM:
        return lacking + [_line(*cell) for cell in _tests(found, "not run")]
    known = {**classes_of(found), **(classes or {})}  # of what fails; else a class shows nothing
    failing = {row.id for _, row, _ in _tests(found, "failing")} if claimed == _DIVERGES else set()
    diverging = {i for i in failing if known.get(i)}
    if claimed == _DIVERGES and not diverging:
        lacking.append(f"no obligation diverges: {found.summary()}")
    if not found.count("discharged"):
        lacking.append(f"no obligation is discharged: {found.summary()}")
    shown = {r.id for r in found.rows if "discharged" in {r.state(b) for b in found.backends}}
    left = {r.id for r in found.rows if not r.is_runtime} - shown - diverging
    return lacking + [
        _line(backend, row, test)
        for backend, row, test in _tests(found, "not run")
        if row.id in left
    ]


def require(found: Status, claimed: str, classes: Classes | None = None) -> None:
    """Raises UsageError for a status that there is not, GateFailed for one that evidence denies."""
    if claimed not in STATUSES:
        raise UsageError(f"status: expected one of {', '.join(STATUSES)}; got {claimed!r}")
    rows = denials(found, claimed, classes) + missing(found, claimed, classes)
    if rows:
        raise GateFailed(f"status {claimed}: the evidence denies it: {listed(rows)}")


def listed(rows: list[str]) -> str:
    """The first rows in one line, and how many more there are."""
    more = f"; and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return "; ".join(rows[:SHOWN]) + more


def divergences(found: Status, typed: str | None = None) -> dict[str, str | None]:
    """What evidence says of each obligation that was measured: its class, None where it holds.

    A failure is benign if prompts were tried between the same two sides, on the same model, and
    none of them flipped. Not in it are obligations of which nothing fresh is known. Raises
    GateFailed if ``typed`` is not the class that evidence gives to what fails.
    """
    out: dict[str, str | None] = {}
    why: dict[str, str] = {}
    for _, row, test in _tests(found, "failing"):
        benign = test.flips.tried and not test.flips.flipped  # else nothing shows that it is
        if row.id not in out or not benign:
            out[row.id], why[row.id] = BENIGN if benign else NOT_BENIGN, str(test.flips)
    if typed is not None:
        if not out:
            raise GateFailed(
                f"divergence {typed}: expected an obligation that fails, found none: "
                f"{found.summary()}"
            )
        denied = [
            f"{i}: {why[i]}" for i, c in out.items() if (c == BENIGN) == (typed == NOT_BENIGN)
        ]
        if denied and (typed != NOT_BENIGN or len(denied) == len(out)):
            raise GateFailed(f"divergence {typed}: the evidence denies it: {listed(denied)}")
    for row in found.rows:
        states = {row.state(b) for b in row.cells}
        if row.id not in out and "discharged" in states and "stale" not in states:
            out[row.id] = None
    return out


def draft(
    found: Status, status: str | None, classes: Mapping[str, str | None]
) -> tuple[str, str | None]:
    """An amendment's title and description, from the evidence; no description without any.

    What changed (status, classes), what passes with which figures, what fails and where, and what
    nothing is known of.
    """
    if not found.evidence:
        return "Not measured yet", None
    lines = [f"Measured: {found.summary()}."]
    if status is not None and status != found.declared:
        lines.append(f"Status: {found.declared or 'none'} becomes {status}.")
    for row in found.rows:
        new = classes.get(row.id, row.divergence)
        if new != row.divergence:
            lines.append(
                f"Divergence of {row.id}: {row.divergence or 'none'} becomes {new or 'none'}."
            )
    if any(new is not None for new in classes.values()):
        lines.append(f"Prompts: {found.flips}.")
    states: tuple[State, ...] = ("failing", "discharged")
    lines += [_line(*cell) + "." for state in states for cell in _tests(found, state)]
    for state in ("stale", "not run"):
        left = dict.fromkeys(f"{row.id} ({b})" for b, row, _ in _tests(found, state))
        if left:
            lines.append(f"{state.capitalize()}: {', '.join(left)}.")
    lines += [f"Evidence: {e}." for e in found.evidence]
    return found.summary(), "\n".join(lines)


def _tests(found: Status, state: State) -> Iterator[tuple[str, Row, TestState]]:
    for backend in found.backends:
        for row in found.rows:
            for test in row.cells.get(backend, []):
                if test.state == state:
                    yield backend, row, test


def _line(backend: str, row: Row, test: TestState) -> str:
    return f"{backend}, {row.id}, {test.test}: {test.state}: {test.why}"
