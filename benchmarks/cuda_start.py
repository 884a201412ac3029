"""Where the time from a new process to a model's first tokens goes, for ways to load, in turns.

usage: python benchmarks/cuda_start.py MODEL.gguf OUT.json [--rounds 2] [--seconds 45]

Each way is a process of its own; the page cache is warm, kernels are compiled. The lines before the
table are one process's: seconds since it was asked for, and how long each step took.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

WAYS = {"now": {}, "woken": {"woken": True}, "woken first": {"woken first": True}}


def wake():
    """Open the driver and its context, in a thread that hardly needs Python's lock."""

    def work():
        driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
        driver.cuInit(0)
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)

    threading.Thread(target=work).start()


def child(model, begun, how):
    """Load a model and make two tokens; print what took how long."""
    steps = []

    def now():
        return time.time() - begun

    def timed(owner, name, label):
        plain = getattr(owner, name)

        def wrapper(*a, **k):
            start = now()
            try:
                return plain(*a, **k)
            finally:
                steps.append((label, start, now() - start))

        setattr(owner, name, wrapper)

    steps.append(("interpreter", 0.0, now()))
    if "woken first" in how:
        wake()
    start = now()
    import isobit.runtime.model as runtime  # noqa: PLC0415

    steps.append(("import isobit", start, now() - start))
    start = now()
    gpu = importlib.import_module("isobit.backends.cuda.device.gpu")
    programs = importlib.import_module("isobit.backends.cuda.steps.programs")
    load = importlib.import_module("isobit.backends.cuda.device.load")
    steps.append(("import of the backend", start, now() - start))
    for owner, names in (
        (gpu.CudaGpu, ("__init__", "allocate", "page_locked", "free_page_locked", "free", "wait")),
        (gpu.CudaGpu, ("capture", "_kernel", "launch", "synchronise")),
        (programs.Programs, ("__init__", "plan", "load")),
        (programs.Resident, ("load",)),
        (load.Loader, ("__init__", "__exit__", "_take_next", "matrix")),
    ):
        for name in names:
            timed(owner, name, f"{owner.__name__}.{name}")
    if "woken" in how:
        wake()
    made = runtime.load(model, backend="cuda", sequences=how.get("sequences", 8), context=4096)
    steps.append(("load", 0.0, now()))
    start = now()
    _ = made.tokenizer
    steps.append(("tokenizer, rest of it", start, now() - start))
    start = now()
    made.generate([785, 9217, 308], max_tokens=2)
    steps.append(("first tokens", start, now() - start))
    print(json.dumps({"total": now(), "steps": steps}), flush=True)
    os._exit(0)


def summary(steps):
    """Of each step: how often, seconds in all, when it first began and last ended."""
    found = {}
    for label, start, seconds in steps:
        n, all_of, first, last = found.get(label, (0, 0.0, start, 0.0))
        found[label] = n + 1, all_of + seconds, min(first, start), max(last, start + seconds)
    return found


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--seconds", type=float, default=45)
    p.add_argument("--child", nargs=2)
    a = p.parse_args()
    if a.child:
        child(a.model, float(a.child[0]), json.loads(a.child[1]))
    end, totals, found = time.perf_counter() + a.seconds, {name: [] for name in WAYS}, {}
    for i in range(a.rounds + 1):
        for name, how in WAYS.items():
            if time.perf_counter() > end or (i == 0 and name != "now"):
                continue
            asked = [sys.executable, __file__, a.model, a.out, "--child", str(time.time())]
            done = subprocess.run(
                [*asked, json.dumps(how)], capture_output=True, text=True, timeout=60, check=False
            )
            with contextlib.suppress(IndexError, ValueError):
                said = json.loads(done.stdout.strip().splitlines()[-1])
                if i:  # the first compiles
                    totals[name].append(said["total"])
                    found.setdefault(name, []).append(said)
                continue
            print(name, "FAILED", done.stderr[-600:])
    for said in found.get("now", ())[-1:]:
        print("seconds from, to, in all, times")
        for label, (n, s, first, last) in summary(said["steps"]).items():
            print(f"  {first:6.3f} {last:6.3f} {s:8.3f} {n:6}  {label}")
    Path(a.out).write_text(json.dumps(found) + "\n")
    for name, seconds in totals.items():
        print(f"{name:<28}" + " ".join(f"{s:6.2f}" for s in seconds))


if __name__ == "__main__":
    main()
