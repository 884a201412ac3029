"""The wgpu device: layouts, limits, the driver's verdict, and what happens when it goes away."""

import json

import numpy as np
import pytest

from isobit.backends.base import Limits
from isobit.backends.wgpu import fusions
from isobit.backends.wgpu.device import driver, selftest
from isobit.backends.wgpu.device import gpu as device_module
from isobit.backends.wgpu.device.gpu import Device, Step, adapters, available
from isobit.backends.wgpu.device.layout import Stack, tiles
from isobit.backends.wgpu.device.memory import Plan
from isobit.backends.wgpu.graph import LoweredGraph
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.gguf.formats import FORMATS
from isobit.model.architectures import qwen3
from isobit.numerics import KV_PAGE, Weight
from isobit.numerics.ops import LOGIT_ROWS, TOKENS
from tests.helpers.geometries import QWEN3_30B_A3B, AnyTensors

from .inputs import weight
from .wgpu_support import open_device

MIB = 1 << 20


# Layout: no device needed.


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q2_K", "Q3_K", "Q8_0"])
def test_tiles_hold_every_byte_where_layout_says(rng, name):
    fmt = next(f for f in FORMATS.values() if f.name == name)
    rows, columns = 13, 768 if fmt.block_size == 256 else 608
    w = weight(rng, fmt, rows, columns)
    supers, size = 3, fmt.nbytes(256)
    out = tiles(w.data, fmt, columns).reshape(2, supers, 8 * size)
    padded = np.zeros((16, supers * size), np.uint8)
    padded[:rows, : w.row_bytes] = w.data.reshape(rows, -1)
    whole = size // 16
    for row in range(16):
        for s in range(supers):
            expected = padded[row, s * size : (s + 1) * size]
            tile, r = out[row // 8, s], row % 8
            for c in range(whole):
                at = 128 * c + 16 * r
                assert (tile[at : at + 16] == expected[16 * c : 16 * c + 16]).all()
            left = size - 16 * whole
            at = 128 * whole + left * r
            assert (tile[at : at + left] == expected[16 * whole :]).all()


@pytest.mark.parametrize("name", ["Q6_K", "F16"])
def test_parts_of_a_stack_are_the_whole(rng, name):
    fmt = next(f for f in FORMATS.values() if f.name == name)
    stack = Stack(tuple(weight(rng, fmt, 3, rows, 256) for rows in (11, 20)))
    total = stack.matrices * stack.row_blocks
    whole = stack.packed(0, total)
    for step in (1, 3, 5, total):
        parts = [
            stack.packed(i, min(i + step, total))[
                : stack.row_block_bytes * (min(i + step, total) - i)
            ]
            for i in range(0, total, step)
        ]
        assert np.array_equal(np.concatenate(parts), whole[: stack.row_block_bytes * total])


# Limits: no device needed.


class NamesAlone(AnyTensors):
    """Tensors of any shape that is asked for, without their bytes."""

    def take(self, name, *shape):
        return Weight(name, FORMATS[12], shape, np.empty(0, np.uint8))


def lowered_30b():
    return LoweredGraph(qwen3.graph(QWEN3_30B_A3B, NamesAlone()), 2).g


def planned(g, engine, binding):
    pages = -(-engine.context // KV_PAGE) * engine.max_sequences
    return Plan.of(g, engine, Limits(1, engine.context, pages, 0), binding)


def test_the_default_limits_hold_qwen3_30b_a3b():
    g = lowered_30b()
    plan = planned(g, EngineConfig(context=8192, max_sequences=1), 128 * MIB)
    assert all(plan.bytes(slot) <= 128 * MIB for slot in g.slots)
    assert plan.rows[TOKENS] == 512
    assert {tuple(plan.parts(cache)) for cache in g.caches.values()} == {((0, 4),)}


def test_a_smaller_limit_divides_more():
    g = lowered_30b()
    plan = planned(g, EngineConfig(context=8192, max_sequences=1), 8 * MIB)
    assert all(plan.bytes(slot) <= 8 * MIB for slot in g.slots)
    assert 1 <= plan.rows[TOKENS] < 512
    assert [list(plan.parts(c)) for c in g.caches.values()] == [[(i, 1) for i in range(4)]] * 96
    assert plan.rows[LOGIT_ROWS] == 8 * MIB // (4 * 151936)


def test_op_by_op_is_no_larger_than_twice_the_fused_pass(monkeypatch):
    """Values share memory once nothing reads them any more."""
    engine, sizes = EngineConfig(context=8192, max_sequences=1), []
    for claims in (fusions.CLAIMS, ()):
        monkeypatch.setattr(fusions, "CLAIMS", claims)
        g = lowered_30b()
        plan = planned(g, engine, 128 * MIB)
        sizes.append(sum(plan.bytes(slot) for slot in g.slots))
    assert sizes[0] < sizes[1] < 2 * sizes[0]


@pytest.mark.parametrize(
    ("engine", "binding", "words"),
    [
        (
            EngineConfig(context=1 << 20),
            128 * MIB,
            "one head's KV cache: 65536 pages of 64 positions × 33280 bytes = 2,181,038,080 bytes "
            "in one buffer, the device's maxStorageBufferBindingSize is 134,217,728",
        ),
        (EngineConfig(context=64, max_sequences=1), 500_000, "lm_head: 151936 × 4 bytes = 607,744"),
        (
            EngineConfig(context=64, max_sequences=1),
            60_000,
            "one token's moe_expert_out = 65,536 bytes",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_arithmetic(engine, binding, words):
    with pytest.raises(BackendUnavailable) as refusal:
        planned(lowered_30b(), engine, binding)
    assert words in str(refusal.value)


# The driver's verdict.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "isobit" / "wgpu"


@pytest.fixture
def quick(monkeypatch):
    """The self-test with fewer cases, counting how often it runs."""
    ran = []

    def run(device, run=selftest.run):
        ran.append(1)
        return run(device, cases=1 << 14)

    monkeypatch.setattr(selftest, "run", run)
    return ran


def test_every_primitive_is_exact():
    """The whole self-test, on new inputs."""
    findings = selftest.run(open_device())
    assert [f for f in findings if f.differing] == []
    assert len(findings) == 23
    for f in findings:
        assert f.cases > (2000 if f.primitive in ("tree256", "max256") else 900_000), f


def test_the_verdict_is_kept(cache, quick):
    device = open_device()
    assert driver.require_exact(device, allow_inexact=False) == ()
    assert driver.require_exact(device, allow_inexact=False) == ()
    assert len(quick) == 1
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == {}
    file.write_text("{")  # a damaged file is as good as none
    assert driver.require_exact(device, allow_inexact=False) == ()
    assert len(quick) == 2


def test_a_driver_that_differs_is_refused_by_name(cache, quick):
    """Division off by one in the last place, as a driver's own might be."""
    open_device()
    device = Device(adapters()[0])
    wrong = device.source("scalar").replace(
        "return pack(sign, x.e - y.e", "return 1u + pack(sign, x.e - y.e"
    )
    assert wrong != device.source("scalar")
    device._sources["scalar"] = wrong
    with pytest.raises(BackendUnavailable) as refusal:
        driver.require_exact(device, allow_inexact=False)
    assert f"{device.name} does not compute the specification's bits: div: " in str(refusal.value)
    assert "--allow-inexact" in str(refusal.value)
    failing = driver.require_exact(device, allow_inexact=True)
    assert failing[0] == "div"
    assert "add" not in failing
    device.close()


# Availability.


def test_no_adapter_says_what_to_install(monkeypatch):
    monkeypatch.setattr(device_module, "adapters", list)
    usable, reason = available()
    assert not usable
    assert "mesa-vulkan-drivers" in reason
    with pytest.raises(BackendUnavailable, match="mesa-vulkan-drivers"):
        device_module.open_device()


def test_no_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wgpu", None)
    usable, reason = available()
    assert not usable
    assert "pip install '.[wgpu]'" in reason


def test_a_lost_device_is_a_clear_error_and_another_can_be_opened():
    open_device()
    device = Device(adapters()[0])
    buffer = device.upload(np.arange(8, dtype=np.uint32))
    device.close()
    with pytest.raises(BackendUnavailable, match="lost; load the model again"), device.guarded():
        device.read(buffer, np.uint32)
    again = Device(adapters()[0])
    buffer = again.upload(np.arange(8, dtype=np.uint32))
    assert again.read(buffer, np.uint32).tolist() == list(range(8))
    again.close()


def test_more_kinds_of_parameters_than_there_is_room_for(monkeypatch):
    """Recordings are void once the parameters' places are used again, and say so."""
    monkeypatch.setattr(device_module, "_PARAMETER_SLOTS", 4)
    device = open_device()
    out = device.empty(4 * 256)
    inputs = [device.upload(np.full(256, i, np.uint32)) for i in (2, 3, 4)]
    kernel = device.kernel(("scalar", "reduce", device.dot, "device/selftest"), "scalars")
    before = device.generation
    for primitive, expected in [(9, 3), (20, 6), (1, None), (9, 3), (2, 0), (20, 6)] * 2:
        device.run([Step(kernel, (*inputs, out), (primitive,), (1,))])
        got = device.read(out, np.uint32)[0]
        assert expected is None or got == expected
    assert device.generation > before
