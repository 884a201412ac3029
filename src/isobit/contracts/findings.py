"""What is wrong with a contract: findings with a place, and the forms they are printed in."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from isobit.errors import printable

Severity = Literal["error", "warning"]

RULES: dict[str, str] = {
    "yaml-syntax": "The file is YAML that can be read.",
    "yaml-limit": "The file is small and shallow enough to be a contract.",
    "yaml-tag": "No tags: a contract holds text, numbers, lists and mappings.",
    "yaml-alias": "No aliases: every value stands where it is meant.",
    "yaml-key": "The keys of a mapping are plain words.",
    "duplicate-key": "A mapping has each key once.",
    "not-a-contract": "A file that is to be judged is a contract.",
    "missing": "Required keys are there.",
    "type": "A value is of the kind its key asks for.",
    "unknown-key": "Keys are those that the schema knows.",
    "unknown-status": "A status is one of the known ones.",
    "empty": "A contract promises something and says what would refute it.",
    "duplicate-id": "Ids of obligations, stages, tests and harnesses are given once.",
    "version-mismatch": "All places that state the contract's version agree.",
    "amendment-order": "Amendments are in one order, by version and by date.",
    "amendment-newest": "The newest amendment is the contract's version.",
    "test-count": "A number of tests, obligations or checks in words is what is there.",
    "obligation-uncovered": "Each obligation has a test that could refute it.",
    "test-unneeded": "Each test serves an obligation.",
    "unknown-id": "An id that is referred to exists.",
    "dangling-reference": "Contracts, obligations and equations that are referred to exist.",
    "future-date": "No day of the contract's history is still to come.",
    "evidence-of-itself": "A contract is no evidence for what it promises.",
    "stage-without-evidence": "What is shipped says where that can be seen.",
    "status-contradicted": "A status agrees with the stages and divergences below it.",
    "status-not-shown": "A status claims no more than the evidence shows.",
    "prediction-contradicted": "No prediction says that what is shipped does not exist.",
    "cited-file": "Cited files exist.",
    "cited-test": "Cited tests exist.",
    "cited-option": "Cited commands and options of isobit exist, and take the values cited.",
    "prompts-alike": "Prompts differ, and not all are single tokens.",
    "threshold-cannot-fail": "A threshold can be missed by what it measures.",
    "threshold-cannot-hold": "A threshold can be met by what it measures.",
}
"""Every rule id, and what it asks for."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. ``message`` says what was expected, what was found, what to do."""

    file: str
    line: int
    column: int
    """Both from 1."""
    severity: Severity
    rule: str
    message: str

    def __post_init__(self) -> None:
        assert self.rule in RULES, self.rule


def counts(findings: Sequence[Finding]) -> tuple[int, int]:
    """Numbers of errors and warnings."""
    errors = sum(f.severity == "error" for f in findings)
    return errors, len(findings) - errors


def text(findings: Sequence[Finding]) -> str:
    """One line each, as compilers write them, and how many there are."""
    lines = [
        _one_line(f"{f.file}:{f.line}:{f.column}: {f.severity}[{f.rule}]: {f.message}")
        for f in findings
    ]
    errors, warnings = counts(findings)
    return "\n".join([*lines, f"{errors} error(s), {warnings} warning(s)"])


def to_json(findings: Sequence[Finding]) -> str:
    """One JSON object."""
    errors, warnings = counts(findings)
    shown = {"errors": errors, "warnings": warnings, "findings": [asdict(f) for f in findings]}
    return json.dumps(shown, indent=2)


def github(findings: Sequence[Finding]) -> str:
    """Workflow commands, which GitHub shows beside the lines."""

    def escaped(value: str) -> str:
        for plain, code in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
            value = value.replace(plain, code)
        return value

    def parameter(value: str) -> str:
        return escaped(value).replace(":", "%3A").replace(",", "%2C")

    return "\n".join(
        f"::{f.severity} file={parameter(f.file)},line={f.line},col={f.column},"
        f"title={f.rule}::{escaped(f.message)}"
        for f in findings
    )


def sarif(findings: Sequence[Finding], version: str) -> str:
    """A SARIF 2.1.0 log; ``version`` is isobit's."""
    results: list[dict[str, Any]] = [
        {
            "ruleId": f.rule,
            "level": f.severity,
            "message": {"text": f.message},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": _uri(f.file)},
                        "region": {"startLine": f.line, "startColumn": f.column},
                    }
                }
            ],
        }
        for f in findings
    ]
    used = {f.rule for f in findings}
    rules = [
        {"id": name, "shortDescription": {"text": what}}
        for name, what in RULES.items()
        if name in used
    ]
    driver = {"name": "isobit contract", "version": version, "rules": rules}
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
        ],
    }
    return json.dumps(log, indent=2)


def _uri(file: str) -> str:
    path = Path(file)
    return path.as_uri() if path.is_absolute() else quote(os.fsencode(path.as_posix()))


def _one_line(message: str) -> str:
    return printable(message)
