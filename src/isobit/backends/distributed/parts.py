"""A model split over processes, each the CPU backend on its part of the graph.

The caller's process runs part 0, and starts the others: ``python -m`` this module. They get each
batch through a socket, and exchange what they compute through shared memory, within the pass (see
:mod:`isobit.model.parallel.split`).
"""

import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import (
    ARGMAX,
    F32,
    HIDDEN,
    LOGITS,
    Backend,
    Batch,
    Results,
    Tap,
    Wanted,
    traced,
)
from isobit.backends.cpu import CpuBackend
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, IsobitError, UsageError
from isobit.gguf.reader import GGUFFile
from isobit.model.checkpoint import open_model
from isobit.model.parallel.cuts import Part
from isobit.model.parallel.split import check, split
from isobit.model.weights import Weights

_MODULE = "isobit.backends.distributed.parts"
_LINE = 64  # bytes; the memory's layout: engine/exchange.h
_PIECES = 16 << 20  # bytes of a part's piece; longer values are exchanged in several


class PartsBackend(Backend):
    """The CPU backend, split over ``engine.parts`` processes. The bits are those of one."""

    name = "cpu"
    on_host = yardstick = reads_file = True

    def __init__(self, weights: Weights, engine: EngineConfig) -> None:
        super().__init__(weights, engine)
        engine = self.engine  # all parts settle for the same
        if weights.file is None:
            raise UsageError("parts: expected a model from a file, got one made in memory")
        check(weights.graph, engine.parts, engine.expert_shares)  # before processes start
        self._parts = engine.parts
        memory = tempfile.TemporaryFile(dir=_shared_folder())  # noqa: SIM115 (held while it runs)
        size = (self._parts + 1) * _LINE + 2 * self._parts * _PIECES
        memory.truncate(size)
        self._memory = memory
        self._shared: NDArray[np.uint8] = np.frombuffer(mmap.mmap(memory.fileno(), size), np.uint8)
        self._others: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._started: list[CpuBackend] = []
        try:
            for rank in range(1, self._parts):
                self._start(rank, weights.file, engine)
            self._part = _part(weights, 0, engine)
            self._names = frozenset(weights.graph.names) - weights.graph.on_request
            self._here = _backend(self._part, weights, engine, (self._shared, 0))
            self._started.append(self._here)
            for rank, (_, connection) in enumerate(self._others, 1):
                said = connection.recv()
                if said is not None:
                    raise BackendUnavailable(f"part {rank} of {self._parts}: {said}")
        except EOFError:
            self.close()
            raise BackendUnavailable(f"cpu: a part of {self._parts} did not start") from None
        except BaseException:
            self.close()
            raise

    @property
    def device(self) -> str:
        """Processor, SIMD level, threads of a part, and parts."""
        return f"{self._here.device} in each of {self._parts} processes"

    def compute_logits(self, batch: Batch, tap: Tap | None, stages: frozenset[str] | None) -> F32:
        """See :class:`isobit.backends.base.Backend`."""
        logits = self.compute(batch, LOGITS, tap, stages).logits
        assert logits is not None
        return logits

    def compute(
        self, batch: Batch, wanted: Wanted, tap: Tap | None, stages: frozenset[str] | None
    ) -> Results:
        """What is wanted, of which this process has all once the parts have exchanged theirs."""
        named = None
        if tap is not None:
            named = self._names if stages is None else stages
            named |= self._part.beside(named)
        wanted = replace(wanted, routes=False)  # the caller takes these from their stages
        of_others = HIDDEN if wanted.only_hidden else ARGMAX
        with suppress(OSError):  # it has ended; the pass will say so
            for _, connection in self._others:
                connection.send((batch, of_others, named))
        if tap is None:
            return self._here.run(batch, wanted)
        results, shown = traced(self._here, batch, wanted, named)
        every = [shown, *(connection.recv() for _, connection in self._others)]
        for (name, layer), piece in shown.items():
            pieces = [piece, *(other[name, layer] for other in every[1:])]
            if stages is None or name in stages:
                tap(name, layer, self._part.merged((name, layer), pieces, shown))
        return results

    def close(self) -> None:
        """End the other processes and free the memory."""
        for _, connection in self._others:
            connection.close()
        for process, _ in self._others:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        self._others = []
        for backend in self._started:
            backend.close()
        self._memory.close()

    def _start(self, rank: int, file: GGUFFile, engine: EngineConfig) -> None:
        ours, theirs = socket.socketpair()
        files = theirs.fileno(), self._memory.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, *map(str, files)],
            pass_fds=files,
        )
        theirs.close()
        connection = Connection(ours.detach())
        self._others.append((process, connection))
        connection.send((str(file.path), file.states, engine, rank))
        threading.Thread(target=self._watch, args=(process,), daemon=True).start()

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        """A part that ends stops the pass of the others."""
        process.wait()
        self._shared[self._parts * _LINE] = 1


def _part(weights: Weights, rank: int, engine: EngineConfig) -> Part:
    assert weights.file is not None
    source, shares = str(weights.file.path), (engine.expert_shares, engine.shares)
    return split(weights.graph, rank, engine.parts, source, *shares)


def _backend(
    part: Part, weights: Weights, engine: EngineConfig, place: tuple[NDArray[np.uint8], int]
) -> CpuBackend:
    engine = replace(engine, threads=max(1, engine.cores // engine.parts))
    exchange = (*place, engine.parts)
    return CpuBackend(Weights(weights.config, part.graph), engine, exchange=exchange)


def _shared_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> None:
    """One of the other parts: batches from a socket until it is closed."""
    import signal  # noqa: PLC0415

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides when to end
    with suppress(EOFError, ConnectionError):  # the caller has ended
        _answer(Connection(int(sys.argv[1])))


def _answer(connection: Connection) -> None:
    path, states, engine, rank = connection.recv()
    memory = mmap.mmap(int(sys.argv[2]), os.fstat(int(sys.argv[2])).st_size)
    try:
        file = open_model(Path(path))
        if file.states != states:
            connection.send(f"{path}: another file than the first part has opened; load it again")
            return
        weights = Weights.from_file(file)
        part = _part(weights, rank, engine)
        backend = _backend(part, weights, engine, (np.frombuffer(memory, np.uint8), rank))
    except IsobitError as error:
        connection.send(str(error))
        return
    connection.send(None)
    with suppress(EOFError, OSError, BackendUnavailable):
        while True:
            batch, wanted, stages = connection.recv()
            if stages is None:
                backend.run(batch, wanted)
            else:
                connection.send(traced(backend, batch, wanted, stages)[1])


if __name__ == "__main__":
    main()
