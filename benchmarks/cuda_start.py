"""Where the time from a new process to a model's first token goes, and what ways to start cost.

usage: python benchmarks/cuda_start.py MODEL.gguf OUT.json [--rounds 3] [--seconds 60] [--ways WAY…]

``isobit run`` as users have it: a process of its own, the page cache warm, kernels and Python's
bytecode compiled. A way's time ends with the first byte of the answer. The lines before the table
are of one process that is timed inside: seconds since it was asked for, and what each step took.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

WAYS = {
    "now": "",
    "driver not held": "import isobit.backends as b; b.may_have_gpu = lambda: False",
    "garbage collected": "import gc; gc.disable = lambda: None",
    "weights after programs": """
import isobit.backends.cuda.backend as b
b.STAGING_BYTES = 1 << 60""",
}
"""What a process does first."""
_OFF = "driver not held", "garbage collected", "weights after programs"
WAYS["as before"] = "\n".join(WAYS[name] for name in _OFF)
TOKENS = "785,921,308"


def command(model, text):
    prompt = ["-p", "def read_lines(path):"] if text else ["--tokens", TOKENS]
    return ["run", model, *prompt, "-n", "2", "--jsonl", "--backend", "cuda", "-c", "4096"]


def start(model, first, env, text=True):
    """Seconds until the first byte of the answer."""
    code = f"{first}\nimport sys\nfrom isobit.__main__ import main\nsys.exit(main())"
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, *command(model, text)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    ) as process:
        found = process.stdout.read(1)
        took = time.perf_counter() - begun
        _, said = process.communicate(timeout=60)
    if not found or process.returncode:
        raise RuntimeError(said.decode()[-600:])
    return took


def child(model, begun):
    """The same with its steps timed; prints them."""
    steps = []

    def now():
        return time.time() - begun

    def timed(owner, name, label=None):
        plain = getattr(owner, name)

        def wrapper(*a, **k):
            begun_at = now()
            try:
                return plain(*a, **k)
            finally:
                steps.append((label or f"{owner.__name__}.{name}", begun_at, now() - begun_at))

        setattr(owner, name, wrapper)

    steps.append(("interpreter", 0.0, now()))
    import isobit.__main__ as first  # noqa: PLC0415

    for label, module in (
        ("import numpy", "numpy"),
        ("import isobit.cli.run", "isobit.cli.run"),
        ("import isobit.backends.cuda", "isobit.backends.cuda"),
        ("import the driver's bindings", "cuda.bindings.driver"),
        ("import NVRTC's bindings", "cuda.bindings.nvrtc"),
    ):
        at = now()
        import_module(module)
        steps.append((label, at, now() - at))
    nvrtc = import_module("cuda.bindings.nvrtc")
    timed(nvrtc, "nvrtcVersion", "NVRTC's version")
    runtime = import_module("isobit.runtime.loaded")
    gpu = import_module("isobit.backends.cuda.device.gpu")
    programs = import_module("isobit.backends.cuda.steps.programs").Programs
    stored = import_module("isobit.backends.cuda.resident").StoredWeights
    for owner, names in (
        (gpu.CudaGpu, ("__init__", "allocate", "page_locked", "free_page_locked", "free", "wait")),
        (gpu.CudaGpu, ("capture", "_kernel", "launch", "synchronise")),
        (programs, ("__init__", "plan", "load")),
        (stored, ("begin", "arrive")),
    ):
        for name in names:
            timed(owner, name)
    timed(gpu, "cubin", "kernel from the disk")
    timed(gpu, "available", "cuInit and capability")
    timed(runtime, "open_model", "file's header")
    timed(runtime.Weights, "from_file", "graph and weights' places")
    timed(runtime.Tokenizer, "from_metadata", "tokenizer, in its thread")
    timed(runtime.LoadedModel, "__init__", "model loaded")
    timed(runtime.LoadedModel, "tokenize", "waited for the tokenizer")
    run = import_module("isobit.cli.run")
    timed(run, "follow", "answer")
    sys.argv = ["isobit", *command(model, True)]
    plain = sys.stdout

    class Out:
        def write(self, text):
            if text and not any(label == "first text" for label, *_ in steps):
                steps.append(("first text", now(), 0.0))

        def flush(self):
            pass

        def isatty(self):
            return False

    sys.stdout = Out()
    first.main()
    sys.stdout = plain
    print(json.dumps(steps), flush=True)
    os._exit(0)


def summary(steps):
    """Of each step: how often, seconds in all, when it first began and last ended."""
    found = {}
    for label, begun, seconds in steps:
        n, all_of, first, last = found.get(label, (0, 0.0, begun, 0.0))
        found[label] = n + 1, all_of + seconds, min(first, begun), max(last, begun + seconds)
    return found


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    p.add_argument("--child", type=float)
    a = p.parse_args()
    if a.child:
        child(a.model, a.child)
    totals = {name: [] for name in [*a.ways, "now, token ids"]}
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = folder  # as of an installed package
        start(a.model, "", env)  # compiles
        end = time.perf_counter() + a.seconds
        inside = subprocess.run(
            [sys.executable, __file__, a.model, a.out, "--child", str(time.time())],
            capture_output=True,
            text=True,
            timeout=60,
            env=env,
            check=False,
        )
        steps = {}
        with contextlib.suppress(IndexError, ValueError):
            steps = summary(json.loads(inside.stdout.strip().splitlines()[-1]))
        print("seconds from, to, in all, times", "" if steps else inside.stderr[-900:])
        for label, (n, s, first, last) in sorted(steps.items(), key=lambda i: i[1][2]):
            print(f"  {first:6.3f} {last:6.3f} {s:8.3f} {n:6}  {label}")
        for _ in range(a.rounds):
            for name, taken in totals.items():
                if time.perf_counter() < end:
                    how = WAYS.get(name, "")
                    taken.append(start(a.model, how, env, text=name in WAYS))
        from_source = start(a.model, "", os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    Path(a.out).write_text(json.dumps({"steps": steps, "seconds": totals}) + "\n")
    for name, taken in totals.items():
        print(f"{name:<40}" + " ".join(f"{s:6.2f}" for s in taken))
    print(f"{'now, without bytecode':<40}{from_source:6.2f}")


if __name__ == "__main__":
    main()
