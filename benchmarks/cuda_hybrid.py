"""A hybrid geometry (synthetic.py) on one GPU: bits beside the CPU's, where the time of a step and
of a prompt goes, and how fast all of its layers are.

usage: python benchmarks/cuda_hybrid.py OUT [--model hybrid-35b-a3b] [--few 4] [--timed 8]
           [--layers 40] [--sequences 2,8] [--baseline cuda-qwen35-h200.json] [--only bits rates]

Each stage is a process: compile, bits, rates, unfetched, timeline (which needs torch). Nothing is
timed if a bit differs. The table comes last; OUT, a folder, gets all as JSON, with timelines.
"""

import argparse
import json
import statistics
import subprocess
import sys
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
from isobit.backends.cuda.fusions import decode_launches
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


def opened(a, layers, most):
    """A device, its backend of so many layers, texts that each sequence has read some of, and what
    runs a prompt."""
    weights, gpu = synthetic.weights(a.model, layers), CudaGpu()
    backend = CudaBackend(weights, EngineConfig(context=1024, max_sequences=most, chunk=2048), gpu)
    texts = Texts(np.random.default_rng(1), weights.config.vocab, most, 16)
    for s in range(most):  # what is read has been written
        batch = texts.batch([(s, DEPTH)])
        backend.forward(replace(batch, states=np.array([s], np.int32)))
    one = Texts(np.random.default_rng(1), weights.config.vocab, 1, 16)
    return gpu, backend, texts, of_prompt(backend, one, 512, 0)


def compiled(a, note):
    """Every kernel of the other stages, by all cores."""
    gpu, few = CudaGpu(), synthetic.weights(a.model, 4)
    most, kernels = max(a.sequences, default=1), set()
    for context, chunk in ((256, 128), (1024, 2048)):
        kernels |= asked(few, EngineConfig(context=context, max_sequences=most, chunk=chunk), gpu)
    note("device", gpu.name)
    note("MB of kernels", compile_all(kernels, gpu.arch) / 1e6)


def bits(a, note):
    """Logits beside the CPU's."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    note("seed", seed)
    weights = synthetic.weights(a.model, a.few)
    wrong, total = differing(weights, CudaGpu(), seed, a.sequences)
    note("logits differing from the CPU's", f"{wrong} of {total}")
    if wrong:
        raise SystemExit(1)


def rates(a, note):
    """Microseconds of a prompt and of steps, all layers."""
    _, backend, texts, prompt = opened(a, a.layers, max(a.sequences, default=1))
    note("prompt of 512, us", round(median_us(prompt, 1), 1))
    for n in (1, *a.sequences):
        run = greedy(backend, texts, n, DEPTH, 64)
        note(f"{n} sequences, us", round(median_us(run, 64), 1))
    backend.close()


def unfetched(a, note):
    """Microseconds of a step of one sequence whose experts are not fetched ahead."""
    decode_launches._ahead = lambda *_: False
    _, backend, texts, _ = opened(a, a.layers, 1)
    run = greedy(backend, texts, 1, DEPTH, 64)
    note("1 sequences, experts not fetched ahead, us", round(median_us(run, 64), 1))
    backend.close()


def timeline(a, note):
    """Where the time of some layers goes."""
    from cuda_timeline import show  # noqa: PLC0415

    gpu, backend, texts, prompt = opened(a, a.timed, max(a.sequences, default=1))
    found, out = {}, Path(a.out)
    show(gpu, "prompt of 512", prompt, 1, out, found)
    for n in (1, *a.sequences):
        show(gpu, f"{n} sequences", greedy(backend, texts, n, DEPTH, STEPS), STEPS, out, found)
    note("timelines", found)
    backend.close()


WORK = {
    "compile": compiled,
    "bits": bits,
    "rates": rates,
    "unfetched": unfetched,
    "timeline": timeline,
}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--model", default="hybrid-35b-a3b")
    p.add_argument("--few", type=int, default=4)
    p.add_argument("--timed", type=int, default=8)
    p.add_argument("--layers", type=int, default=40)
    p.add_argument("--sequences", type=lambda text: [int(n) for n in text.split(",") if n])
    p.add_argument("--baseline", default="")
    p.add_argument("--commit", default="")
    p.add_argument("--only", nargs="+", choices=WORK, default=list(WORK))
    p.add_argument("--stage", choices=WORK)
    a = p.parse_args()
    a.sequences = [2] if a.sequences is None else a.sequences
    out, begun = Path(a.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cuda_hybrid.json"

    def note(name, value):
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {name: value}, indent=1) + "\n")
        print(f"{time.perf_counter() - begun:6.1f} s  {name}: {str(value)[:120]}", flush=True)

    if a.stage:
        WORK[a.stage](a, note)
        return
    path.write_text(json.dumps(origin(a.model, a.commit)))
    well = True
    for stage in a.only:
        print(stage, flush=True)
        ended = subprocess.run([sys.executable, *sys.argv, "--stage", stage], check=False)
        well &= ended.returncode == 0
        if stage == "bits" and not well:
            break
    found = json.loads(path.read_text())
    peer = json.loads(Path(a.baseline).read_text())["llama.cpp tokens/s"] if a.baseline else {}
    print("logits differing from the CPU's:", found.get("logits differing from the CPU's"))
    print(f"{'':<12}{'tokens/s':>10}{'llama.cpp':>11}{'ratio':>7}")
    for name, us, tokens in (("tg128@0", "1 sequences", 1), ("pp512@0", "prompt of 512", 512)):
        if f"{us}, us" in found:
            rate, other = 1e6 * tokens / found[f"{us}, us"], peer.get(name, float("nan"))
            print(f"{name:<12}{rate:10.1f}{other:11.1f}{rate / other:7.2f}")
    raise SystemExit(not well)


if __name__ == "__main__":
    main()
