"""isobit's command line on a GPU that computes nothing and takes the time that an H200 takes.

usage: python benchmarks/simulated.py MODEL.gguf              writes a small model for it
       python benchmarks/simulated.py serve MODEL.gguf --backend cuda …
       python benchmarks/server_gpu.py MODEL.gguf OUT --simulated …

All of the engine, the server and the CUDA backend's Python runs; every token is the same. So what
the host takes can be seen, and profiled, without a device. Passes take what those of Qwen3-30B-A3B
took on an H200, by their padded size.
"""

import contextlib
import sys
import time
from pathlib import Path

import numpy as np

from isobit.backends.cuda import backend
from isobit.backends.cuda.steps import passes
from isobit.backends.cuda.workspace import Pass

ROWS = 1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 2048
MS = 1.4, 2.1, 3.2, 2.8, 3.9, 5.1, 6.3, 7.3, 8.2, 9.0, 11.0, 13.3, 15.4, 19.2, 25.8, 31.8, 108.0
HEAD_MS, LAYERS, TOKEN = 0.1, 48, 1000  # of logits apart from steps


class SimulatedGpu:
    """The Gpu protocol; a queue of work, each with its time."""

    name, multiprocessors, may_wait, alone = "simulated GPU", 132, True, True
    shared_most, cache_bytes, warpgroups = 227 << 10, 50 << 20, True

    def __init__(self, _=0):
        self._next, self._done, self._queues = 1 << 20, 0.0, True

    def spend(self, ms):
        self._done = max(self._done, time.perf_counter()) + 1e-3 * ms

    def activate(self):
        pass

    @contextlib.contextmanager
    def rehearsal(self):
        queues, self._queues = self._queues, False
        yield
        self._queues = queues

    def compile(self, queue, _):
        with self.rehearsal():
            queue()
        return 0

    def memory(self):
        return 140 << 30, 140 << 30

    def allocate(self, nbytes):
        self._next += nbytes + 256 & ~255
        return self._next

    def free(self, address):
        pass

    def bring(self, _):
        return lambda: None

    def page_locked(self, nbytes):
        return np.empty(nbytes, np.uint8)

    free_page_locked = free

    def results(self, count):
        return np.zeros(count, np.float32)

    def _call(self, *_, **__):
        time.sleep(0)  # as a driver's call, it gives other threads their turn

    upload = copy = _call

    def launch(self, stem, _kernel, _grid, arguments, **_):
        """The model has one layer, of those that it stands for."""
        names = ("logprobs", "draw", "digest", "take_tokens")
        once = stem in {f"sampling/{name}" for name in names}
        for _ in range(LAYERS if self._queues and not once else 0):
            [int(a) for a in arguments]
            self._call()

    def fetch(self, _, out):
        out.view(np.int32)[...] = TOKEN

    def download(self, address, out):
        self.fetch(address, out)
        self.synchronise()

    def mark(self):
        return self._done

    def wait(self, mark):
        if (left := mark - time.perf_counter()) > 0:
            time.sleep(left)

    def synchronise(self):
        if (left := self._done - time.perf_counter()) > 0:
            time.sleep(left)

    def capture(self, queue):
        with self.rehearsal():
            queue()
        p = next(each for each in reversed(queue.args) if isinstance(each, Pass))
        head = getattr(queue.args[0], "__name__", "") == "head"
        return HEAD_MS if head else float(np.interp(p.tokens, ROWS, MS))

    def replay(self, graph):
        self._call()
        self.spend(graph)

    def close(self):
        pass


def install():
    """From here on the CUDA backend runs on it."""
    backend.CudaGpu = SimulatedGpu  # type: ignore[attr-defined]
    queue = passes.Passes._queue

    def queued(self, what, p):
        before = self._g.gpu._done
        queue(self, what, p)
        if self._g.gpu._done == before:  # launched one by one
            body = what.__name__ == "body"
            self._g.gpu.spend(float(np.interp(p.tokens, ROWS, MS)) if body else HEAD_MS)

    passes.Passes._queue = queued


def write(path):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.helpers.synth import Geometry, write_model  # noqa: PLC0415

    shape = Geometry(layers=1, experts=128, experts_used=8, context=4096)
    vocabulary = Path(__file__).parents[1] / "tests" / "data" / "qwen2-vocab.gguf"
    write_model(Path(path), shape, vocabulary=vocabulary)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        write(sys.argv[1])
    else:
        from isobit.__main__ import main

        install()
        raise SystemExit(main())
