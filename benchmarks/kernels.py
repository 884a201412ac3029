"""The kernels that a model asks for on a GPU, compiled by all cores before anything runs."""

from math import inf

import numpy as np

from isobit.backends.base import Limits
from isobit.backends.base.kv_pages import Headroom, fit_kv_cache
from isobit.backends.cuda.device.compile import compile_all as compiled_by_processes
from isobit.backends.cuda.device.compile import cubin
from isobit.backends.cuda.steps.programs import Programs


class Listener:
    """A device that runs nothing: which kernels would be launched."""

    def __init__(self, gpu):
        self.multiprocessors, self.shared_most = gpu.multiprocessors, gpu.shared_most
        self.cache_bytes, self.memory, self.asked = gpu.cache_bytes, gpu.memory, set()
        self.alone, self.warpgroups = True, gpu.warpgroups

    def upload(self, *_):
        pass

    def page_locked(self, nbytes):
        """Memory."""
        return np.empty(nbytes, np.uint8)

    def mark(self):
        """Nothing."""

    def launch(self, stem, *_, defines=None, **__):
        self.asked.add((stem, tuple(sorted((defines or {}).items()))))


def asked(weights, engine, gpu):
    """Kernels of prompts, of steps and of mixed batches of all sizes: (file, definitions)."""
    listener = Listener(gpu)
    engine, _ = fit_kv_cache(weights, engine, lambda _: Headroom(inf, 1))
    programs = Programs(weights, engine, listener)
    programs.plan(Limits.of(weights, engine))
    programs.rehearse(programs.captures())
    return listener.asked


def compile_all(kernels, arch):
    """Compile kernels; bytes of machine code."""
    compiled_by_processes(kernels, arch, lambda *_: None)
    return sum(len(cubin(stem, arch, dict(defines))) for stem, defines in kernels)
