"""Decoding beside busy neighbours: two threads must not be slower than one by more than a few per
cent, however little of the machine is left to them.

    python -m benchmarks.busy [--neighbours N] [--rounds R] [--tokens N]

Starts so many processes that never rest, then lets one thread and two threads generate in turns.
Prints each one's tokens a second and the median of the paired ratios, two threads to one.
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
    parser.add_argument("--neighbours", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(args.neighbours)]
    try:
        models = [isobit.load("sample", backend="cpu", threads=n, context=256) for n in (1, 2)]
        rates: list[list[float]] = [[], []]
        for i in range(args.rounds + 2):  # the first two warm up
            for which in (0, 1) if i % 2 else (1, 0):
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
    ratios = sorted(two / one for one, two in zip(*rates, strict=True))
    report = {
        "neighbours": args.neighbours,
        "cores": os.cpu_count(),
        "one_thread": round(median(rates[0])),
        "two_threads": round(median(rates[1])),
        "ratio": round(median(ratios), 3),
        "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-len(ratios) // 4], 3)],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
