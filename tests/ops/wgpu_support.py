"""What the wgpu tests share: one device, buffers with sentinels, activations packed by the host."""

import functools
from dataclasses import replace

import numpy as np

from isobit import numerics
from isobit.backends.base import Batch
from isobit.backends.reference import ReferenceBackend
from isobit.backends.wgpu import WgpuBackend, available
from isobit.backends.wgpu.device import Device, adapters
from isobit.backends.wgpu.lowering import ACT_WORDS
from isobit.config import EngineConfig
from isobit.gguf.formats import FORMATS
from isobit.model.graph import Builder
from isobit.model.weights import Weights
from isobit.numerics import TILE, Weight
from isobit.numerics.ops import Embedding, SelectRows
from tests.helpers.expected import not_run
from tests.helpers.synth import QWEN3_30B_A3B

F32 = np.float32


@functools.cache
def _device():
    return Device(adapters()[0])


def open_device():
    """The first adapter's device, the same one every time; skips the test where there is none."""
    usable, reason = available()
    if not usable:
        not_run("wgpu", reason)
    return _device()


class Guards:
    """Buffers of a device, filled with 0x5B and with known bytes behind them."""

    BYTES = 4096

    def __init__(self, device):
        self._device = device
        self._made = []

    def empty(self, nbytes):
        """In the place of ``Device.empty``."""
        buffer = self._device.upload(np.full(nbytes + self.BYTES, 0x5B, np.uint8))
        self._made.append((buffer, nbytes))
        return buffer

    def check(self):
        for buffer, nbytes in self._made:
            guard = self._device.read(buffer, np.uint8, self.BYTES, nbytes)
            assert (guard == 0x5B).all(), "a kernel wrote outside its output"


class Graphs(Builder):
    """Writes a graph of what a test gives, and runs it on wgpu and as specified."""

    def __init__(self, device, planes=2, context=64, sequences=1):
        super().__init__("test")
        self._device = device
        self._engine = EngineConfig(
            activation_planes=planes, context=context, max_sequences=sequences
        )

    def add(self, names, operation, *inputs, weights=(), on_request=False):
        """Each weight under a name of its own, as in a file."""
        named = [replace(w, name=f"{w.name} {len(self._ops)}.{i}") for i, w in enumerate(weights)]
        return super().add(names, operation, *inputs, weights=named, on_request=on_request)

    def given(self, x, name="given"):
        """Float32 [T, width] as a value: rows of an embedding, one a token."""
        w = Weight(name, FORMATS[0], x.shape, np.ascontiguousarray(x, F32).view(np.uint8).ravel())
        return self.one(name, Embedding(), self.tokens, weights=[w])

    def run(self, last, batch=None, reference=True, select=True):
        """The backend, and every stage on it and as specified. ``last``: the wanted value, of all
        tokens or not (``select``)."""
        wanted = self.one("wanted", SelectRows(), last, self.logit_rows) if select else last
        weights = Weights(QWEN3_30B_A3B, self.graph(wanted))
        tokens = min(w.shape[0] for op in self._ops if op.kind == "embedding" for w in op.weights)
        batch = batch or one_sequence(tokens)
        ours, found = WgpuBackend(weights, self._engine, self._device), ({}, {})
        theirs = ReferenceBackend(weights, self._engine)
        for backend, stages in zip((ours, theirs)[: 1 + reference], found, strict=False):

            def tap(stage, _, x, stages=stages):
                stages[stage] = np.array(x).reshape(len(x), -1)

            backend.compute_logits(batch, tap, None)  # what is wanted need not be logits
        return ours, *found

    def check(self, last, batch=None, select=True):
        """Every stage has the specification's bits; returns the backend and the stages."""
        ours, got, expected = self.run(last, batch, select=select)
        assert list(got) == list(expected), (list(got), list(expected))
        for name, x in expected.items():
            same(got[name], x)
        return ours, expected


def one_sequence(tokens):
    n = np.arange(tokens, dtype=np.int32)
    pages = np.arange(-(-tokens // TILE), dtype=np.int32)[None, ::-1].copy()
    return Batch(n, n, 0 * n, pages, n[::-2].copy())


def same(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = (np.ascontiguousarray(x).view(np.uint32) for x in (a, b))
    assert np.array_equal(a, b), f"{(a != b).sum()} of {a.size} values differ"


def packed(x, planes):
    """Rows of activations as quantise.wgsl lays them out: uint32 [T, superblocks, 148]."""
    q, d = numerics.quantise_rows(x, planes)
    tokens, supers = d.shape
    padded = np.zeros((tokens, 256 * supers), np.int32)
    padded[:, : x.shape[1]] = q
    padded = padded.reshape(tokens, supers, 256)
    out = np.zeros((tokens, supers, ACT_WORDS), np.uint32)
    for i, plane in enumerate(numerics.planes_of(padded, planes)):
        out[..., 64 * i : 64 * i + 64] = np.ascontiguousarray(plane.astype(np.int8)).view(np.uint32)
    out[..., 128:144] = (
        padded.reshape(tokens, supers, 16, 16).sum(-1, dtype=np.int32).view(np.uint32)
    )
    out[..., 144] = np.ascontiguousarray(d).view(np.uint32)
    return out


def same_acts(got, x, planes):
    """Compare what a kernel wrote with :func:`packed`; NaN scales may be any NaN."""
    expected = packed(x, planes)
    used = np.r_[0 : 64 * planes, 128:144]
    assert np.array_equal(got[..., used], expected[..., used])
    d, wanted = (np.ascontiguousarray(a[..., 144]).view(F32) for a in (got, expected))
    broken = np.isnan(wanted)
    assert np.isnan(d[broken]).all()
    same(d[~broken], wanted[~broken])
