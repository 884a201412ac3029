"""The kernels that a model asks for on a GPU, compiled by all cores before anything runs."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from math import inf
from multiprocessing import get_context

from isobit.backends.base import Limits
from isobit.backends.base.kv_pages import Headroom, fit_kv_cache
from isobit.backends.cuda.device.compile import cubin
from isobit.backends.cuda.steps.programs import Programs
from isobit.backends.cuda.workspace import PASS, Inputs, Pass


class Listener:
    """A device that runs nothing: which kernels would be launched."""

    def __init__(self, gpu):
        self.multiprocessors, self.shared_most = gpu.multiprocessors, gpu.shared_most
        self.cache_bytes, self.memory, self.asked = gpu.cache_bytes, gpu.memory, set()
        self.alone = True

    def launch(self, stem, *_, defines=None, **__):
        self.asked.add((stem, tuple(sorted((defines or {}).items()))))


def asked(weights, engine, gpu):
    """Kernels of prompts, of steps and of mixed batches of all sizes: (file, definitions)."""
    listener = Listener(gpu)
    engine, _ = fit_kv_cache(weights, engine, lambda _: Headroom(inf, 1))
    programs = Programs(weights, engine, listener)
    programs.plan(Limits.of(weights, engine))
    many, mixed = programs.many, programs.mixed
    for n in (many.sizes or range(2, many.most + 1)) if many else ():
        many._queue(many._pass(n))
    for n, rows in programs.rows.items():
        for deep in (False, True):
            rows._queue(rows._pass(n, many=deep))
    for n in mixed.sizes if mixed else ():
        for _ in mixed._program.body(mixed._pass(n)):
            pass
    for n in mixed.heads if mixed else ():
        for _ in mixed._program.head(replace(mixed._pass(n), count=n)):
            pass
    for deep in (False, True):
        programs.one._queue(programs.one._pass(many=deep))
    made = next(made for made, _ in programs._programs if made.g.kind == PASS)
    for n, spans in ((1, 0), (40, 0), (40, 1), (engine.chunk, 0), (engine.chunk, 1)):
        for count in (1, 64):
            p = Pass(n, 1, Inputs(*[0] * 7), count=count, spans=dict.fromkeys(made.g.spans, spans))
            made.queue(p)
    names = ("logprobs", "draw", "digest", "take_tokens")
    return listener.asked | {(f"sampling/{name}", ()) for name in names}


def compile_all(kernels, arch):
    """Compile kernels; bytes of machine code. NVRTC's threads wait for one another: processes."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return sum(pool.map(partial(_size, arch), sorted(kernels)))


def _size(arch, kernel):
    return len(cubin(kernel[0], arch, dict(kernel[1])))
