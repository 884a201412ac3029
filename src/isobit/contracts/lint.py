"""What a schema cannot see: a contract that contradicts itself, or the repository it stands in."""

import math
import re
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from isobit.contracts.citations import Commands, check_citations
from isobit.contracts.counts import check_counts
from isobit.contracts.document import Document, Key
from isobit.contracts.kinds import (
    FIGURES,
    Argmax,
    Bound,
    FaultInjection,
    Figure,
    Measure,
    never_fails,
)
from isobit.contracts.references import check_references, obligation_id, served
from isobit.contracts.schema import SHIPPED, Contract
from isobit.errors import did_you_mean

_ABSENT = re.compile(
    r"\b(do(es)? not (yet )?exist|(is|are) not (yet )?implemented|baseline failure|"
    r"there is no [`\w])",
    re.I,
)


def lint(document: Document, contract: Contract, commands: Commands) -> None:
    """Add findings to a validated document; ``commands`` are the options of isobit's commands."""
    for rule in (
        _versions,
        _history,
        _dates,
        check_counts,
        check_references,
        _stages,
        _status,
        _predictions,
        _thresholds,
    ):
        rule(document, contract)
    check_citations(document, contract, commands)
    document.findings.sort(key=lambda f: (f.line, f.column))


def numbers(version: str) -> tuple[int, ...]:
    """A version to sort by."""
    return tuple(int(part) for part in version.split("."))


def _versions(document: Document, contract: Contract) -> None:
    version = contract.metadata.version
    if contract.version is not None and contract.version != version:
        message = f"expected metadata's version {version}, got {contract.version}"
        document.find("version-mismatch", message, ("version",))
    stem = re.search(r"-v([0-9]+)$", Path(document.path).stem)
    if stem is not None and numbers(version)[0] != int(stem[1]):
        message = f"expected version {stem[1]}.x.y, as in the file's name, got {version}"
        document.find("version-mismatch", message, ("metadata", "version"), "warning")


def _history(document: Document, contract: Contract) -> None:
    history = contract.metadata.amendment_history
    if not history:
        return
    at: Key = ("metadata", "amendment_history")
    versions = [numbers(a.version) for a in history]
    newest_first = versions[0] > versions[-1]
    order = "newest first" if newest_first else "oldest first"
    for i in range(1, len(history)):
        older, newer = (i, i - 1) if newest_first else (i - 1, i)
        a, b = history[older], history[newer]
        if versions[older] >= versions[newer]:
            message = f"expected versions {order}, got {history[i - 1].version} and then "
            document.find("amendment-order", message + history[i].version, (*at, i, "version"))
        elif a.date > b.date:
            message = f"expected {b.version} not before {a.version}, got {b.date} and {a.date}"
            document.find("amendment-order", message, (*at, newer, "date"))
    newest = max(history, key=lambda a: numbers(a.version)).version
    if newest != contract.metadata.version:
        message = (
            f"expected an entry for version {contract.metadata.version}, the newest is {newest}; "
            "use isobit contract amend"
        )
        document.find("amendment-newest", message, at)


def future(day: str) -> str | None:
    """The complaint about a day that has come nowhere yet; None if it has, or is no day."""
    latest = datetime.now(UTC).date() + timedelta(days=1)  # somewhere it is tomorrow
    with suppress(ValueError):  # what is no day is the schema's to refuse
        if date.fromisoformat(day) > latest:
            return f"expected a day that has come, got {day}"
    return None


def _dates(document: Document, contract: Contract) -> None:
    metadata = contract.metadata
    places: list[tuple[Key, str | None]] = [
        (("metadata", "created"), metadata.created),
        (("metadata", "updated"), metadata.updated),
    ]
    for i, amendment in enumerate(metadata.amendment_history):
        places.append((("metadata", "amendment_history", i, "date"), amendment.date))
    for at, day in places:
        if day is not None and (message := future(day)):
            document.find("future-date", message, at)


def _stages(document: Document, contract: Contract) -> None:
    for i, stage in enumerate(contract.implementation_stages):
        at: Key = ("implementation_stages", i)
        if stage.status in SHIPPED and not stage.evidence:
            message = f"expected evidence for {stage.id}, which is {stage.status}; cite it"
            document.find("stage-without-evidence", message, (*at, "status"))
        if stage.status in SHIPPED and stage.blockers:
            message = f"expected no blockers of {stage.id}, which is {stage.status}, got some"
            document.find("status-contradicted", message, (*at, "blockers"), "warning")


