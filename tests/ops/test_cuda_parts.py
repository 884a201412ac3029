"""A model split over emulated GPUs, each a process, that write to one another's memory."""

import ctypes
import mmap
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from isobit.backends.base import Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend, UnfusedCudaBackend
from isobit.backends.cuda.parts import inboxes, tell
from isobit.config import EngineConfig
from isobit.model.checkpoint import open_model
from isobit.model.split import split
from isobit.model.weights import Weights
from tests.helpers.synth import Geometry, write_model

from .cuda_emulator import EmulatedGpu
from .cuda_support import ragged

ENGINE = EngineConfig(context=128, max_sequences=2, chunk=16)
ROOM = 256 << 20


class SharedGpu(EmulatedGpu):
    """An emulated GPU in memory that other processes have at the same address."""

    def __init__(self, address: int, size: int, seed: int) -> None:
        super().__init__(seed)
        self._next, self._end = address, address + size

    def allocate(self, nbytes: int) -> int:
        address = self._next
        self._next += -(-max(nbytes, 1) // 256) * 256
        assert self._next <= self._end
        ctypes.memset(address, 0xA5, nbytes)
        return address

    def free(self, address: int) -> None:
        pass

    def reach(self, others: list) -> None:
        pass

    def close(self) -> None:
        pass


def batches(rng: np.random.Generator, vocab: int) -> list[Batch]:
    """A prompt of each of two sequences in several passes, a step of both, steps of one."""
    pages = np.array([[1, 0], [2, 3]], np.int32)
    alone = pages[1:]
    return [
        ragged(rng, vocab, [(0, 21), (0, 9)], pages),
        ragged(rng, vocab, [(21, 1), (9, 1)], pages),
        ragged(rng, vocab, [(22, 1), (10, 1)], pages),
        ragged(rng, vocab, [(11, 1)], alone),
        ragged(rng, vocab, [(12, 1)], alone),
    ]


def work(
    place: tuple[int, int], path: Path, rank: int, parts: int, asked: tuple, pipe: Connection
) -> None:
    seed, fused = asked
    w = Weights.from_file(open_model(path))
    gpu = SharedGpu(place[0] + rank * ROOM, ROOM, seed + rank)
    mine = Weights(w.config, split(w.graph, rank, parts).graph)
    backend = (CudaBackend if fused else UnfusedCudaBackend)(mine, ENGINE, gpu)
    pipe.send(inboxes(backend))
    tell(backend, gpu, pipe.recv())
    rng = np.random.default_rng(seed)
    for batch in batches(rng, w.config.vocab):
        pipe.send(backend.forward(batch))
    pipe.send(
        backend.greedy(
            np.array([5], np.int32), np.array([13], np.int32), np.array([[2, 3]], np.int32), 3
        )
    )
    pipe.recv()  # nobody goes before all are done


@pytest.mark.parametrize(("parts", "fused"), [(2, True), (2, False), (3, True)])
def test_bits_of_one(parts: int, fused: bool, tmp_path: Path) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    geometry = Geometry(layers=2, heads=4, kv_heads=2, head_dim=64, experts=4, context=128)
    path = write_model(tmp_path / "m.gguf", geometry, seed=seed)
    memory = mmap.mmap(-1, parts * ROOM)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory)), parts * ROOM
    fork = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(parts):
        ours, theirs = fork.Pipe()
        args = (place, path, rank, parts, (seed, fused), theirs)
        processes.append(fork.Process(target=work, args=args, daemon=True))
        pipes.append(ours)
        processes[-1].start()
    every = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(every)
    w = Weights.from_file(open_model(path))
    whole = CpuBackend(w, ENGINE)
    for batch in batches(np.random.default_rng(seed), w.config.vocab):
        expected = whole.forward(batch).view(np.uint32)
        for pipe in pipes:
            assert np.array_equal(pipe.recv().view(np.uint32), expected)
    tokens = np.array([5], np.int32), np.array([13], np.int32), np.array([[2, 3]], np.int32)
    expected = whole.greedy(*tokens, 3)
    for pipe in pipes:
        assert np.array_equal(pipe.recv(), expected)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join(30)
        assert process.exitcode == 0
