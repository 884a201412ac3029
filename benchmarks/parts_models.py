"""What the stages of cuda_parts.py share: models, devices, texts, and notes of what they find."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import synthetic
from batches import batch
from cuda.bindings import driver

from isobit.backends.base import Batch
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.parts import CudaPartsBackend
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights

FEW, TIMED = 4, 8  # layers
DEPTH, STEPS = 128, 32


def opened(name, layers):
    """A model's weights."""
    if name in synthetic.MODELS:
        return synthetic.weights(name, layers)
    return Weights.from_file(GGUFFile.open(Path(name)))


def gpu_count():
    """How many there are."""
    driver.cuInit(0)
    return driver.cuDeviceGetCount()[1]


def devices(parts):
    """A device for each part; the first for all, if there are not as many."""
    driver.cuInit(0)
    found = driver.cuDeviceGetCount()[1]
    return [CudaGpu(r if found >= parts else 0) for r in range(parts)]


def in_parts(a, weights, engine, gpus=None):
    """A model over all devices, as the command says."""
    several = replace(engine, parts=a.parts, expert_shares=a.expert_shares)
    return CudaPartsBackend(weights, several, gpus or devices(a.parts))


class Notes:
    """What a stage found, kept in a file as it comes."""

    def __init__(self, a):
        self._path, self._start = Path(a.out) / f"{a.stage}.json", time.perf_counter()
        self.found = {}

    def __call__(self, key, value):
        self.found[key] = value
        self.found["seconds"] = round(time.perf_counter() - self._start, 1)
        self._path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"  {self.found['seconds']:6.1f} s  {key}: {str(value)[:160]}", flush=True)


class Texts:
    """Sequences of random tokens, each with pages of its own."""

    def __init__(self, rng, vocab, sequences, pages):
        self.rng, self.vocab = rng, vocab
        self.pages = np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages)
        self.ends = np.zeros(sequences, np.int32)

    def prompt(self, s, n, rows=1):
        """Tokens of one sequence, and logits of the last."""
        start, self.ends[s] = int(self.ends[s]), self.ends[s] + n
        return batch(self._ids(n), start, self.pages[s : s + 1], range(n - rows, n))

    def step(self):
        """A token of every sequence."""
        at, each = self.ends.copy(), np.arange(len(self.ends), dtype=np.int32)
        self.ends += 1
        return Batch(self._ids(len(at)), at, each, self.pages, each)

    def _ids(self, n):
        return self.rng.integers(0, self.vocab, n).astype(np.int32)


def differ(a, b):
    """Logits of other bits."""
    return int(np.count_nonzero(a.view(np.uint32) != b.view(np.uint32)))
