"""A hybrid geometry (synthetic.py) on one GPU: bits beside the CPU's, where the time of a step and
of a prompt goes, and how fast all of its layers are.

usage: python benchmarks/cuda_hybrid.py OUT [--model hybrid-35b-a3b] [--few 4] [--timed 8]
           [--layers 40] [--sequences 2,8] [--baseline cuda-qwen35-h200.json]

Needs torch for timelines (cuda_timeline.py). Nothing is timed if a bit differs. The table comes
last; OUT, a folder, gets it as JSON, with timelines.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import synthetic
from batches import origin
from cuda_rows import DEPTH, Texts, greedy, of_prompt
from kernels import asked, compile_all

from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.config import EngineConfig

STEPS = 4


def differing(weights, gpu, seed, sequences):
    """Logits of prompts, and of steps of one sequence and of several, that are not the CPU's, and
    how many there were."""
    most, rng = max(sequences, default=1), np.random.default_rng(seed)
    engine = EngineConfig(context=256, max_sequences=most, chunk=128)
    gpu_backend, cpu = CudaBackend(weights, engine, gpu), CpuBackend(weights, engine)
    texts, wrong, total = Texts(rng, weights.config.vocab, most, 4), 0, 0
    work = [[(s, 9)] for s in range(most)] + [[(0, 60)]] + [[(0, 1)]] * 6
    work += [[(s, 1) for s in range(n)] for n in sequences]
    for parts in work:
        states = np.array([s for s, _ in parts], np.int32)
        batch = replace(texts.batch(parts), states=states)
        a, b = gpu_backend.forward(batch), cpu.forward(batch)
        wrong += int(np.count_nonzero(a.view(np.uint32) != b.view(np.uint32)))
        total += a.size
    gpu_backend.close()
    cpu.close()
    return wrong, total


def median_us(run, passes, rounds=9):
    """Microseconds of a pass."""
    run()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(times) / passes


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--model", default="hybrid-35b-a3b")
    p.add_argument("--few", type=int, default=4)
    p.add_argument("--timed", type=int, default=8)
    p.add_argument("--layers", type=int, default=0)
    p.add_argument("--sequences", default="2,8")
    p.add_argument("--baseline", default="")
    p.add_argument("--commit", default="")
    a = p.parse_args()
    out, sequences = Path(a.out), [int(n) for n in a.sequences.split(",") if n]
    out.mkdir(parents=True, exist_ok=True)
    gpu, found = CudaGpu(), origin(a.model, a.commit)
    found["device"] = gpu.name
    begun = time.perf_counter()

    def note(name, value):
        found[name] = value
        (out / "cuda_hybrid.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{time.perf_counter() - begun:6.1f} s  {name}: {value}", flush=True)

    most = max(sequences, default=1)
    timed = EngineConfig(context=1024, max_sequences=most, chunk=2048)
    few = synthetic.weights(a.model, a.few)
    kernels = asked(few, EngineConfig(context=256, max_sequences=most, chunk=128), gpu)
    kernels |= asked(few, timed, gpu)
    note("MB of kernels", compile_all(kernels, gpu.arch) / 1e6)
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    note("seed", seed)
    wrong, total = differing(few, gpu, seed, sequences)
    note("logits differing from the CPU's", f"{wrong} of {total}")
    if wrong:
        raise SystemExit(1)
    for layers, traced in ((a.timed, True), (a.layers, False)):
        if not layers:
            continue
        weights = synthetic.weights(a.model, layers)
        backend = CudaBackend(weights, timed, CudaGpu())
        texts = Texts(np.random.default_rng(1), weights.config.vocab, most, 16)
        for s in range(most):  # what is read has been written
            at = np.array([s], np.int32)
            backend.forward(replace(texts.batch([(s, DEPTH)]), states=at))
        one = Texts(np.random.default_rng(1), weights.config.vocab, 1, 16)
        work = {"prompt of 512": (of_prompt(backend, one, 512, 0), 1)}
        for n in (1, *sequences):
            work[f"{n} sequences"] = greedy(backend, texts, n, DEPTH, STEPS), STEPS
        if traced:
            from cuda_timeline import show  # noqa: PLC0415

            for name, (run, passes) in work.items():
                show(gpu, f"{layers} layers, {name}", run, passes, out, found)
        else:
            work["1 sequences"] = greedy(backend, texts, 1, DEPTH, 64), 64
        for name, (run, passes) in work.items():
            note(f"{layers} layers, {name}, us", round(median_us(run, passes), 1))
        backend.close()
    if a.layers:
        rates = {
            "tg128@0": 1e6 / found[f"{a.layers} layers, 1 sequences, us"],
            "pp512@0": 512e6 / found[f"{a.layers} layers, prompt of 512, us"],
        }
        peer = json.loads(Path(a.baseline).read_text())["llama.cpp tokens/s"] if a.baseline else {}
        print(f"{'':<12}{'tokens/s':>10}{'llama.cpp':>11}{'ratio':>7}")
        for name, rate in rates.items():
            other = peer.get(name, float("nan"))
            note(name, round(rate, 1))
            print(f"{name:<12}{rate:10.1f}{other:11.1f}{rate / other:7.2f}")


if __name__ == "__main__":
    main()