def _status(document: Document, contract: Contract) -> None:
    inner = contract.metadata.status
    if contract.status is not None and inner not in (None, contract.status):
        message = f"expected the status {contract.status} that the contract has, got {inner}"
        document.find("status-contradicted", message, ("metadata", "status"))
    if contract.declared != "ACTIVE_RUNTIME":
        return
    for i, stage in enumerate(contract.implementation_stages):
        if stage.status not in SHIPPED:
            message = f"expected {stage.id} shipped in an {contract.declared} contract, got "
            place: Key = ("implementation_stages", i, "status")
            document.find("status-contradicted", message + stage.status, place)
    for i, obligation in enumerate(contract.proof_obligations):
        if obligation.divergence == "KNOWN_DIVERGENCE_NOT_BENIGN":
            message = f"expected no known divergence in an {contract.declared} contract, got "
            place = ("proof_obligations", i, "divergence")
            document.find("status-contradicted", message + obligation.divergence, place)


def _predictions(document: Document, contract: Contract) -> None:
    """Predictions of an absence in a contract that claims presence, and the other way round."""
    claimed = (contract.declared or "").startswith("ACTIVE")
    broken = {
        obligation_id(o): o.divergence
        for o in contract.proof_obligations
        if o.divergence == "KNOWN_DIVERGENCE_NOT_BENIGN"
    }
    serving = served(contract)
    for i, test in enumerate(contract.falsification_tests):
        at: Key = ("falsification_tests", i, "prediction")
        absent = _ABSENT.search(f"{test.rule}\n{test.prediction}")
        if claimed and absent:
            message = f"expected a prediction that fits {contract.declared}, got “{absent.group()}”"
            document.find("prediction-contradicted", message + "; replace the test", at)
        for name in sorted(serving[test.id] & {o for o in broken if o is not None}):
            message = f"expected no prediction that {name} holds while it is {broken[name]}"
            document.find("prediction-contradicted", message, at, "warning")


def _thresholds(document: Document, contract: Contract) -> None:
    for i, test in enumerate(contract.falsification_tests):
        measure = test.measure
        if measure is None:
            continue
        at: Key = ("falsification_tests", i, "measure")
        for name, bound in measure.threshold.items():
            _bound(document, measure, name, bound, (*at, "threshold", name))
        _prompts(document, measure, at)
        if isinstance(measure, FaultInjection):
            _faults(document, measure, (*at, "faults"))
        against = getattr(measure, "against", None)
        if against in measure.backends:
            message = f"expected a backend to be compared with another, got {against} with itself"
            document.find("threshold-cannot-fail", message, (*at, "against"))


def _prompts(document: Document, measure: Measure, at: Key) -> None:
    """Prompts that show less than they seem to: the same again, and none but single tokens."""
    seen: dict[tuple[int, ...], int] = {}
    for j, prompt in enumerate(getattr(measure, "prompts", None) or []):
        if (first := seen.setdefault(tuple(prompt), j)) != j:
            message = f"expected prompts that differ, got the same as prompt {first}"
            document.find("prompts-alike", message, (*at, "prompts", j), "warning")
    if seen and measure.kind != "kv_equivalence" and max(map(len, seen)) == 1:
        message = "expected a prompt of several tokens: with one, attention and rotation do nothing"
        document.find("prompts-alike", message, (*at, "prompts"), "warning")


def _faults(document: Document, measure: FaultInjection, at: Key) -> None:
    from isobit.verify.faults import FAULTS  # noqa: PLC0415 - only where faults are named

    unknown = [n for n in measure.faults if n not in FAULTS] if measure.faults != ["all"] else []
    if unknown:
        hint = did_you_mean(unknown[0], FAULTS) or "; isobit verify --help lists them"
        place = (*at, measure.faults.index(unknown[0]))
        document.find("unknown-id", f"expected a fault, got {unknown[0]!r}{hint}", place)


def _bound(document: Document, measure: Measure, name: str, bound: Bound, at: Key) -> None:
    figure = FIGURES[measure.kind][name]
    high = min(figure.high, _most(measure, name))
    within = f"expected a bound within {figure.low:g} and {high:g}, where {name} lies, got {bound}"
    if never_fails(bound, Figure(figure.what, figure.low, high)):
        document.find("threshold-cannot-fail", f"{within}, which always holds", at)
    low = -math.inf if bound.at_least is None else bound.at_least
    if low > min(high, math.inf if bound.at_most is None else bound.at_most) or (
        bound.at_most is not None and bound.at_most < figure.low
    ):
        document.find("threshold-cannot-hold", f"{within}, which never holds", at)


def _most(measure: Measure, name: str) -> float:
    """What a count can come to at most, where the measure says so itself."""
    if isinstance(measure, Argmax):
        each = 1 if name == "changed_prompts" else None
        return sum(each or len(prompt) for prompt in measure.prompts)
    if isinstance(measure, FaultInjection) and measure.faults != ["all"]:
        return len(measure.faults) * len(measure.prompts)
    if name == "layers_below_cosine_0_99" and measure.model is not None:
        return math.inf if measure.model.layers is None else measure.model.layers
    return math.inf
