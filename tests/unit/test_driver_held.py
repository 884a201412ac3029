"""The driver that is opened beside the reading of a file."""

import ctypes
import threading
from types import SimpleNamespace

import pytest

from isobit import backends
from isobit.config import EngineConfig


@pytest.fixture
def asked(monkeypatch):
    """What a driver is asked for: each name, and whether something failed before."""
    names, fails = [], set()

    def function(name):
        return lambda *_: names.append(name) or int(name in fails)

    asks = ("cuInit", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2")
    driver = SimpleNamespace(**{name: function(name) for name in asks})
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    monkeypatch.setattr(backends, "may_have_gpu", lambda: True)
    return names, fails


def held(name, **engine):
    with backends.driver_held(name, EngineConfig(**engine)):
        pass
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "_hold_driver" in thread.name:
            thread.join(10)


def test_it_is_given_back_whoever_took_it(asked):
    names, _ = asked
    for backend in ("auto", "cuda", "cuda:unfused"):
        held(backend)
        assert names == ["cuInit", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2"]
        names.clear()


def test_nobody_asks_where_no_backend_will(asked, monkeypatch):
    names, _ = asked
    for backend, engine in (("cpu", {}), ("wgpu", {}), ("reference", {}), ("auto", {"parts": 2})):
        held(backend, **engine)
    held("auto", stages=("host:1",), stage_key=b"x")
    monkeypatch.setattr(backends, "may_have_gpu", lambda: False)
    held("auto")
    assert names == []


@pytest.mark.parametrize(("fails", "asks"), [("cuInit", 1), ("cuDevicePrimaryCtxRetain", 2)])
def test_what_failed_is_not_given_back(asked, fails, asks):
    names, failing = asked
    failing.add(fails)
    held("cuda")
    assert len(names) == asks


def test_a_driver_that_is_not_there_is_left_to_the_backend(asked, monkeypatch):
    def library(_):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", library)
    held("cuda")
    assert asked[0] == []
