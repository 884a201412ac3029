"""A KV cache on wgpu that fits what is known of the device's memory, and what turns out to be."""

import ctypes
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isobit import machine
from isobit.backends.base import Memory
from isobit.backends.cpu import CpuBackend
from isobit.backends.wgpu import WgpuBackend
from isobit.backends.wgpu.device import vulkan
from isobit.backends.wgpu.device.gpu import Device
from isobit.backends.wgpu.device.memory import headroom
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers.passes import run, same_bits
from tests.helpers.synth import Geometry, write_model
from tests.ops.wgpu_support import open_device

ENGINE = EngineConfig(max_sequences=2)
PAGE = 2 * 2 * (1024 * 16 + 512)
"""Bytes of two layers of two heads of 64."""


@pytest.fixture
def device() -> Device:
    return open_device()


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    path = write_model(tmp_path / "m.gguf", Geometry(layers=2, experts=0, context=32_768), seed=3)
    with GGUFFile.open(path) as file:
        return Weights.from_file(file)


def test_a_pool_of_what_is_free(
    device: Device, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    empty = device.empty
    monkeypatch.setattr(device, "empty", lambda n: made.append(n) or empty(n))
    ours = WgpuBackend(weights, ENGINE, device)
    assert (ours.limits.positions, ours.limits.pages, ours.settled) == (32_768, 1024, None)
    whole, cache = sum(made), 1024 * PAGE
    rest = headroom(
        ours._g,
        weights,
        ours.engine,
        SimpleNamespace(  # type: ignore[arg-type]
            binding_bytes=device.binding_bytes, memory=lambda: Memory(1 << 40, 1 << 40)
        ),
    )
    assert rest.page == PAGE
    ours.close()
    free = int((whole - cache + 600 * PAGE) / 0.9)
    monkeypatch.setattr(device, "memory", lambda: Memory(free, free))
    less = WgpuBackend(weights, ENGINE, device)
    assert less.memory() == Memory(free, free)
    assert 600 <= less.limits.pages < 620  # the rest of a longer context takes more
    assert less.settled is not None
    assert less.settled.startswith("KV cache: 3")
    less.close()
    monkeypatch.setattr(device, "memory", lambda: None)
    binding = device.binding_bytes
    monkeypatch.setattr(device, "binding_bytes", 700 * PAGE // 4)  # a head's buffer
    most = WgpuBackend(weights, ENGINE, device)
    assert most.limits.pages == 700
    assert most.settled is not None
    most.close()
    server = replace(ENGINE, most_sequences=64)  # not half of what nobody knows
    most = WgpuBackend(weights, server, device)
    assert (most.limits.pages, most.engine.max_sequences) == (700, 2)
    most.close()
    monkeypatch.setattr(device, "binding_bytes", binding)
    monkeypatch.setattr(device, "memory", lambda: Memory(1 << 18, 1 << 30))
    with pytest.raises(BackendUnavailable, match=r"the model takes .* GB beside its KV cache, 0"):
        WgpuBackend(weights, ENGINE, device)


def test_a_smaller_pool_where_memory_ends(
    device: Device, weights: Weights, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Nobody says how much there is; the device refuses what is too much."""
    import wgpu  # noqa: PLC0415 - not everywhere

    empty, spare = device.empty, 300 * PAGE
    left = [1 << 40]

    def within(nbytes: int) -> Any:
        if nbytes > left[0]:
            raise wgpu.GPUOutOfMemoryError("Not enough memory left.")
        left[0] -= nbytes
        buffer = empty(nbytes)
        destroy = buffer.destroy
        buffer.destroy = lambda: (left.append(left.pop() + nbytes), destroy())
        return buffer

    monkeypatch.setattr(device, "memory", lambda: None)
    monkeypatch.setattr(device, "empty", within)
    WgpuBackend(weights, ENGINE, device).close()
    rest = (1 << 40) - left[0] - 1024 * PAGE
    left[0] = rest + spare
    ours = WgpuBackend(weights, ENGINE, device)
    assert (ours.limits.pages, ours.limits.positions) == (256, 16_384)
    assert ours.engine.pages == 256
    assert ours.settled is not None
    assert ours.settled.startswith("context: 16,384 tokens, not the model's 32,768: 65,536 tokens")
    assert left[0] == spare - 256 * PAGE
    theirs = CpuBackend(weights, EngineConfig(context=256, max_sequences=1))
    ids = rng.integers(0, 300, 130).tolist()
    assert same_bits(run(ours, ids), run(theirs, ids))
    theirs.close()
    ours.close()
    for named in ({"context": 32_768}, {"pages": 512}):
        left[0] = rest + spare
        with pytest.raises(BackendUnavailable, match=r"KV cache: .*has room"):
            WgpuBackend(weights, EngineConfig(max_sequences=2, **named), device)
        assert left[0] == spare


class Loader:
    """Vulkan as a driver gives it: two heaps, a budget of each and what of it is used."""

    def __init__(self, *, extension: bytes = b"VK_EXT_memory_budget", fails: int = 0) -> None:
        self.extension, self.fails, self.open = extension, fails, 0

    def vkCreateInstance(self, info: Any, _: None, _instance: Any) -> int:  # noqa: N802
        assert info._obj.application.contents.api >> 22 == 1
        self.open += not self.fails
        return self.fails

    def vkDestroyInstance(self, *_: Any) -> None:  # noqa: N802
        self.open -= 1

    def vkEnumeratePhysicalDevices(self, _: Any, count: Any, devices: Any) -> int:  # noqa: N802
        count._obj.value = 3
        if devices is not None:
            devices[:] = [1, 2, 3]
        return 0

    def vkGetPhysicalDeviceProperties(self, device: Any, words: Any) -> None:  # noqa: N802
        words[2], words[3] = 0x1002, 0x744C + (device.value == 1)

    def vkEnumerateDeviceExtensionProperties(  # noqa: N802
        self, _device: Any, _layer: None, count: Any, has: Any
    ) -> int:
        count._obj.value = 2
        if has is not None:
            has[0].name, has[1].name = b"VK_KHR_swapchain", self.extension
        return 0

    def vkGetPhysicalDeviceMemoryProperties2(self, device: Any, heaps: Any) -> None:  # noqa: N802
        found = heaps._obj
        budget = ctypes.cast(found.next, ctypes.POINTER(vulkan._Budget)).contents
        found.count = 3
        for i, (size, flags) in enumerate(((64 << 30, 0), (1 << 28, 1), (24 << 30, 1))):
            found.heaps[i].size, found.heaps[i].flags = size, flags
            budget.budget[i], budget.usage[i] = size - (device.value << 30), 1 << 20


def test_what_the_driver_says_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the largest heap on the device, of the one of two alike that has less."""
    loader = Loader()
    monkeypatch.setattr(vulkan.ctypes, "CDLL", lambda _: loader)
    assert vulkan.memory_of(0x1002, 0x744C) == Memory((21 << 30) - (1 << 20), 24 << 30)
    assert vulkan.memory_of(0x1002, 0x744D) == Memory((23 << 30) - (1 << 20), 24 << 30)
    assert vulkan.memory_of(0x8086, 0x744C) is None
    assert loader.open == 0
    monkeypatch.setattr(vulkan.ctypes, "CDLL", lambda _: Loader(extension=b"VK_KHR_other"))
    assert vulkan.memory_of(0x1002, 0x744C) is None
    monkeypatch.setattr(vulkan.ctypes, "CDLL", lambda _: Loader(fails=-9))
    assert vulkan.memory_of(0x1002, 0x744C) is None

    def none(_: str) -> None:
        raise OSError

    monkeypatch.setattr(vulkan.ctypes, "CDLL", none)
    assert vulkan.memory_of(0x1002, 0x744C) is None


def test_a_software_devices_memory_is_the_hosts(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 5e9)
    monkeypatch.setattr(machine, "total_memory", lambda: 8e9)
    if device._kind != "CPU":
        pytest.skip("not run: the device is no software device")
    assert device.memory() == Memory(5_000_000_000, 8_000_000_000)
    monkeypatch.setattr(device, "_kind", "IntegratedGPU")
    monkeypatch.setattr(vulkan, "memory_of", lambda *_: Memory(4_000_000_000, 4_000_000_000))
    assert device.memory() == Memory(4_000_000_000, 4_000_000_000)
    monkeypatch.setattr(device, "_kind", "DiscreteGPU")
    monkeypatch.setattr(vulkan, "memory_of", lambda *_: None)
    assert device.memory() is None


def test_the_loader_that_is_there_is_asked_without_harm() -> None:
    assert os.name == "nt" or vulkan.memory_of(0, 0) is None
