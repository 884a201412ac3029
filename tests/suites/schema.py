"""schemathesis: requests made up from /openapi.json, right ones and wrong ones."""

from __future__ import annotations

from pathlib import Path

from tests.suites.common import Score, environment, run, served, version

# What a schema cannot say, and so what these two cannot know: how many tokens a context holds,
# which token ids there are, whether a template takes a conversation.
EXCLUDED = "positive_data_acceptance"
OPTIONS = ("--checks", "all", "--exclude-checks", EXCLUDED, "--seed", "5", "--max-examples", "40")
REASONS: dict[str, str] = {}


def run_(scratch: Path) -> Score:
    """All routes."""
    bin_ = environment(scratch, "schemathesis")
    score = Score(f"schemathesis {version(bin_, 'schemathesis')}")
    with served("sample", "--context", "256") as url:
        said = run(bin_ / "schemathesis", "run", f"{url}/openapi.json", *OPTIONS, expect=(0, 1))
    print(said)
    return score
