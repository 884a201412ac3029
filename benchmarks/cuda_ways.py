"""Ways to make steps of several sequences, side by side: bits first, then their times in turns.

usage: python benchmarks/cuda_ways.py MODEL.gguf OUT [--seconds 100] [--sequences 8,16,32]

A way is the program of steps lowered anew over the same weights, with other numbers in the modules
that decide. Each must give the first way's logits and tokens; some of those are compared with the
CPU's. OUT: a folder for cuda_ways.json. The table comes last; the exit code is 1 if a bit differs.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import cuda_timeline
import numpy as np
from batches import origin, patched
from cuda_rows import DEPTH, Texts
from kernels import asked, compile_all

from isobit.backends.base import Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.graph import Program
from isobit.backends.cuda.ops import head_matmul, launch_shapes, part_matmul
from isobit.backends.cuda.steps import captured
from isobit.backends.cuda.steps.captured import ManySequences, OneSequence, SeveralRows, Step
from isobit.backends.cuda.steps.programs import CaptureSizes, _rows
from isobit.backends.cuda.workspace import ROWS, STEP, STEPS
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights

COUNT, FEW, PROMPTS = 8, 4, (512, 2048)  # steps at once; tokens
TRACED = (("now", 8), ("now", 32), ("now", 64))  # ways, sequences
WAYS = {
    "now": (),
    "whole products": ((part_matmul, "_PART_TOKENS", 0),),
    "a block a token's logits": ((captured, "_SEARCH", 0),),
    "nothing ahead": ((launch_shapes, "AHEAD", {}),),
    "the head as other products": ((head_matmul, "_FROM", 65),),
}
FIRST = next(iter(WAYS))


class Steps:
    """Steps of all sizes in one way."""

    def __init__(self, name, backend, weights, sizes):
        self.name, self._gpu = name, backend._gpu
        with patched(WAYS[name]):
            at = weights.graph, backend._programs.resident, self._gpu, 2, STEPS
            padded = [n for n in sizes if n > FEW]
            made = Program(*at)
            many = ManySequences(made, max(padded), padded)
            self.of = dict.fromkeys(padded, many)
            programs = [(made, max(padded))]
            for n in set(sizes) - {*padded}:
                made = Program(*at[:-1], ROWS if n > 1 else STEP, rows=n)
                self.of[n] = SeveralRows(made, n) if n > 1 else OneSequence(made)
                programs.append((made, n))
            for made, n in programs:
                rows = _rows(made.g, n)
                made.g.allocate(rows, self._gpu.allocate(made.g.nbytes(rows, own=False)))
            for n, steps in self.of.items():
                if n > 1:
                    steps.start()
                for key in steps.graphs.keys:
                    steps.graphs[key]

    def run(self, texts, n):
        """Tokens found, the last step's logits, and microseconds of a step."""
        each = np.arange(n, dtype=np.int32)
        step = Step(each + 1, np.full(n, DEPTH, np.int32), texts.pages[:n], 0 * each, each)
        self._gpu.synchronise()
        start = time.perf_counter()
        tokens = self.of[n].greedy(step, COUNT)
        seconds = time.perf_counter() - start
        logits = np.empty((n, self.of[n]._program.vocabulary), np.uint32)
        self._gpu.download(self.of[n].logits, logits)
        return tokens, logits, 1e6 * seconds / COUNT


