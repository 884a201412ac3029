"""A model on several GPUs beside one: the CPU's bits first, then how fast each is.

usage: python benchmarks/cuda_parts.py OUT.json MODEL.gguf [MODEL.gguf ...] [--parts 2]

Each model is checked with planes 2 and 1: four prompts and then steps of each, in batches of 1, 8
and 32 sequences, every logit against the CPU backend's. The last model is then timed on one device
and on all, in turns. No figure stands unless no logit differs.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from batches import batch

from isobit.backends.base import Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.parts import CudaPartsBackend
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights

STEPS = 64


def steps_of(tokens, position, table):
    """A step of each sequence."""
    n = len(tokens)
    each = np.arange(n, dtype=np.int32)
    return Batch(tokens, np.full(n, position, np.int32), each, table, each)


def run(backend, vocab, prompts, count):
    """Logits of prompts of some tokens, each then stepped ``count`` times together."""
    rng = np.random.default_rng(11)
    n = len(prompts)
    table = np.arange(4 * n, dtype=np.int32).reshape(n, 4)
    out = []
    for i, length in enumerate(prompts):
        ids = rng.integers(0, vocab, length).astype(np.int32)
        rows = [length - 1]
        out.append(backend.forward(batch(ids, 0, table[i : i + 1], rows)))
    for step in range(count):
        ids = rng.integers(0, vocab, n).astype(np.int32)
        out.append(np.array(backend.forward(steps_of(ids, max(prompts) + step, table))))
    return np.concatenate(out)


def checks(path, parts, planes):
    """How many logits of each kind of batch differ from the CPU's."""
    weights = Weights.from_file(GGUFFile.open(path))
    vocab, found = weights.config.vocab, {}
    engine = EngineConfig(planes, context=256, max_sequences=32, parts=parts)
    split = CudaPartsBackend(weights, engine)
    cpu = CpuBackend(weights, EngineConfig(planes, context=256, max_sequences=32))
    for n, count in ((1, STEPS), (4, STEPS), (8, 4), (32, 2)):
        prompts = [40] * n
        mine, theirs = (run(b, vocab, prompts, count) for b in (split, cpu))
        differ = np.count_nonzero(mine.view(np.uint32) != theirs.view(np.uint32))
        found[f"{n} sequences"] = f"{differ} of {mine.size} differ"
    found["device"], found["plan GB"] = split.device, split.plan.total / 1e9
    split.close()
    cpu.close()
    return found


def rates(backend, vocab):
    """Tokens a second."""
    tokens = np.random.default_rng(5).integers(0, vocab, 2048).astype(np.int32)
    pages = np.arange(40, dtype=np.int32)[None]
    out = {}

    def best(name, count, work, repeats=5):
        work()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        out[name] = count / float(np.median(seconds))

    for n in (1, 8, 32):
        table = np.arange(4 * n, dtype=np.int32).reshape(n, 4)
        for i in range(n):
            backend.forward(batch(tokens[:128], 0, table[i : i + 1]))
        at = np.full(n, 128, np.int32)
        best(
            f"{n} sequences",
            n * 32,
            lambda t=table, a=at, n=n: backend.greedy(tokens[:n], a, t, 32),
        )
    for n in (512, 2048):
        best(f"prefill {n}", n, lambda n=n: backend.forward(batch(tokens[:n], 0, pages, [n - 1])))
    return out


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("models", nargs="+")
    p.add_argument("--parts", type=int, default=2)
    a = p.parse_args()
    found = {"checks": {}, "rates": {}}

    def save():
        Path(a.out).write_text(json.dumps(found, indent=1) + "\n")

    for path in a.models:
        for planes in (2, 1):
            start = time.perf_counter()
            name = f"{Path(path).name}, planes {planes}"
            found["checks"][name] = checks(path, a.parts, planes)
            print(name, found["checks"][name], f"{time.perf_counter() - start:.0f} s", flush=True)
            save()
    weights = Weights.from_file(GGUFFile.open(a.models[-1]))
    engine = EngineConfig(context=2560, max_sequences=32, chunk=2048)
    for name, make in (
        ("1", lambda: CudaBackend(weights, engine)),
        (
            str(a.parts),
            lambda: CudaPartsBackend(weights, EngineConfig(**vars(engine) | {"parts": a.parts})),
        ),
    ):
        backend = make()
        found["rates"][name] = rates(backend, weights.config.vocab)
        print(name, found["rates"][name], flush=True)
        save()
        backend.close()
    one, many = found["rates"]["1"], found["rates"][str(a.parts)]
    for key in one:
        print(f"{key:<16} {one[key]:10.1f} {many[key]:10.1f}  x {many[key] / one[key]:.3f}")
    kinds = (v for c in found["checks"].values() for k, v in c.items() if k.endswith("sequences"))
    raise SystemExit(any(not v.startswith("0 of") for v in kinds))


if __name__ == "__main__":
    main()
