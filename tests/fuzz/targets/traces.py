"""Traces: bytes damaged, and shapes, types and values that no run makes."""

import dataclasses
import functools
import os
import random

import numpy as np
from numpy.typing import NDArray

import isobit
from isobit.verify import report
from isobit.verify.compare import compare
from isobit.verify.trace import record
from isobit.verify.trace_file import Manifest, Trace
from tests.fuzz.targets.models import bases, folder

Tensors = dict[str, NDArray[np.generic]]


@functools.cache
def recorded() -> tuple[Manifest, Tensors]:
    path = folder() / "traced.gguf"
    path.write_bytes(bases()[0].bytes())
    with isobit.load(path, "cpu", threads=1) as model:
        trace = record(model, [1, 2, 3, 4])
    return trace.manifest, dict(trace._tensors)


def change(rng: random.Random, tensors: Tensors, name: str) -> None:
    x = tensors[name]
    n, size = len(x), x.size
    if not size:
        return
    match rng.randrange(8):
        case 0 | 1 | 2:
            shapes = [(n, 1, size // n), (n, size // n, 1), (size,), (1, size), (n, size // n)]
            shapes += [(2 * n, size // n // 2)] if size % (2 * n) == 0 else []
            tensors[name] = x.reshape(rng.choice(shapes))
        case 3:
            with np.errstate(all="ignore"):
                tensors[name] = x.astype(rng.choice([np.float64, np.float32, np.int32, np.int8]))
        case 4:
            odd = [0, 1, -1, 2**31 - 1] if x.dtype.kind == "i" else [np.nan, np.inf, 1e38, 0]
            tensors[name] = x = x.copy()
            with np.errstate(all="ignore"):
                x.flat[rng.randrange(size)] = np.float64(rng.choice(odd)).astype(x.dtype)
        case 5:
            tensors[name] = np.full_like(x, rng.choice([0, 1, -1, 100]))
        case 6:
            del tensors[name]
        case _:
            tensors[name] = x[: rng.randrange(n + 1)] if rng.random() < 0.3 else x[..., :1].copy()


def one(rng: random.Random) -> str:
    manifest, original = recorded()
    a, b = dict(original), dict(original)
    hot = [n for n in original if rng.random() < 0.3 or "router" in n or "lm_head" in n]
    for _ in range(rng.choice([1, 2, 3])):
        name, state = rng.choice(hot), rng.getstate()
        for tensors in (a, b) if rng.random() < 0.6 else (a,):
            rng.setstate(state)
            if name in tensors:
                change(rng, tensors, name)
    other = manifest
    if rng.random() < 0.2:
        odd = [[3], [0, 3], [], manifest.positions]
        other = dataclasses.replace(manifest, positions=rng.choice(odd))
    paths = [folder() / f"{os.getpid()}-{name}.st" for name in "ab"]
    Trace(manifest, {n: np.ascontiguousarray(x) for n, x in a.items()}).save(paths[0])
    Trace(other, {n: np.ascontiguousarray(x) for n, x in b.items()}).save(paths[1])
    if rng.random() < 0.3:
        data = bytearray(paths[0].read_bytes())
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(min(len(data), 8000))] ^= 1 << rng.randrange(8)
        paths[0].write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
    with np.errstate(all="ignore"):
        diff = compare(Trace.load(paths[0]), Trace.load(paths[1]))
        assert report.summary(diff)
    return "compared"
