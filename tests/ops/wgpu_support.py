"""What the wgpu tests share: one device, buffers with sentinels, activations packed by the host."""

import functools

import numpy as np

from isobit import numerics
from isobit.backends.wgpu import available
from isobit.backends.wgpu.device import Device, adapters
from isobit.backends.wgpu.memory import ACT_BYTES
from tests.helpers.expected import not_run

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


class Buffers:
    """Device arrays with known bytes behind them; ``check`` finds stray writes."""

    GUARD = 4096

    def __init__(self, device):
        self.device = device
        self.guards = []

    def put(self, values):
        return self.device.upload(np.ascontiguousarray(values))

    def new(self, *shape):
        """A buffer of 32-bit words, every byte 0x5B."""
        nbytes = 4 * int(np.prod(shape))
        buffer = self.device.upload(np.full(nbytes + self.GUARD, 0x5B, np.uint8))
        self.guards.append((buffer, nbytes))
        return buffer

    def get(self, buffer, shape, dtype=F32, at=0):
        self.check()
        return self.device.read(buffer, dtype, int(np.prod(shape)), 4 * at).reshape(shape)

    def check(self):
        for buffer, nbytes in self.guards:
            guard = self.device.read(buffer, np.uint8, self.GUARD, nbytes)
            assert (guard == 0x5B).all(), "a kernel wrote outside its output"


def same(a, b):
    assert a.shape == b.shape
    a, b = (np.ascontiguousarray(x).view(np.uint32) for x in (a, b))
    assert np.array_equal(a, b), f"{(a != b).sum()} of {a.size} values differ"


def packed(x, planes):
    """Rows of activations as quantise.wgsl lays them out: uint32 [T, superblocks, 148]."""
    q, d = numerics.quantise_rows(x, planes)
    tokens, supers = d.shape
    padded = np.zeros((tokens, 256 * supers), np.int32)
    padded[:, : x.shape[1]] = q
    padded = padded.reshape(tokens, supers, 256)
    out = np.zeros((tokens, supers, ACT_BYTES // 4), np.uint32)
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
