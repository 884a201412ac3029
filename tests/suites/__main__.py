"""Run suites that others wrote against a server of the sample model, and say how it did.

    python -m tests.suites openai anthropic lm-eval schemathesis llama

Each suite is installed from PyPI in an environment of its own below ``--scratch``, which later runs
use again. A failure that has a reason (``REASONS`` of each suite) counts as "does not apply", and
any other ends this with exit code 1. The scores stand in docs/serving.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tests.suites import clients, evaluation, llama, schema
from tests.suites.common import Score

SUITES: dict[str, Callable[[Path], Score]] = {
    "openai": clients.openai,
    "anthropic": clients.anthropic,
    "lm-eval": evaluation.run_suite,
    "schemathesis": schema.run_suite,
    "llama": llama.run_suite,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.suites", description=__doc__)
    parser.add_argument("suite", nargs="*", choices=[*SUITES, []], help="default: all")
    parser.add_argument("--scratch", type=Path, default=Path("build/suites"))
    args = parser.parse_args()
    failed = 0
    for name in args.suite or SUITES:
        score = SUITES[name]((args.scratch / name).resolve())
        print(f"\n{name}: {score}")
        failed += len(score.failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
