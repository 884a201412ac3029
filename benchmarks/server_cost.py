"""What the server itself costs: processor time of each token beside the passes, thread by thread.

usage: python benchmarks/server_cost.py [--streams 64] [--seconds 10] [--ms 12] [--rounds 3]

The server with the sample model, whose passes compute nothing: they sleep, and give the tokens of a
text. A client in a process of its own keeps streams open (benchmarks/server_load.py). What is told
is processor time, which other programs change by some per cent and time on the clock by anything;
two versions are compared in turns.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from server_load import TEXT, Server, asked

import isobit
from isobit.backends.base import Results
from isobit.runtime.model import Model
from isobit.runtime.scheduler import Limits
from isobit.server.service import Service
from isobit.server.serving import run
from isobit.server.sockets import bound, listen


class Nothing:
    """Stands for a model's passes."""

    def __init__(self, model: Model, seconds: float) -> None:
        ids = model.tokenizer.encode(TEXT.read_text()[:100_000], special=False)
        self._ids = np.array([i for i in ids if i not in model.stop_ids], np.int32)
        self._seconds, self._at = seconds, 0

    def __call__(self, batch, wanted, *_):
        """What is wanted of a batch."""
        n = len(batch.logit_rows)
        self._at = (self._at + n + 1) % (len(self._ids) - 1000)
        ids = self._ids[self._at : self._at + n]
        time.sleep(self._seconds)
        drawn = None if wanted.drawn is None else ids[: len(wanted.drawn.rows)]
        return Results(np.ones(n, bool), argmax=ids, drawn=drawn)


def serve(a):
    """The process that serves."""
    with isobit.load(backend="cpu", context=512, sequences=a.streams, threads=1) as model:
        model.run_batch = Nothing(model, 1e-3 * a.ms)
        sockets = bound("127.0.0.1", a.port)
        with Service(model, limits=Limits(512, running=a.streams)) as service:
            listen(sockets)
            run(service, sockets, 1.0, print)


def spent(pid):
    """Microseconds of each thread."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return {int(t.name): int((t / "schedstat").read_text().split()[0]) / 1e3 for t in threads}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--streams", type=int, default=64)
    p.add_argument("--seconds", type=float, default=10)
    p.add_argument("--ms", type=float, default=12, help="that a pass takes")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--port", type=int, default=18127)
    p.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.serve:
        return serve(a)
    own = [sys.executable, __file__, "--serve", *sys.argv[1:]]
    for i in range(a.rounds):
        with Server(own, a.port) as server:
            pid = server.process.pid
            asked(a.port, a.streams, "--seconds", 2, seed=i)
            before = spent(pid)
            found = asked(a.port, a.streams, "--seconds", a.seconds, seed=100 + i)
            each = {t: us - before.get(t, 0) for t, us in spent(pid).items()}
        loop = each.pop(pid)
        engine, *others = sorted(each.values(), reverse=True)
        n = found["generated tokens"]
        row = {"event loop": loop / n, "engine": engine / n, "others": sum(others) / n}
        row = {name: round(us, 1) for name, us in row.items()}
        print(json.dumps(row | {"tokens": n, "load": round(os.getloadavg()[0], 1)}), flush=True)
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
