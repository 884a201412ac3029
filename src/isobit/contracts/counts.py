"""Numbers in a contract's prose ("All 7 falsifiers", "7/7 tests"): are there so many?"""

import re
from collections.abc import Iterator

from isobit.contracts.document import Document, Key
from isobit.contracts.findings import Severity
from isobit.contracts.schema import Contract

_WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
_WHAT = (
    r"(?P<what>falsification (?:tests|conditions)|FALSIFY(?:-\*)? tests|falsifiers|tests|checks"
    r"|(?:proof )?obligations|kani harness(?:es)?)\b"
)
_ALL = re.compile(rf"\ball (?:of the )?(?P<number>\d+|[a-z]+) {_WHAT}", re.I)
_OF = re.compile(rf"\b(?P<part>\d+)(?:/| of )(?P<number>\d+) {_WHAT}", re.I)
_BARE = re.compile(r"\b(?P<number>\d+)/(?P=number)\b(?= *(?:pass|green|discharged|$|[.,;)]))")
_KANI = re.compile(r"\b(?P<number>\d+) (?P<what>kani harness(?:es)?)\b", re.I)


def check_counts(document: Document, contract: Contract) -> None:
    """Add a finding for each number of tests, obligations, … in words that is not theirs.

    In the gate it is an error. Elsewhere "tests" and "checks" may be others than the contract's,
    and what is named in full is a warning. The history's numbers were those of their day.
    """
    for at, text, is_gate in _texts(contract):
        severity: Severity = "error" if is_gate else "warning"
        for pattern in (_ALL, _OF, _KANI, *((_BARE,) if is_gate else ())):
            for match in pattern.finditer(text):
                what = match.groupdict().get("what") or "tests"
                if not is_gate and what.lower() in ("tests", "checks"):
                    continue
                number, actual = _number(match["number"]), _there(contract, what.lower())
                if number is not None and number != actual:
                    shown = " ".join(match.group().split())
                    message = f"expected the {actual} {what} that there are, got “{shown[:60]}”"
                    document.find("test-count", message, at, severity)
    summary = contract.verification_summary
    said = summary.get("total_obligations") if isinstance(summary, dict) else None
    there = len(contract.proof_obligations)
    if isinstance(said, int) and said != there:
        message = f"expected the {there} obligations that there are, got {said}"
        document.find("test-count", message, ("verification_summary", "total_obligations"))


def _texts(contract: Contract) -> Iterator[tuple[Key, str, bool]]:
    """Prose that speaks of the contract as it stands, and whether it is the gate's."""
    if contract.qa_gate is not None:
        for key in ("pass_criteria", "description", "falsification"):
            yield ("qa_gate", key), getattr(contract.qa_gate, key) or "", True
    yield ("metadata", "description"), contract.metadata.description, False
    yield ("description",), contract.description or "", False
    for i, stage in enumerate(contract.implementation_stages):
        yield ("implementation_stages", i, "description"), stage.description, False


def _there(contract: Contract, what: str) -> int:
    if "obligation" in what:
        return len(contract.proof_obligations)
    if "kani" in what:
        return len(contract.kani_harnesses)
    if what == "checks" and contract.qa_gate is not None:
        return len(contract.qa_gate.checks)
    return len(contract.falsification_tests)


def _number(word: str) -> int | None:
    if word.isdecimal():
        return int(word) if len(word) < 10 else -1
    words = _WORDS.split()
    return words.index(word.lower()) + 1 if word.lower() in words else None
