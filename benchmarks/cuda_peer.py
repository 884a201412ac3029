"""The CUDA backend beside llama.cpp on one model in one run: bits first, then speed.

usage: python benchmarks/cuda_peer.py MODEL.gguf LLAMA OUT.json [--depths 4096,16384]
           [--prompts 512,4096] [--sequences 8,32,64] [--no-start]

The logits of a prompt and of a few decode steps must equal the CPU backend's, and those of several
sequences together each one's alone, else nothing is timed. LLAMA is a folder with llama.cpp's
llama-bench and llama-batched-bench; without it (""), only isobit is timed. A model with recurrent
states takes neither depths nor sequences: what is compared there runs a step twice.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from batches import batch, origin
from kernels import asked, compile_all

from isobit.backends.base import Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights


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


def llama_batched(bench, model, sequences):
    """Tokens a second of so many sequences together, 128 tokens each after 128 of prompt."""
    command = [bench, "-m", model, "-ngl", "99", "-fa", "1", "-npp", "128", "-ntg", "128"]
    command += ["-npl", ",".join(map(str, sequences)), "-c", str(256 * max(sequences) + 4096)]
    out = subprocess.run(
        [*command, "--output-format", "jsonl"], capture_output=True, text=True, check=False
    )
    rows = [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]
    if out.returncode or not rows:
        print(out.stderr[-800:], out.stdout[-800:])
    return {f"tg128 x {r['pl']}": r["speed_tg"] for r in rows}


def seconds(*command):
    """Wall time of a process, the quickest of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def several(weights, tokens, sequences):
    """Our speed with several sequences: tokens chosen on the device, and logits to the host."""
    most, found = max(sequences), {}
    gpu = CudaBackend(weights, EngineConfig(context=320, max_sequences=most, chunk=512))
    pages = np.random.default_rng().permutation(5 * most).astype(np.int32).reshape(most, 5)
    for i in range(most):
        gpu.forward(batch(tokens[i : i + 128], 0, pages[i : i + 1]))
    for n in sequences:
        every, at = np.arange(n, dtype=np.int32), np.full(n, 128, np.int32)
        step = Batch(tokens[:n].astype(np.int32), at, every, pages[:n], every)
        ours = gpu.forward(step)
        for i in range(0, n, 7):
            alone = gpu.forward(batch(tokens[i : i + 1], 128, pages[i : i + 1], [0]))
            if not np.array_equal(ours[i].view(np.uint32), alone[0].view(np.uint32)):
                raise SystemExit(f"sequence {i} of {n} differs from the same alone")

        def to_host(step=step, at=at):
            for i in range(128):
                gpu.forward(replace(step, positions=at + np.int32(i)))

        found[f"tg128 x {n}"] = median_rate(
            128 * n, lambda n=n, at=at: gpu.greedy(at, at, pages[:n], 128), 3
        )
        found[f"tg128 x {n} logits to the host"] = median_rate(128 * n, to_host, 3)
    gpu.close()
    return found


def ratios(ours, theirs):
    """Ours over llama.cpp's best of the same kind."""
    found = {}
    for name, rate in ours.items():
        kind = name.split(" chunk")[0]
        kind = kind if "@" in kind or " x " in kind else f"{kind}@0"
        peer = max((theirs[k] for k in (kind, f"{kind} graph_opt") if k in theirs), default=None)
        if peer:
            found[name] = round(rate / peer, 3)
    return found


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("llama")
    p.add_argument("out")
    p.add_argument("--depths", default="4096,16384")
    p.add_argument("--prompts", default="512,4096")
    p.add_argument("--sequences", default="8,32,64")
    p.add_argument("--no-start", action="store_true")
    p.add_argument("--commit", default="")
    a = p.parse_args()
    depths, prompts, sequences = (
        [int(n) for n in text.split(",") if n] for text in (a.depths, a.prompts, a.sequences)
    )
    context = max([8192, *depths]) + 512
    found = origin(a.model, a.commit)

    def note(name, value):
        found[name] = value
        print(f"{name:<44} {value}", flush=True)
        Path(a.out).write_text(json.dumps(found, indent=1))

    weights = Weights.from_file(GGUFFile.open(a.model))
    if weights.graph.recurrent and (depths or sequences):
        raise SystemExit("a recurrent model: expected --depths '' --sequences ''")
    engine = EngineConfig(context=context, max_sequences=1, chunk=2048)
    start = time.perf_counter()
    device = CudaGpu()
    note("MB of kernels", compile_all(asked(weights, engine, device), device.arch) / 1e6)
    note("compile seconds", time.perf_counter() - start)
    start = time.perf_counter()
    gpu = CudaBackend(weights, engine, device)
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
    for n in prompts:
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
        for i in range(depth, depth + 3):  # a step's own kernels against those of any pass
            step = batch(tokens[i % 7 : i % 7 + 1], i, pages, [0])
            apart, fused = gpu.forward(step, lambda *_: None, frozenset()), gpu.forward(step)
            if differing := int((apart.view(np.uint32) != fused.view(np.uint32)).sum()):
                raise SystemExit(f"depth {depth}: {differing} logits of a step differ")
        ours[f"tg128@{depth}"] = median_rate(
            128, lambda d=depth: gpu.greedy(one, d * one, pages, 128), 3
        )
    gpu.close()
    if sequences:
        ours |= several(weights, tokens, sequences)
    note("isobit tokens/s", ours)
    if not a.no_start:
        run = ("-m", "isobit", "run", a.model, "--tokens", "785,9217,308", "-n", "1", "-c", "512")
        note("isobit start to first token, s", seconds(sys.executable, *run, "--backend", "cuda"))
    if a.llama:
        program, theirs = f"{a.llama}/llama-bench", {}
        if not a.no_start:
            options = ("-ngl", "99", "-fa", "1", "-p", "3", "-n", "0", "-r", "1", "--no-warmup")
            note("llama.cpp start to first token, s", seconds(program, "-m", a.model, *options))
        if sequences:
            theirs = llama_batched(f"{a.llama}/llama-batched-bench", a.model, sequences)
        theirs |= llama(program, a.model, "-p", ",".join(map(str, prompts)), "-n", "128")
        theirs |= llama(program, a.model, "-p", "0", "-n", "128", graph_opt=True)
        for depth in depths:
            theirs |= llama(program, a.model, "-p", "0", "-n", "128", "-d", str(depth))
        note("llama.cpp tokens/s", theirs)
        note("ratios", ratios(ours, theirs))


if __name__ == "__main__":
    main()
