"""What a schema cannot see: a contract that contradicts itself, or the repository it stands in."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from isobit.contracts.citations import Commands, check_citations
from isobit.contracts.document import Document, Key
from isobit.contracts.measures import FIGURES, Bound, Figure
from isobit.contracts.schema import SHIPPED, Contract, FalsificationTest, ProofObligation

_IDS = re.compile(
    r"\b([A-Z][A-Z0-9]*(?:[_-][A-Z0-9]+)*[_-])([0-9]{2,4})\b((?:(?:/|\.\.)[0-9]{2,4}\b)*)"
)
_MORE = re.compile(r"(/|\.\.)([0-9]+)")
_BRACKETED = re.compile(r"\(([A-Z][A-Z0-9]*(?:[_-][A-Z0-9]+)+)\)")
_COUNT = re.compile(r"\ball (?:of the )?(\d+|[a-z]+) (?:falsification )?(tests|checks)\b", re.I)
_WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
_ABSENT = re.compile(
    r"\b(do(es)? not (yet )?exist|(is|are) not (yet )?implemented|baseline failure|"
    r"there is no [`\w])",
    re.I,
)

MOST = 99
"""Ids after the first that one range can name."""


def lint(document: Document, contract: Contract, commands: Commands) -> None:
    """Add findings to a validated document; ``commands`` are the options of isobit's commands."""
    for rule in (
        _versions,
        _history,
        _test_counts,
        _coverage,
        _stages,
        _status,
        _predictions,
        _thresholds,
    ):
        rule(document, contract)
    check_citations(document, contract, commands)
    document.findings.sort(key=lambda f: (f.line, f.column))


def obligation_id(obligation: ProofObligation) -> str | None:
    """The obligation's name: its id, or the one in brackets in its property."""
    if obligation.id is not None:
        return obligation.id
    found = _BRACKETED.findall(obligation.property)
    return found[-1] if found else None


def discharged_by(test: FalsificationTest, known: frozenset[str]) -> set[str]:
    """Ids of the obligations that a test could refute."""
    if test.discharges:
        return set(test.discharges)
    texts = (test.rule, test.prediction, test.test or "", test.if_fails or "")
    return {name for text in texts for name in named(text, known)}


def named(text: str, known: frozenset[str]) -> set[str]:
    """Which ids a text names; "AC_X_002/003" and "AC_X_001..005" name several."""
    found = set()
    numbers = _numbers(known)
    for stem, number, more in set(_IDS.findall(text)):
        found |= {stem + number} & known
        for sign, last in _MORE.findall(more):
            first = int(last if sign == "/" else number)
            there = numbers.get((stem, len(last)), set())
            for i in there.intersection(range(first, min(int(last), first + MOST) + 1)):
                found.add(f"{stem}{i:0{len(last)}d}")
    return found


@lru_cache(maxsize=1)
def _numbers(known: frozenset[str]) -> dict[tuple[str, int], set[int]]:
    """The numbers at the ends of ids, by what is before them and how many digits they have."""
    out: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(_IDS.fullmatch, known)):
        out.setdefault((match[1], len(match[2])), set()).add(int(match[2]))
    return out


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


def _test_counts(document: Document, contract: Contract) -> None:
    gate = contract.qa_gate
    if gate is None:
        return
    for key in ("pass_criteria", "description"):
        for word, what in _COUNT.findall(getattr(gate, key) or ""):
            words = _WORDS.split()
            said = None
            if word.isdecimal():
                said = int(word) if len(word) < 10 else -1
            if word.lower() in words:
                said = words.index(word.lower()) + 1
            there = len(contract.falsification_tests if what.lower() == "tests" else gate.checks)
            if said is not None and said != there:
                message = f"expected the {there} {what} that there are, got “all {word:.20} {what}”"
                document.find("test-count", message, ("qa_gate", key))


def _coverage(document: Document, contract: Contract) -> None:
    names = [obligation_id(o) for o in contract.proof_obligations]
    known = frozenset(n for n in names if n is not None)
    if not known:
        if names:
            message = "expected obligations with an id, got none; no test can be told to cover them"
            document.find("obligation-uncovered", message, ("proof_obligations",), "warning")
        return
    typed = any(t.discharges for t in contract.falsification_tests)
    covered: set[str] = set()
    for i, test in enumerate(contract.falsification_tests):
        found = discharged_by(test, known) & known
        covered |= found
        if not found:
            message = f"expected {test.id} to serve an obligation, got none; add discharges: [id]"
            document.find("test-unneeded", message, ("falsification_tests", i, "id"), "warning")
    for i, obligation in enumerate(names):
        if obligation in covered:
            continue
        message = "expected an id; no test can be told to cover this obligation"
        if obligation is not None:
            message = f"expected a test that could refute {obligation}, found none"
        place: Key = ("proof_obligations", i)
        document.find("obligation-uncovered", message, place, "error" if typed else "warning")
    for at, name in _references(contract):
        if name not in known:
            message = f"expected an obligation's id, got {name!r}, which no obligation has"
            document.find("unknown-id", message, at, "error" if typed else "warning")


def _references(contract: Contract) -> Iterator[tuple[Key, str]]:
    """Every place that names an obligation."""
    for i, test in enumerate(contract.falsification_tests):
        for j, name in enumerate(test.discharges):
            yield ("falsification_tests", i, "discharges", j), name
    for i, stage in enumerate(contract.implementation_stages):
        for j, name in enumerate(stage.expected_acceptance):
            yield ("implementation_stages", i, "expected_acceptance", j), name


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
    known = frozenset(o for o in broken if o is not None)
    for i, test in enumerate(contract.falsification_tests):
        at: Key = ("falsification_tests", i, "prediction")
        absent = _ABSENT.search(f"{test.rule}\n{test.prediction}")
        if claimed and absent:
            message = f"expected a prediction that fits {contract.declared}, got “{absent.group()}”"
            document.find("prediction-contradicted", message + "; replace the test", at)
        for name in sorted(discharged_by(test, known) & known):
            message = f"expected no prediction that {name} holds while it is {broken[name]}"
            document.find("prediction-contradicted", message, at, "warning")


def _thresholds(document: Document, contract: Contract) -> None:
    for i, test in enumerate(contract.falsification_tests):
        measure = test.measure
        if measure is None:
            continue
        at: Key = ("falsification_tests", i, "measure")
        for name, bound in measure.threshold.items():
            figure = FIGURES[measure.kind][name]
            if never_fails(bound, figure):
                message = (
                    f"expected a bound within {figure.low:g} and {figure.high:g}, where {name} "
                    f"lies, got {bound}, which always holds"
                )
                document.find("threshold-cannot-fail", message, (*at, "threshold", name))
        against = getattr(measure, "against", None)
        if against in measure.backends:
            message = f"expected a backend to be compared with another, got {against} with itself"
            document.find("threshold-cannot-fail", message, (*at, "against"))


def never_fails(bound: Bound, figure: Figure) -> bool:
    """Whether every value that a figure can have lies within a bound."""
    above = bound.at_least is None or bound.at_least <= figure.low
    below = bound.at_most is None or bound.at_most >= min(figure.high, 1e300)
    return above and below
