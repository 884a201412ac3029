"""What the CUDA tests share: an emulated or a real device, and buffers between sentinels."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from isobit.backends.base import Batch
from isobit.backends.cuda import CudaBackend, UnfusedCudaBackend, available
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import Lowering
from isobit.backends.cuda.ops import rms_norm, top_k
from isobit.backends.cuda.ops.matmul import one
from isobit.backends.cuda.steps.programs import CaptureSizes
from tests.helpers.seed import SEED

from .cuda_emulator import EmulatedGpu

F32 = np.float32


def open_gpu(kind):
    """A device of that kind, "emulated" or "cuda"; skips the test where there is none."""
    if kind == "emulated":
        if shutil.which("g++") is None:
            pytest.skip("not run: no g++ to build the emulator with")
        return EmulatedGpu(SEED)
    usable, reason = available()
    if not usable:
        pytest.skip(f"not run: {reason}")
    return CudaGpu()


def sized(few=(), padded=()):
    """A backend that captures steps of these sizes, besides those of one sequence."""
    return type("Sized", (CudaBackend,), {"sizes": CaptureSizes(few, padded)})


def open_cuda(kind, weights, engine, *, fused=True):
    """On a device as it is by default; emulated, where padding costs much, of exact sizes."""
    fit = sized() if kind == "emulated" else CudaBackend
    return (fit if fused else UnfusedCudaBackend)(weights, engine, open_gpu(kind))


def ragged(rng, vocab, parts, pages):
    """A batch of (first position, tokens) for each sequence; the last token's logits of each."""
    lengths = [n for _, n in parts]
    return Batch(
        tokens=rng.integers(0, vocab, sum(lengths)).astype(np.int32),
        positions=np.concatenate([np.arange(p, p + n) for p, n in parts]).astype(np.int32),
        sequence=np.repeat(np.arange(len(parts)), lengths).astype(np.int32),
        pages=pages,
        logit_rows=(np.cumsum(lengths) - 1).astype(np.int32),
    )


class Buffers:
    """Device arrays with sentinels before and after; ``check`` finds stray writes."""

    GUARD = 4096

    def __init__(self, gpu):
        self.gpu = gpu
        self.guards = []

    def put(self, values):
        address = self.new(values.nbytes)
        self.gpu.upload(address, values)
        return address

    def new(self, nbytes):
        fill = np.full(nbytes + 2 * self.GUARD, 0x5B, np.uint8)
        address = self.gpu.allocate(fill.nbytes)
        self.gpu.upload(address, fill)
        self.guards.append((address, nbytes))
        return address + self.GUARD

    def get(self, address, shape, dtype=F32):
        out = np.empty(shape, dtype)
        self.gpu.download(address, out)
        self.check()
        return out

    def check(self):
        for address, nbytes in self.guards:
            for start in (address, address + self.GUARD + nbytes):
                guard = np.empty(self.GUARD, np.uint8)
                self.gpu.download(start, guard)
                assert (guard == 0x5B).all(), "a kernel wrote outside its output"


def same(a, b):
    assert a.shape == b.shape
    assert np.array_equal(a.view(np.uint32), np.ascontiguousarray(b).view(np.uint32)), (
        f"{(a.view(np.uint32) != b.view(np.uint32)).sum()} of {a.size} values differ"
    )


class Alone:
    """Single launches of kernels, as operations make them; buffers are addresses."""

    def __init__(self, gpu, planes):
        self.gpu, self.planes, self.captured = gpu, planes, False

    def launch(self, *arguments, **more):
        Lowering.launch(self, *arguments, **more)

    def quantise(self, x, n, rows, acts):
        blocks = -(-rows * supers(n) // 8)
        self.launch("ops/quantise", (blocks,), (x, n, n, 1, n, rows, acts, 0, 0))

    def product(self, acts, x=0, routing=None):
        return SimpleNamespace(
            g=self,
            stack=routing is not None,
            routing=routing or (0, 0, 1),
            input=lambda w: x if w.layout.kind == "floats" else acts,
        )

    def matmul(self, w, x, acts, y, pairs, *, routing=None, row_stride=None):
        one(self.product(acts, x, routing), w, y, pairs, row_stride or w.rows)

    def norm(self, x, norm, eps, n, rows, y, acts, added=(0, 0), weights=0):
        address, count = added
        defines = rms_norm.defines(n, count, weighted=bool(weights))
        arguments = (x, address, weights, 0, 0, 0, norm, eps, y, acts, 0, 0, 0)
        self.launch("ops/norm_quantise", (rows,), arguments, defines)

    def sort_pairs(self, ids, tokens, k, experts, order, offset, groups=(0, 0), columns=8, first=0):
        arguments = (ids, tokens, k, first, experts, order, offset, *groups, columns)
        blocks, words = top_k.sorting(tokens, experts)
        self.launch("ops/top_k.sort_pairs", (blocks,), arguments, {"PARTS": 1}, shared=4 * words)
