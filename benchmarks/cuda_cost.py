"""What exactness costs: the CUDA backend as it is, and compiled for speed at any rounding.

usage: python benchmarks/cuda_cost.py MODEL.gguf OUT.json [--commit HASH]

Free: fused multiply-add, approximate division and square root, subnormals flushed to zero. The
order of sums stays: it is the kernels' own. Both run in turns; medians of ratios are what counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from batches import origin

import isobit.backends.cuda.device.gpu as gpu_module
from isobit.backends.base import Batch
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device import compile
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights

N, CONTEXT, ROUNDS = 32, 4608, 7


def free(stem, arch, defines):
    asked = compile._options
    flags = {"--ftz=false": "--ftz=true", "--prec-sqrt=true": "--prec-sqrt=false"}
    flags |= {"--prec-div=true": "--prec-div=false", "--fmad=false": "--fmad=true"}
    try:
        compile._options = lambda *a: [flags.get(o, o) for o in asked(*a)]  # type: ignore[assignment]
        return compile._compile(stem, arch, defines)
    finally:
        compile._options = asked


class Subject:
    def __init__(self, weights, cubin):
        gpu_module.cubin = cubin  # type: ignore[attr-defined]
        one = EngineConfig(context=CONTEXT, max_sequences=1, chunk=2048)
        many = EngineConfig(context=256, max_sequences=N, chunk=512)
        self.one, self.many = CudaBackend(weights, one), CudaBackend(weights, many)
        self.tokens = np.arange(4096, dtype=np.int32)
        self.pages = np.arange(CONTEXT // 64, dtype=np.int32)[None]
        self.tables = np.arange(4 * N, dtype=np.int32).reshape(N, 4)
        self.prefill()

    def prefill(self):
        for i in range(0, 4096, 2048):
            at = np.arange(i, i + 2048, dtype=np.int32)
            rows = np.array([2047] if i else [], np.int32)
            self.one.forward(Batch(self.tokens[i : i + 2048], at, 0 * at, self.pages, rows))

    def decode(self, depth=0):
        self.one.greedy(np.ones(1, np.int32), np.full(1, depth, np.int32), self.pages, 128)

    def deep(self):
        self.decode(4096)

    def together(self):
        self.many.greedy(self.tokens[:N], np.zeros(N, np.int32), self.tables, 128)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--commit", default="")
    a = p.parse_args()
    weights = Weights.from_file(GGUFFile.open(a.model))
    subjects = Subject(weights, compile.cubin), Subject(weights, free)
    found = origin(a.model, a.commit) | {"device": subjects[0].one.device}
    for test in ("decode", "deep", "together", "prefill"):
        ratios, seconds = [], []
        for _ in range(ROUNDS + 1):
            pair = []
            for subject in subjects:
                start = time.perf_counter()
                getattr(subject, test)()
                pair.append(time.perf_counter() - start)
            seconds.append(pair)
            ratios.append(pair[0] / pair[1])
        exact, loose = (statistics.median(s[i] for s in seconds[1:]) for i in (0, 1))
        cost = statistics.median(ratios[1:]) - 1
        found[test] = {"exact s": exact, "free s": loose, "cost": cost}
        print(f"{test:<10} exact {1e3 * exact:8.2f} ms, free {1e3 * loose:8.2f} ms: {cost:+.2%}")
    Path(a.out).write_text(json.dumps(found, indent=1) + "\n")


main()
