"""The CUDA backend beside llama.cpp on one model in one run: bits first, then speed.

usage: python benchmarks/cuda_peer.py MODEL.gguf LLAMA_BENCH OUT.json [--depths 4096,16384]

The logits of a prompt and of a few decode steps must equal the CPU backend's, else nothing is
timed. LLAMA_BENCH is the path of llama.cpp's llama-bench; without it (""), only isobit is timed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

from isobit.backends.base import Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights


def batch(tokens, start, pages, rows=()):
    n = len(tokens)
    return Batch(
        np.array(tokens, np.int32),
        np.arange(start, start + n, dtype=np.int32),
        np.zeros(n, np.int32),
        pages,
        np.array(rows, np.int32),
    )


def median_rate(tokens, run, repeats=5):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return tokens / statistics.median(times)


def llama(bench, model, *arguments, graph_opt=False):
    environment = dict(os.environ)
    if graph_opt:
        environment["GGML_CUDA_GRAPH_OPT"] = "1"
    command = [bench, "-m", model, "-ngl", "99", "-fa", "1", "-r", "3", "-o", "json", *arguments]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if out.returncode:
        print(out.stderr[-800:])
        return {}
    rows = json.loads(out.stdout)
    suffix = " graph_opt" if graph_opt else ""
    found = {}
    for r in rows:
        kind = f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}"
        found[f"{kind}@{r['n_depth']}{suffix}"] = r["avg_ts"]
    found["build"] = rows[0]["build_commit"]
    return found


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("llama")
    p.add_argument("out")
    p.add_argument("--depths", default="4096,16384")
    p.add_argument("--commit", default="")
    a = p.parse_args()
    depths = [int(d) for d in a.depths.split(",") if d]
    context = max([8192, *depths]) + 512
    found = {"model": Path(a.model).name, "commit": a.commit, "machine": platform.platform()}

    def note(name, value):
        found[name] = value
        print(f"{name:<44} {value}", flush=True)
        Path(a.out).write_text(json.dumps(found, indent=1))

    weights = Weights.from_file(GGUFFile.open(a.model))
    engine = EngineConfig(context=context, max_sequences=1, chunk=2048)
    start = time.perf_counter()
    gpu = CudaBackend(weights, engine)
    note("device", gpu.device)
    note("load seconds", time.perf_counter() - start)
    note("memory plan", str(gpu.plan))
    rng = np.random.default_rng()
    tokens = rng.integers(0, weights.config.vocab, 4096)
    pages = rng.permutation(-(-context // 64)).astype(np.int32)[None]
    one = np.ones(1, np.int32)

    cpu = CpuBackend(weights, EngineConfig(context=512, max_sequences=1))
    plain = np.arange(8, dtype=np.int32)[None]
    parts = [(0, 40), *((i, i + 1) for i in range(40, 44))]
    differing = total = 0
    for start, stop in parts:
        rows = range(stop - start)
        ours = gpu.forward(batch(tokens[start:stop], start, pages, rows))
        theirs = cpu.forward(batch(tokens[start:stop], start, plain, rows))
        differing += int((ours.view(np.uint32) != theirs.view(np.uint32)).sum())
        total += ours.size
    cpu.close()
    note("logits differing from the CPU backend", f"{differing} of {total}")
    if differing:
        raise SystemExit(1)

    ours = {}
    for n in (512, 4096):
        for chunk in (512, 2048):
            if chunk > n:
                continue

            def prefill(n=n, chunk=chunk):
                for i in range(0, n, chunk):
                    part = tokens[i : i + chunk]
                    rows = [len(part) - 1] if i + chunk >= n else []
                    gpu.forward(batch(part, i, pages, rows))

            ours[f"pp{n} chunk {chunk}"] = median_rate(n, prefill)
    ours["tg128@0"] = median_rate(128, lambda: gpu.greedy(one, 0 * one, pages, 128), 3)
    ours["tg128@0 logits to the host"] = median_rate(
        64, lambda: [gpu.forward(batch([1], i, pages, [0])) for i in range(64)], 3
    )
    for depth in depths:
        for i in range(0, depth, 2048):
            gpu.forward(batch(tokens[:2048], i, pages, []))
        ours[f"tg128@{depth}"] = median_rate(
            128, lambda d=depth: gpu.greedy(one, d * one, pages, 128), 3
        )
    note("isobit tokens/s", ours)
    gpu.close()
    if a.llama:
        theirs = llama(a.llama, a.model, "-p", "512,4096", "-n", "128")
        theirs |= llama(a.llama, a.model, "-p", "0", "-n", "128", graph_opt=True)
        for depth in depths:
            theirs |= llama(a.llama, a.model, "-p", "0", "-n", "128", "-d", str(depth))
        note("llama.cpp tokens/s", theirs)


main()
