"""Parts of a file brought into a GPU's memory by threads of the extension; a driver of the test."""

import ctypes
import threading

import numpy as np
import pytest

from isobit.backends.cpu._cpu import Loading

STAGING = 4096
TYPES = {"p": ctypes.c_void_p, "P": ctypes.c_size_t, "Q": ctypes.c_uint64, "I": ctypes.c_uint}
ORDER = (
    *("context", "host_alloc", "host_free", "alloc", "free", "event_create"),
    *("event_record", "event_wait", "event_destroy", "upload", "launch"),
)


class Driver:
    """Memory of the device is the host's; what is queued is done when an event is waited for."""

    def __init__(self, fails=None):
        self.fails, self.held, self.queued, self.lock = fails, {}, [], threading.Lock()
        self.events = 0
        kinds = ("P", "PPI", "P", "PP", "Q", "PI", "PP", "P", "P", "QPPP", "PIIIIIIIPPP")
        self.kept = [
            ctypes.CFUNCTYPE(ctypes.c_int, *(TYPES[k] for k in of))(self.call(name))
            for name, of in zip(ORDER, kinds, strict=True)
        ]
        self.addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in self.kept]

    def call(self, name):
        def called(*arguments):
            with self.lock:
                if name == self.fails:
                    return 2
                getattr(self, name, lambda *_: None)(*arguments)
            return 0

        return called

    def host_alloc(self, out, nbytes, _):
        memory = ctypes.create_string_buffer(nbytes)
        self.held[ctypes.addressof(memory)] = memory
        ctypes.c_size_t.from_address(out).value = ctypes.addressof(memory)

    def alloc(self, out, nbytes):
        self.host_alloc(out, nbytes, 0)

    def host_free(self, address):
        del self.held[address]

    free = host_free

    def event_create(self, out, _):
        self.events += 1
        ctypes.c_size_t.from_address(out).value = self.events

    def event_destroy(self, _):
        self.events -= 1

    def event_wait(self, _):
        for work in self.queued:
            work()
        self.queued.clear()

    def upload(self, to, source, nbytes, _):
        self.queued.append(lambda: ctypes.memmove(to, source, nbytes))

    def launch(self, _kernel, blocks, *rest):
        """repack, in short: the words of a tile's rows, chunk by chunk."""
        at = (ctypes.c_size_t * 5).from_address(rest[-2])
        kinds = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_uint64
        source, tiles, supers, super_bytes, to = (
            k.from_address(a).value for k, a in zip(kinds, at, strict=True)
        )
        assert blocks == tiles

        def work():
            nbytes = tiles * 8 * super_bytes
            raw = np.frombuffer(ctypes.string_at(source, nbytes), np.uint8)
            tiled = raw.reshape(-1, 8, supers, super_bytes).swapaxes(1, 2)
            ctypes.memmove(to, tiled.tobytes(), nbytes)

        self.queued.append(work)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_all_parts_are_there_once_waited_for(threads, rng):
    """Rows that lie together and apart, as they are and repacked; and nothing is left held."""
    driver, supers, super_bytes = Driver(), 3, 16
    source = rng.integers(0, 256, (64, 501), np.uint8)
    rows = rng.integers(0, 256, (64, supers * super_bytes), np.uint8)
    device = np.zeros(200 * STAGING, np.uint8)
    parts, expected = [], []
    for i in range(200):
        first, n = rng.integers(0, 57), 8
        if i % 2:
            part, how = rows[first : first + n].reshape(1, -1), (supers, super_bytes)
            made = part.reshape(8, supers, super_bytes).swapaxes(0, 1)
        else:
            part, how = source[first : first + n, i : i + 1 + first], (0, 0)
            made = part
        parts.append((part, device.ctypes.data + i * STAGING, *how))
        expected.append(made.tobytes())
    loading = Loading(driver.addresses, 1, 2, 3, threads, STAGING, parts)
    assert loading.wait(60) == 0
    for i, made in enumerate(expected):
        assert device[i * STAGING :][: len(made)].tobytes() == made
    assert (driver.held, driver.events) == ({}, 0)


@pytest.mark.parametrize("fails", [n for n in ORDER if n not in ("host_free", "free")])
def test_the_drivers_error_is_told(fails):
    driver, device = Driver(fails), np.zeros(STAGING, np.uint8)
    part = np.zeros((8, 16), np.uint8), device.ctypes.data, 1, 16
    assert Loading(driver.addresses, 1, 2, 3, 2, STAGING, [part]).wait(60) == 2


def test_who_waits_hears_of_it_when_it_takes_long():
    """So that Ctrl-C is seen while a file comes from a slow disk."""
    driver, device = Driver(), np.zeros(STAGING, np.uint8)
    part = np.ones((1, 16), np.uint8), device.ctypes.data, 0, 0
    with driver.lock:
        loading = Loading(driver.addresses, 1, 2, 3, 2, STAGING, [part])
        assert loading.wait(0.01) is None
    assert loading.wait(60) == 0
    assert device[:17].tolist() == [1] * 16 + [0]


def test_what_has_not_begun_is_not_brought_after_a_stop():
    driver, device = Driver(), np.zeros(STAGING, np.uint8)
    parts = [(np.ones((1, 16), np.uint8), device.ctypes.data, 0, 0)] * 3
    loading = Loading(driver.addresses, 1, 2, 3, 2, STAGING, parts)
    loading.stop()
    assert loading.wait(60) == 0


def test_what_does_not_fit_is_refused():
    driver = Driver()
    for rows, how, message in (
        (np.zeros((2, STAGING), np.uint8), (0, 0), "fit the staging"),
        (np.zeros((2, 8), np.uint8)[:, ::2], (0, 0), "in one piece"),
        (np.zeros((8, 16), np.uint8), (1, 0), "supers"),
    ):
        with pytest.raises(ValueError, match=message):
            Loading(driver.addresses, 1, 2, 3, 1, STAGING, [(rows, 0, *how)])
