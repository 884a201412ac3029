"""What the wgpu tests share: one device, and buffers with sentinels."""

import functools

import numpy as np

from isobit.backends.wgpu import available
from isobit.backends.wgpu.device.gpu import Device, adapters
from tests.helpers.expected import not_run


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
