"""Ways to make prompts, side by side: bits first, then their times in turns.

usage: python benchmarks/cuda_prompts.py OUT [--layers 48] [--prompts 512,2048] [--ways NAME,...]

Geometry of Qwen3-30B-A3B. A way is the program of prompts lowered anew over the same weights, with
other numbers in the modules that decide. Each must give the first way's logits, of which the last
rows are compared with the CPU's. OUT: a folder for cuda_prompts.json and the timelines of some
ways (--traced). The table comes last; the exit code is 1 if a bit differs.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import cuda_timeline
import numpy as np
import synthetic
from batches import batch, origin, patched
from kernels import Listener, compile_all

from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.backend import _ToHost
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.graph import Program
from isobit.backends.cuda.ops import attention, groups
from isobit.backends.cuda.resident import Resident, StoredWeights
from isobit.backends.cuda.steps.passes import Passes, run
from isobit.backends.cuda.steps.programs import _rows
from isobit.backends.cuda.workspace import PASS, Pass
from isobit.config import EngineConfig
from isobit.numerics import KV_PAGE

ROWS = 8  # whose logits are compared with the CPU's
WAYS = {
    "now": (),
    "experts of 16": ((groups, "_PROMPTS_EXPERTS", (6, 64)),),
    "no turns": ((attention, "in_turns", lambda _: None),),
}


class Prompts:
    """Whole prompts in one way."""

    def __init__(self, name, graph, resident, gpu, most):
        self.name, self._gpu = name, gpu
        with patched(WAYS[name]):
            self.made = Program(graph, resident, gpu, 2, PASS)
            self.passes = Passes(self.made, most)
            self.passes.settle(-(-most // KV_PAGE))

    def allocate(self, most):
        """Take the memory."""
        g = self.made.g
        rows = _rows(g, most)
        g.allocate(rows, self._gpu.allocate(g.nbytes(rows, own=False)))

    def rehearse(self, n):
        """Queue what a prompt launches."""
        spans = {length: -(-n // length) for length in self.made.g.spans}
        with patched(WAYS[self.name]):
            p = Pass(n, 1, self.passes._inputs(), spans=spans)
            run(self.made.body, p)
            for count in (1, ROWS):
                run(self.made.head, Pass(n, 1, p.inputs, count=count))

    def run(self, work):
        """The wanted rows' logits."""
        host = _ToHost(self._gpu, len(work.logit_rows), self.made.vocabulary)
        with patched(WAYS[self.name]):
            for _ in self.passes.run(work, np.zeros(1, np.int32), host, stops=False):
                pass
        return host.rows


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--commit", default="")
    p.add_argument("--layers", type=int, default=48)
    p.add_argument("--prompts", default="512,2048")
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--seconds", type=float, default=45, help="no round begins after these")
    p.add_argument("--ways", default=",".join(WAYS))
    p.add_argument("--traced", default="now")
    a = p.parse_args()
    begin, sizes = time.perf_counter(), tuple(map(int, a.prompts.split(",")))
    names, traced = a.ways.split(","), [n for n in a.traced.split(",") if n]
    out, most, gpu = Path(a.out), max(sizes), CudaGpu()
    out.mkdir(parents=True, exist_ok=True)
    found = origin("30b-a3b", a.commit) | {"device": gpu.name}

    def note(name, value):
        found[name] = value
        print(f"{time.perf_counter() - begin:6.1f} s  {name}: {value}", flush=True)
        (out / "cuda_prompts.json").write_text(json.dumps(found, indent=1) + "\n")

    weights = synthetic.weights("30b-a3b", a.layers)
    engine, graph = EngineConfig(context=most + KV_PAGE, max_sequences=1, chunk=most), weights.graph
    listener = Listener(gpu)
    unloaded = Resident.of(graph, engine.context, StoredWeights.of(graph))
    for name in names:
        for n in sizes:
            Prompts(name, graph, unloaded, listener, most).rehearse(n)
    note("MB of kernels", compile_all(listener.asked, gpu.arch) / 1e6)
    backend = CudaBackend(weights, engine, gpu)
    backend._extend_rope_tables(most)
    gpu.activate()
    note("loaded", str(backend.plan))
    ways = {n: Prompts(n, graph, backend._programs.resident, gpu, most) for n in names}
    for each in ways.values():
        each.allocate(most)
    tokens = np.random.default_rng(5).integers(0, weights.config.vocab, most)
    pages = np.arange(-(-most // KV_PAGE), dtype=np.int32)[None]
    cpu, wrong = CpuBackend(weights, engine), 0
    for n in sizes:
        work = batch(tokens[:n], 0, pages, np.arange(n - ROWS, n))
        logits = {name: each.run(work).copy().view(np.uint32) for name, each in ways.items()}
        expected = logits[names[0]]
        differ = {name: int(np.count_nonzero(x != expected)) for name, x in logits.items()}
        if n <= 512:
            differ["cpu"] = int(np.count_nonzero(cpu.forward(work).view(np.uint32) != expected))
        note(f"prompt of {n}: logits of {expected.size} that differ", differ)
        wrong += sum(differ.values())
    cpu.close()
    times = {f"{n}": {name: [] for name in names} for n in sizes}
    for i in range(a.rounds + 3):  # the first ones capture and warm up
        for n in sizes:
            work = batch(tokens[:n], 0, pages, [n - 1])
            for name, each in ways.items():
                if time.perf_counter() - begin > a.seconds and i > 3:
                    continue
                start = time.perf_counter()
                each.run(work)
                if i >= 3:
                    times[f"{n}"][name].append(round(1e6 * (time.perf_counter() - start)))
    note("us", times)
    if traced:
        work = batch(tokens[: sizes[0]], 0, pages, [sizes[0] - 1])
        for name in traced:
            cuda_timeline.show(
                gpu, f"{name}, {sizes[0]}", partial(ways[name].run, work), 1, out, found
            )
        note("traced", traced)
    print(f"{'':<28}" + "".join(f"{n:>9}        " for n in sizes))
    for name in names:
        print(f"{name:<28}", end="")
        for n in sizes:
            us = np.array(times[f"{n}"][name]), np.array(times[f"{n}"][names[0]])
            ratio = np.median(us[0] / us[1]) if len(us[0]) == len(us[1]) else np.nan
            print(f"{np.median(us[0]):9.0f} {ratio:7.3f}", end="")
        print()
    print(f"{wrong} logits differ")
    backend.close()
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
