"""``python -m tests.fuzz``: hostile inputs by hand.

python -m tests.fuzz                             all targets, 2,000 inputs each
python -m tests.fuzz headers --count 100000      one of them, for long
python -m tests.fuzz --seconds 60                each for a minute
python -m tests.fuzz --here text --seed 7 --first 12 --count 1
                                                 one input again, in this process
"""

import argparse
import random
import sys
from importlib import import_module

from tests.fuzz import harness
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", default=[], help=", ".join(TARGETS))
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--count", type=int, default=2000, help="inputs for each target")
    parser.add_argument("--seconds", type=float, default=1e9, help="time for each target")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds for one input")
    parser.add_argument("--here", action="store_true", help="in this process, with tracebacks")
    parser.add_argument("--unlimited", action="store_true", help="no bound on address space")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.worker and (unknown := set(args.targets) - set(TARGETS)):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    seed = random.randrange(2**32) if args.seed is None else args.seed
    if args.worker:
        harness.work(args.targets[0], seed, args.first, args.count, args.unlimited)
        return 0
    faults = 0
    for target in args.targets or TARGETS:
        if args.here:
            module = import_module(f"tests.fuzz.targets.{target}")
            for index in range(args.first, args.first + args.count):
                print(index, harness.one(module, seed, index))
            continue
        result = harness.run(
            target,
            seed,
            args.count,
            first=args.first,
            seconds=args.seconds,
            patience=args.patience,
            unlimited=args.unlimited,
        )
        print(result, flush=True)
        faults += len(result.faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
