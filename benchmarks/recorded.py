"""isobit's command line, with a note of every pass of its engine.

usage: python benchmarks/recorded.py OUT.json [--simulated] serve MODEL.gguf --backend cuda …

At its end OUT.json gets of each pass: when it ended (time.time), generations and tokens of prompts
in it, milliseconds of it, whether it was begun before the one ahead of it was known, and the
milliseconds in which the host waited for the device, brought inputs to it and queued launches.
"""

import atexit
import json
import sys
import time
from pathlib import Path
from statistics import mean, median

from isobit.backends.cuda.device import gpu
from isobit.backends.cuda.steps import run_ahead
from isobit.runtime.prefill_budget import PrefillBudget

NAMES = "ended", "generating", "prompt", "ms", "ahead", "waiting", "uploading", "queueing"
CALLS = {
    "waiting": ("wait", "synchronise"),
    "uploading": ("upload",),
    "queueing": ("replay", "launch", "fetch", "mark"),
}


class Notes:
    """Of all passes."""

    def __init__(self, kind):
        self.passes, self._spent, self._ahead = [], dict.fromkeys(CALLS, 0.0), False
        for what, names in CALLS.items():
            for name in names:
                self._timed(kind, what, name)
        ran, served = PrefillBudget.ran, run_ahead.RunAhead.match

        def noted(pace, generating, prompt, attended, seconds):
            ran(pace, generating, prompt, attended, seconds)
            spent = [round(1e3 * s, 3) for s in self._spent.values()]
            of = time.time(), generating, prompt, round(1e3 * seconds, 3), self._ahead, *spent
            self.passes.append(of)
            self._spent, self._ahead = dict.fromkeys(CALLS, 0.0), False

        def noticed(*args):
            found = served(*args)
            self._ahead = found is not None
            return found

        PrefillBudget.ran, run_ahead.RunAhead.match = noted, noticed

    def _timed(self, kind, what, name):
        method = getattr(kind, name)

        def timed(*args, **more):
            begun = time.perf_counter()
            try:
                return method(*args, **more)
            finally:
                self._spent[what] += time.perf_counter() - begun

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
                "begun ahead": round(mean(p[4] for p in of), 3),
            } | {f"ms {what}": round(mean(p[i] for p in of), 2) for i, what in enumerate(CALLS, 5)}
    if passes:
        spent = passes[-1][0] - passes[0][0] + 1e-3 * passes[0][3]
        waited = 1e-3 * sum(p[5] for p in passes)
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
