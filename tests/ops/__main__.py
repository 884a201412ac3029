"""Run cases on backends by hand, and time them: ``python -m tests.ops --help``."""

import argparse
import sys

import pytest

from isobit.errors import BackendUnavailable

from .cases import CASES
from .cases.timed import TIMED
from .harness import Case, check, matrix, refusal, seconds, specified
from .ways import WAYS


def outcome(case: Case, way: str, *, timed: bool) -> tuple[str, float | None]:
    """What came of a case, and how long a pass takes, once its bits were right."""
    wanted, _ = specified(case)
    expected = refusal(case, way)
    try:
        with WAYS[way](wanted.weights, wanted.engine) as (backend, intact):
            check(case, backend, intact)
            return "exact", seconds(case, backend) if timed else None
    except BackendUnavailable as said:
        known = expected is not None and expected in str(said)
        return f"{'unsupported' if known else 'REFUSED'}: {said}", None
    except pytest.skip.Exception as reason:
        return str(reason), None
    except AssertionError as wrong:
        return f"DIFFERS: {wrong}", None


def main() -> int:
    """Print a line a case and way; exit code 1 if one differs or refuses what it should run."""
    parser = argparse.ArgumentParser(prog="python -m tests.ops", description=main.__doc__)
    parser.add_argument("pattern", nargs="*", help="words that a case's name must have")
    parser.add_argument(
        "--on", nargs="+", default=list(WAYS), choices=WAYS, help="these ways alone"
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="cases of the sizes of models, with the median time of a pass: the operation, rows "
        "that it is given, and a head of 16 by 8",
    )
    args = parser.parse_args()
    cases = [c for c in (TIMED if args.time else CASES) if all(p in c.name for p in args.pattern)]
    if not cases:
        words = " ".join(args.pattern)
        parser.error(f"expected words of a case such as {CASES[0].name}, got {words}")
    failed = 0
    for case, way in matrix(cases, args.on):
        said, took = outcome(case, way, timed=args.time)
        failed += said.startswith(("DIFFERS", "REFUSED"))
        pace = "" if took is None else f"{1e6 * took:12,.1f} us"
        print(f"{way:18}{case.name:50}{pace:16}{said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
