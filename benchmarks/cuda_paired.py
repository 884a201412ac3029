"""Two installations of isobit on one model and GPU, in turns: the same bits, and how fast each is.

usage: python benchmarks/cuda_paired.py MODEL.gguf OUT.json OLD_SITE NEW_SITE [--rounds 3]

A site is a folder that isobit is installed in (pip install --target). Each turn is a process of its
own: it runs a prompt and 24 steps, of which it gives digests, and then times decoding at several
depths, steps of several sequences, and prefill. No figure stands unless all digests are equal; the
first turn's prompt is compared with the CPU backend's logits as well.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

DEPTHS = (0, 128, 4096, 16384)
SEQUENCES = (2, 8, 32)
PREFILL = (512, 2048)
STEPS = 64


def turn(path, *, check):
    """One process: digests of logits, and rates in tokens a second."""
    from batches import batch  # noqa: PLC0415

    from isobit.backends.cpu import CpuBackend  # noqa: PLC0415
    from isobit.backends.cuda import CudaBackend  # noqa: PLC0415
    from isobit.config import EngineConfig  # noqa: PLC0415
    from isobit.gguf.reader import GGUFFile  # noqa: PLC0415
    from isobit.model.weights import Weights  # noqa: PLC0415

    weights = Weights.from_file(GGUFFile.open(path))
    vocab = weights.config.vocab
    engine = EngineConfig(context=DEPTHS[-1] + 512, max_sequences=max(SEQUENCES), chunk=2048)
    start = time.perf_counter()
    backend = CudaBackend(weights, engine)
    found = {"load seconds": time.perf_counter() - start, "device": backend.device}
    memory = backend.memory()
    free, total = memory.free, memory.total
    found["used GB"], found["planned GB"] = (total - free) / 1e9, backend.plan.total / 1e9
    pages = np.arange(-(-engine.context // 64), dtype=np.int32)[None]
    tokens = np.random.default_rng(5).integers(0, vocab, 2048).astype(np.int32)

    logits = [backend.forward(batch(tokens[:40], 0, pages, [0, 39]))]
    for i in range(40, 64):
        logits.append(np.array(backend.forward(batch(tokens[i : i + 1], i, pages, [0]))))
    ours = np.concatenate(logits)
    found["digest"] = hashlib.sha256(ours.tobytes()).hexdigest()
    if check:
        cpu = CpuBackend(weights, EngineConfig(context=128, max_sequences=1))
        theirs = cpu.forward(batch(tokens[:64], 0, pages[:, :2], [0, *range(39, 64)]))
        differing = np.count_nonzero(theirs.view(np.uint32) != ours.view(np.uint32))
        found["cpu"] = f"{differing} of {theirs.size} differ"
        cpu.close()

    rates = {}

    def best(name, tokens_of_one, run, repeats=5):
        run()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        rates[name] = tokens_of_one / float(np.median(seconds))

    one = np.ones(1, np.int32)
    for depth in DEPTHS:
        at = np.array([depth], np.int32)
        best(f"depth {depth}", STEPS, lambda at=at: backend.greedy(one, at, pages, STEPS))

    def with_logits():
        for i in range(STEPS):
            backend.forward(batch(one, 128 + i, pages, [0]))

    best("with logits to the host", STEPS, with_logits)
    for n in SEQUENCES:
        table = np.arange(4 * n, dtype=np.int32).reshape(n, 4)
        for i in range(n):
            backend.forward(batch(tokens[:128], 0, table[i : i + 1]))
        at, first = np.full(n, 128, np.int32), tokens[:n]
        chosen = backend.greedy(first, at, table, STEPS)
        found[f"digest {n}"] = hashlib.sha256(chosen.tobytes()).hexdigest()
        best(
            f"{n} sequences",
            n * STEPS,
            lambda f=first, a=at, t=table: backend.greedy(f, a, t, STEPS),
            repeats=3,
        )
    for n in PREFILL:
        work = batch(tokens[:n], 0, pages, [n - 1])
        best(f"prefill {n}", n, lambda w=work: backend.forward(w), repeats=3)
    after = backend.memory().free
    found["graphs of other steps, MB"] = (free - after) / 1e6
    backend.close()
    print(json.dumps(found | {"rates": rates}))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out", nargs="?")
    p.add_argument("old", nargs="?")
    p.add_argument("new", nargs="?")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--turn", action="store_true", help="be one turn")
    p.add_argument("--check", action="store_true", help="with the CPU's logits")
    a = p.parse_args()
    if a.turn:
        turn(a.model, check=a.check)
        return
    turns = {"old": [], "new": []}
    for i in range(a.rounds):
        for name, site in (("old", a.old), ("new", a.new)):
            command = [sys.executable, __file__, a.model, "--turn"]
            command += ["--check"] if i == 0 and name == "new" else []
            path = os.pathsep.join([site, *filter(None, [os.environ.get("PYTHONPATH")])])
            out = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": path}, check=True, stdout=subprocess.PIPE
            )
            turns[name].append(json.loads(out.stdout.splitlines()[-1]))
            print(name, json.dumps(turns[name][-1]), flush=True)
            Path(a.out).write_text(json.dumps(turns, indent=1) + "\n")
    every = [t for ts in turns.values() for t in ts]
    same = all(t[k] == every[0][k] for t in every for k in t if k.startswith("digest"))
    checked = turns["new"][0]["cpu"]
    print("digests equal:", same, "| beside the CPU:", checked)
    for rate in every[0]["rates"]:
        old, new = (np.array([t["rates"][rate] for t in turns[n]]) for n in ("old", "new"))
        ratio = np.median(new / old)
        print(f"{rate:<26} {np.median(old):10.1f} {np.median(new):10.1f}  x {ratio:.4f}")
    raise SystemExit(not same or not checked.startswith("0 "))


main()