def check(backend, weights, note):
    """Logits of prompts, of steps and of mixed batches beside the CPU's; how many differ."""
    settings = EngineConfig(context=256, max_sequences=32)
    texts = Texts(np.random.default_rng(), weights.config.vocab, 32, 4)
    wrong = 0
    parts = [("prompts", [(s, 1 + s % 9) for s in range(32)])]
    parts += [(f"{n} together", [(s, 1) for s in range(n)]) for n in (1, 2, 3, 4, 5, 8, 16, 32)]
    parts += [("31 steps + 20", [*((s, 1) for s in range(31)), (31, 20)])]
    cpu = CpuBackend(weights, settings)
    for name, part in parts:
        batch = texts.batch(part)
        ours, theirs = np.array(backend.forward(batch)), cpu.forward(batch)
        different = int(np.count_nonzero(ours.view(np.uint32) != theirs.view(np.uint32)))
        note(f"{name}: logits that differ from the CPU's", f"{different} of {ours.size}")
        wrong += different
    cpu.close()
    return wrong


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--commit", default="")
    p.add_argument("--seconds", type=float, default=100)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--sequences", default="8,16,32,64,128,256")
    a = p.parse_args()
    begin, sizes = time.perf_counter(), tuple(map(int, a.sequences.split(",")))
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    weights, gpu = Weights.from_file(GGUFFile.open(a.model)), CudaGpu()
    found = origin(a.model, a.commit) | {"device": gpu.name}

    def note(name, value):
        found[name] = value
        print(f"{time.perf_counter() - begin:6.1f} s  {name}: {value}", flush=True)
        (out / "cuda_ways.json").write_text(json.dumps(found, indent=1) + "\n")

    most = max(sizes)
    engine = EngineConfig(context=2304, max_sequences=most, chunk=2048, pages=4 * most + 72)
    kernels = set()
    for changes in WAYS.values():
        with patched(changes):
            kernels |= asked(weights, engine, gpu)
    note("MB of kernels", compile_all(kernels, gpu.arch) / 1e6)
    backend = CudaBackend(weights, engine, gpu)
    note("loaded", str(backend.plan))
    wrong = check(backend, weights, note)
    texts = Texts(np.random.default_rng(1), weights.config.vocab, most, 4)
    for s in range(most):  # what is read has been written
        backend.forward(texts.batch([(s, DEPTH)]))
    assert set(sizes) <= {1, *CaptureSizes().few, *CaptureSizes().padded}
    ways = {name: Steps(name, backend, weights, sizes) for name in WAYS}
    note("ways", len(ways))
    times = {name: {n: [] for n in sizes} for name in WAYS}
    for i in range(a.rounds + 1):
        for n in sizes:
            expected = None
            for name, steps in ways.items():
                if time.perf_counter() - begin > a.seconds and i > 1:
                    continue
                tokens, logits, us = steps.run(texts, n)
                if i == 0:
                    expected = expected or (tokens, logits)
                    same = all(map(np.array_equal, expected, (tokens, logits)))
                    if not same:
                        note(f"{name}, {n} sequences", "OTHER BITS than the first way's")
                    wrong += not same
                else:
                    times[name][n].append(us)
    note("us", times)
    for name, n in TRACED:
        run = partial(ways[name].run, texts, n)
        cuda_timeline.show(gpu, f"{name}, {n} sequences", run, COUNT, out, found)
    for n in PROMPTS:
        at = np.arange(n, dtype=np.int32)
        long = Texts(None, 0, 1, 36)
        batch = long_batch(at, long.pages)
        us = []
        for _ in range(6):
            start = time.perf_counter()
            backend.forward(batch)
            us.append(1e6 * (time.perf_counter() - start))
        note(f"us of a prompt of {n}", float(np.median(us[2:])))
    print(f"{'':<22}" + "".join(f"{n:>9}" for n in sizes))
    for name in WAYS:
        mid = [float(np.median(times[name][n] or [0])) for n in sizes]
        ratio = [
            float(np.median(np.array(times[name][n]) / np.array(times[FIRST][n])))
            for n in sizes
            if len(times[name][n]) == len(times[FIRST][n])
        ]
        print(f"{name:<22}" + "".join(f"{us:9.0f}" for us in mid))
        print(f"{'':<22}" + "".join(f"{r:9.3f}" for r in ratio))
    print(f"{wrong} logits, or ways, differ")
    backend.close()
    raise SystemExit(wrong > 0)


def long_batch(at, pages):
    """A whole prompt, with the logits of its last token."""
    return Batch((at % 1000).astype(np.int32), at, 0 * at, pages, at[-1:])


if __name__ == "__main__":
    main()
