"""A model split over parts gives the whole model's bits, wherever it is cut."""

import threading

import numpy as np
import pytest

from isobit.backends.base import Batch
from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.model.split import split
from isobit.model.weights import Weights


class Meeting:
    """Threads that give their part of a value and get every part's."""

    def __init__(self, parts: int) -> None:
        self.barrier = threading.Barrier(parts)
        self.given: list[np.ndarray] = [np.empty(0)] * parts

    def exchange(self, rank: int):
        def give(x: np.ndarray) -> list[np.ndarray]:
            self.given[rank] = x
            self.barrier.wait(60)
            every = list(self.given)
            self.barrier.wait(60)
            return every

        return give


def passes(backends: list, vocab: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Two sequences prefilled together, then decoded together, on every part: each part's logits."""
    ids = rng.integers(0, vocab, 24).astype(np.int32)
    pages = np.array([[0], [1]], np.int32)

    def batch(tokens, positions, sequence):
        arrays = [np.array(x, np.int32) for x in (tokens, positions, sequence)]
        rows = np.arange(len(tokens), dtype=np.int32)
        return Batch(*arrays, pages, rows, np.array([0, 1], np.int32))

    batches = [
        batch(ids[:20], [*range(13), *range(7)], [0] * 13 + [1] * 7),
        batch(ids[20:22], [13, 7], [0, 1]),
        batch(ids[22:], [14, 8], [0, 1]),
    ]
    out: list = [None] * len(backends)

    def run(rank: int) -> None:
        out[rank] = np.concatenate([backends[rank].forward(b) for b in batches])

    threads = [threading.Thread(target=run, args=(r,)) for r in range(len(backends))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(300)
    return out
