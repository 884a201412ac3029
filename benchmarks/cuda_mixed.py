"""Mixed passes whose prompt's tokens lie at some depth: attended to row by row, or in runs.

usage: python benchmarks/cuda_mixed.py OUT [--layers 48]

Geometry of Qwen3-30B-A3B, random weights. Both ways must give the same logits, which are those of
the same tokens without steps beside them, too. Milliseconds of a pass, the middle of several. OUT:
a folder for cuda_mixed.json; the exit code is 1 if a bit differs.
"""

import argparse
import json
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import synthetic
from kernels import asked, compile_all

from isobit.backends.base import Batch
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.fusions import step_attention
from isobit.config import EngineConfig
from isobit.numerics import KV_PAGE

STEPS_AT, DEEPEST = 128, 8000
PASSES = [(32, n, d) for n in (16, 64, 224) for d in (0, 2000, DEEPEST)]
PASSES += [(8, 504, d) for d in (0, 2000, DEEPEST)] + [(0, 64, d) for d in (0, 2000)]
"""Steps, tokens of a prompt, and positions before them."""
WAYS = {"rows": True, "runs": False}


class Texts:
    """Sequences of steps, and one of a prompt, whose keys have been written."""

    def __init__(self, backend, vocab):
        rng = np.random.default_rng(7)
        self.backend, self.tokens = backend, rng.integers(0, vocab, DEEPEST + 1024).astype(np.int32)
        self.most = -(-len(self.tokens) // KV_PAGE)
        self.pages = np.zeros((33, self.most), np.int32)
        self.pages[:32, :4] = np.arange(128).reshape(32, 4)
        self.pages[32] = 128 + np.arange(self.most)
        for s in range(33):
            self.forward(0, len(self.tokens) if s == 32 else STEPS_AT + 1, 0, s)

    def forward(self, steps, n, depth, sequence=32):
        """Logits of the first and the last row."""
        tokens = np.r_[self.tokens[:steps], self.tokens[depth : depth + n]]
        at = np.r_[np.full(steps, STEPS_AT), np.arange(depth, depth + n)].astype(np.int32)
        of = np.r_[np.arange(steps), np.full(n, steps)].astype(np.int32)
        pages = np.concatenate([self.pages[:steps], self.pages[sequence : sequence + 1]])
        rows = np.array([0, steps + n - 1], np.int32)
        return self.backend.forward(Batch(tokens, at, of, pages, rows))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--commit", default="")
    p.add_argument("--layers", type=int, default=48)
    a = p.parse_args()
    out, begin = Path(a.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    weights = synthetic.weights("30b-a3b", a.layers)
    engine = EngineConfig(context=DEEPEST + 1024, max_sequences=33, chunk=2048)
    found, logits, wrong = {"commit": a.commit, "columns": list(WAYS)}, {}, 0
    for name, by_rows in WAYS.items():
        runs = (lambda *_: None) if by_rows else step_attention._runs
        with patch.object(step_attention, "_runs", runs):
            gpu = CudaGpu()
            compile_all(asked(weights, engine, gpu), gpu.arch)
            backend = CudaBackend(weights, engine, gpu)
            found["device"] = gpu.name
            texts = Texts(backend, weights.config.vocab)
            for one in PASSES:
                times = []
                for _ in range(7):
                    start = time.perf_counter()
                    got = np.array(texts.forward(*one)).view(np.uint32)
                    times.append(1e3 * (time.perf_counter() - start))
                alone = np.array(texts.forward(0, *one[1:])).view(np.uint32)
                expected = logits.setdefault(one, got)
                different = int(np.count_nonzero(got != expected))
                different += int(np.count_nonzero(got[1] != alone[1]))
                wrong += different
                key = "{} steps + {} tokens behind {}".format(*one)
                found.setdefault(key, []).append(sorted(times)[3])
                (out / "cuda_mixed.json").write_text(json.dumps(found, indent=1) + "\n")
                seconds = time.perf_counter() - begin
                print(
                    f"{seconds:6.1f} s  {name}, {key}: {found[key][-1]:.2f} ms, {different} differ"
                )
            backend.close()
    for key, ms in found.items():
        if " steps + " in key:
            print(f"{key:<36}" + "".join(f"{t:9.2f}" for t in ms))
    print("columns:", ", ".join(WAYS), "| bits that differ:", wrong)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
