"""Where the time of steps and prompts goes on the GPU, from the driver's own timeline (CUPTI).

usage: python benchmarks/cuda_timeline.py MODEL.gguf OUT [--sequences 8,32] [--prompts 512]

Needs torch, whose profiler reads the timeline. Kernels overlap, so a kernel's own time is what it
adds: its end less the latest end before it. A row is a kernel with its grid and threads, in the
order in which a layer has them; "alone" is how long it was there, waiting included. OUT: a folder
for the table, and for each timeline of a step.
"""

import argparse
import gzip
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from batches import origin
from cuda_rows import DEPTH, Texts, greedy, of_prompt
from kernels import asked, compile_all
from torch.profiler import ProfilerActivity, profile

from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights

STEPS = 4


def traced(run, device=0):
    """The kernels that ran on a device, in order of their ends: name, grid, threads, start and end
    in us."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = []
    for e in events:
        if e.get("cat") == "kernel" and e["args"]["device"] == device:
            how = e["args"]
            shape = "x".join(map(str, how["grid"])), "x".join(map(str, how["block"][:1]))
            kernels.append((e["name"].split("(")[0], *shape, e["ts"], e["ts"] + e["dur"]))
    return sorted(kernels, key=lambda k: k[4])


def table(kernels, passes):
    """For each kind of kernel: how many a pass, own and whole microseconds each (medians), own
    microseconds a pass; and microseconds of a pass."""
    kinds, last = defaultdict(list), kernels[0][3]
    for name, grid, threads, start, end in kernels:
        kinds[name, grid, threads].append((max(end - last, 0.0), end - start))
        last = max(last, end)
    rows = []
    for (name, grid, threads), times in kinds.items():
        own, alone = np.array(times).T
        rows.append(
            {
                "kernel": name,
                "grid": grid,
                "threads": threads,
                "a pass": len(times) / passes,
                "own": round(float(np.median(own)), 2),
                "alone": round(float(np.median(alone)), 2),
                "us a pass": round(float(own.sum()) / passes, 1),
            }
        )
    return rows, (last - kernels[0][3]) / passes


def read_rate(gpu):
    """GB/s of a plain read of 2 GiB."""
    nbytes, part = 2 << 30, 1 << 26
    at, out = gpu.allocate(nbytes), gpu.allocate(256)
    gpu.upload(at, np.random.default_rng().integers(0, 256, part, np.uint8))
    for first in range(part, nbytes, part):
        gpu.copy(at, at + first, part)

    def read():
        grid = (8 * gpu.multiprocessors,)
        gpu.launch("device/bandwidth", "read_all", grid, (at, nbytes // 16, out))

    read()
    gpu.synchronise()
    best = min(k[4] - k[3] for k in traced(lambda: [read() for _ in range(5)]))
    gpu.free(at)
    return nbytes / best / 1e3


def show(gpu, name, run, passes, out, found):
    """Print a timeline's table, and keep one pass of it."""
    for _ in range(3):  # captures and warms up
        run()
    gpu.synchronise()
    kernels = traced(run)
    rows, us = table(kernels, passes)
    found[name] = {"us": us, "kernels": rows}
    with gzip.open(out / f"timeline-{name.replace(' ', '-')}.json.gz", "wt") as file:
        json.dump(kernels[: len(kernels) // passes], file)
    print(f"{name}: {us:.0f} us; own us each, alone, us a pass")
    for row in sorted(rows, key=lambda row: -row["us a pass"])[:16]:
        print(
            f"  {row['a pass']:5.1f} x {row['kernel'][:22]:<22} {row['grid']:<12}"
            f"{row['threads']:>5} {row['own']:8.2f} {row['alone']:8.2f} {row['us a pass']:9.1f}"
        )


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--sequences", default="8,32")
    p.add_argument("--prompts", default="512")
    p.add_argument("--commit", default="")
    a = p.parse_args()
    sizes, prompts = ([int(n) for n in text.split(",") if n] for text in (a.sequences, a.prompts))
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    weights, most = Weights.from_file(GGUFFile.open(a.model)), max(sizes, default=2)
    engine = EngineConfig(context=4352, max_sequences=most, chunk=2048, pages=24 * most + 72)
    gpu = CudaGpu()
    compile_all(asked(weights, engine, gpu) | {("device/bandwidth", ())}, gpu.arch)
    backend = CudaBackend(weights, engine, gpu)
    found = origin(a.model, a.commit) | {"device": gpu.name, "GB/s of a plain read": read_rate(gpu)}
    print(f"{gpu.name}: plain read {found['GB/s of a plain read']:.0f} GB/s")
    texts = Texts(np.random.default_rng(1), weights.config.vocab, most, 24)
    for s in range(most):  # what is read has been written
        backend.forward(texts.batch([(s, DEPTH)]))
    work = {f"{n} sequences": (greedy(backend, texts, n, DEPTH, STEPS), STEPS) for n in sizes}
    long = Texts(np.random.default_rng(1), weights.config.vocab, 1, 68)
    work |= {f"prompt of {n}": (of_prompt(backend, long, n, 0), 1) for n in prompts}
    for name, (run, passes) in work.items():
        show(gpu, name, run, passes, out, found)
        (out / "cuda_timeline.json").write_text(json.dumps(found, indent=1) + "\n")
    backend.close()


if __name__ == "__main__":
    main()
