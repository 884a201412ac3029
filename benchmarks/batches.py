"""What the benchmarks of the GPU backends run, and what they say of where they ran."""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from math import inf
from pathlib import Path

import numpy as np

from isobit.backends.base import Batch, Limits
from isobit.backends.cuda.device import compile as compiler
from isobit.backends.cuda.programs import Programs
from isobit.backends.cuda.slots import PASS, Inputs, Pass
from isobit.backends.pool import Room, fitted
from isobit.contracts import evidence


def origin(model, commit):
    """What a result file begins with."""
    return {
        "model": Path(model).name,
        "commit": commit,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": platform.platform(),
        "driver": evidence.driver("cuda"),
    }


def batch(tokens, start, pages, rows=()):
    """Tokens of one sequence from position ``start`` on, with the logits of ``rows``."""
    n = len(tokens)
    return Batch(
        np.array(tokens, np.int32),
        np.arange(start, start + n, dtype=np.int32),
        np.zeros(n, np.int32),
        pages,
        np.array(rows, np.int32),
    )


class Listener:
    """A device that runs nothing: which kernels would be launched."""

    def __init__(self, gpu):
        self.multiprocessors, self.shared_most = gpu.multiprocessors, gpu.shared_most
        self.cache_bytes, self.asked = gpu.cache_bytes, set()

    def launch(self, stem, *_, defines=None, **__):
        self.asked.add((stem, tuple(sorted((defines or {}).items()))))

    def upload(self, *_):
        pass

    def capture(self, queue):
        queue()


def compile_ahead(weights, engine, gpu):
    """Compile what prompts and steps of one sequence launch, by all cores; how many kernels."""
    listener = Listener(gpu)
    engine, _ = fitted(weights, engine, lambda _: Room(inf, 1))
    programs = Programs(weights, engine, Limits.of(weights, engine), listener)
    for many in (False, True):
        programs.one._queue(programs.one._pass(many=many))
    made = next(made for made, _ in programs._programs if made.g.kind == PASS)
    for n, length in ((1, 0), (40, 1), (600, 1)):
        spans = dict.fromkeys(made.g.spans, length)
        made.queue(Pass(n, 1, Inputs(*[0] * 7), count=1, spans=spans))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda k: compiler.cubin(k[0], gpu.arch, dict(k[1])), listener.asked))
    return len(listener.asked)
