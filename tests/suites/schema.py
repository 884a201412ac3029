"""schemathesis: requests made up from /openapi.json, right ones and wrong ones."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from tests.suites.common import Score, environment, run, served, version

# A schema cannot say how many tokens a context holds, which ids there are, and what a conversation
# is: that all that fits it is accepted is the one thing that cannot be asked.
EXCLUDED = "positive_data_acceptance"
OPTIONS = (
    *("--checks", "all", "--exclude-checks", EXCLUDED),
    *("--seed", "5", "--max-examples", "40", "--request-timeout", "300", "--continue-on-failure"),
)
REASONS: dict[str, str] = {}


def run_suite(scratch: Path) -> Score:
    """All routes: each counts once, with all its examples."""
    bin_ = environment(scratch, "schemathesis")
    score = Score(f"schemathesis {version(bin_, 'schemathesis')}")
    report = scratch / "report"
    for old in report.glob("*.xml"):
        old.unlink()
    with served("sample", "--context", "256") as url:
        where = ("--report", "junit", "--report-dir", str(report))
        run(bin_ / "schemathesis", "run", f"{url}/openapi.json", *OPTIONS, *where, expect=(0, 1))
    result = max(report.glob("*.xml"))  # its name is a time
    for case in ET.parse(result).iter("testcase"):
        failures = [e for e in case if e.tag in ("failure", "error")]
        for failure in failures:
            said = " ".join((failure.text or failure.get("message") or "").split())
            score.file(str(case.get("name")), said[:700], REASONS)
        score.passed += not failures
    return score
