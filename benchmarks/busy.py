"""Decoding beside busy neighbours: many threads must not be slower than one by more than a few per
cent, however little of the machine is left to them.

    python -m benchmarks.busy [--threads N] [--neighbours N] [--rounds R] [--tokens N]

Starts so many processes that never rest, then lets one thread and N threads generate in turns, and
one once more, which says how far equal ones differ. Prints tokens a second and the paired ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median

import isobit

_IDS = list(range(5, 13))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--neighbours", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(args.neighbours)]
    rates: list[list[float]] = [[], [], []]
    try:
        models = [
            isobit.load("sample", backend="cpu", threads=n, context=args.tokens + 64)
            for n in (1, args.threads, 1)
        ]
        for i in range(args.rounds + 2):  # the first two warm up
            for which in (0, 1, 2) if i % 2 else (2, 1, 0):
                begun = time.perf_counter()
                done = models[which].generate(
                    _IDS, max_tokens=args.tokens, temperature=0.0, stop=[]
                )
                if i >= 2:
                    rates[which].append(len(done.token_ids) / (time.perf_counter() - begun))
        for model in models:
            model.close()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    report = {
        "neighbours": args.neighbours,
        "cores": os.cpu_count(),
        "one_thread": round(median(rates[0])),
        "threads": args.threads,
        "threads_to_one": _ratios(rates[1], rates[0]),
        "one_to_one": _ratios(rates[2], rates[0]),
    }
    print(json.dumps(report))


def _ratios(rates: list[float], to: list[float]) -> dict[str, float]:
    """Of pairs, and of all the time together."""
    pairs = sorted(a / b for a, b in zip(rates, to, strict=True))
    together = sum(1 / b for b in to) / sum(1 / a for a in rates)
    quarter = len(pairs) // 4
    found = {"median": median(pairs), "low": pairs[quarter], "high": pairs[-1 - quarter]}
    return {name: round(x, 3) for name, x in (found | {"together": together}).items()}


if __name__ == "__main__":
    main()
