"""isobit's command line, with a note of every pass of its engine.

usage: python benchmarks/recorded.py OUT.json [--simulated] serve MODEL.gguf --backend cuda …

At its end OUT.json gets of each pass: when it ended (time.time), generations and tokens of prompts
in it, milliseconds of it, and of these those in which the host waited for the device, and whether
it was begun before the one ahead of it was known.
"""

import atexit
import json
import sys
import time
from pathlib import Path
from statistics import mean, median

from isobit.backends.cuda import turns
from isobit.backends.cuda.device import gpu
from isobit.runtime.pace import Pace

NAMES = "ended", "generating", "prompt", "ms", "waited", "ahead"


class Notes:
    """Of all passes."""

    def __init__(self, kind):
        self.passes, self._waited, self._ahead = [], 0.0, False
        self._timed(kind, "wait")
        self._timed(kind, "synchronise")
        ran, served = Pace.ran, turns.Turns.served

        def noted(pace, generating, prompt, attended, seconds):
            ran(pace, generating, prompt, attended, seconds)
            of = time.time(), generating, prompt, 1e3 * seconds, 1e3 * self._waited, self._ahead
            self.passes.append(of)
            self._waited, self._ahead = 0.0, False

        def noticed(*args):
            found = served(*args)
            self._ahead = found is not None
            return found

        Pace.ran, turns.Turns.served = noted, noticed

    def _timed(self, kind, name):
        method = getattr(kind, name)

        def timed(*args):
            begun = time.perf_counter()
            try:
                return method(*args)
            finally:
                self._waited += time.perf_counter() - begun

        setattr(kind, name, timed)


def told(passes):
    """Of some passes, by kind."""
    found = {}
    for kind, of in (
        ("steps", [p for p in passes if p[1] and not p[2]]),
        ("steps beside prompts", [p for p in passes if p[1] and p[2]]),
        ("prompts", [p for p in passes if not p[1]]),
    ):
        if of:
            found[kind] = {
                "passes": len(of),
                "generations of one": round(mean(p[1] for p in of), 1),
                "tokens of prompts of one": round(mean(p[2] for p in of), 1),
                "ms p50, mean": [round(f(p[3] for p in of), 2) for f in (median, mean)],
                "ms of waiting": round(mean(p[4] for p in of), 2),
                "begun ahead": round(mean(p[5] for p in of), 3),
            }
    if passes:
        spent = passes[-1][0] - passes[0][0] + 1e-3 * passes[0][3]
        waited = 1e-3 * sum(p[4] for p in passes)
        found["all"] = {"seconds": round(spent, 2), "not waiting": round(spent - waited, 2)}
    return found


def main():
    out, simulate = Path(sys.argv[1]), sys.argv[2] == "--simulated"
    sys.argv[1 : 3 + simulate] = sys.argv[2 + simulate : 3 + simulate]
    kind = gpu.CudaGpu
    if simulate:
        import simulated  # noqa: PLC0415

        simulated.install()
        kind = simulated.SimulatedGpu
    notes = Notes(kind)
    atexit.register(lambda: out.write_text(json.dumps([NAMES, *notes.passes])))
    from isobit.__main__ import main  # noqa: PLC0415

    raise SystemExit(main())


if __name__ == "__main__":
    main()
