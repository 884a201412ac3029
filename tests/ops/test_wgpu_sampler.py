"""What wgpu makes of logits where they lie, against the specification, bit for bit."""

import numpy as np
import pytest

from isobit.backends.base import Memory
from isobit.backends.base.row_results import MAX_WORDS, RowRequest, RowResults
from isobit.backends.wgpu import sampler as measure
from isobit.backends.wgpu.sampler import DeviceSampler
from isobit.numerics import log_softmax, top_logprobs
from isobit.numerics.digest import tree_digest

from .inputs import identical
from .test_sampling import distributions
from .wgpu_support import Guards, open_device


@pytest.fixture
def device(monkeypatch):
    device = open_device()
    guards = Guards(device)
    monkeypatch.setattr(device, "empty", guards.empty)
    yield device
    guards.check()


def measured(device, logits, ids, k, digest=False):
    """Of every row, in one dispatch, and one for each level of digests."""
    asked = RowRequest(ids.shape[1], k, digest=digest)
    sampler, rows = DeviceSampler(device, *logits.shape), np.arange(len(logits))
    sampler.give(ids)
    device.run(list(sampler.steps(device.upload(logits), len(logits), asked)))
    words = device.read(sampler.found, np.int32, len(logits) * asked.words)
    found = RowResults.empty(len(logits), asked)
    found.take(rows, words.reshape(len(logits), -1), asked)
    return found


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 5000])
def test_rows_of_every_kind(device, rng, n):
    logits = distributions(rng, n)
    logits[4] = np.where(rng.random(n) < 0.5, 0.0, -0.0)  # equals
    k = min(n, 9)
    for given in (0, 3):
        ids = rng.integers(0, n, (len(logits), given)).astype(np.int32)
        found = measured(device, logits, ids, k)
        top_ids, top = top_logprobs(logits, k)
        assert found.argmax.tolist() == logits.argmax(1).tolist()
        assert found.top_ids.tolist() == top_ids.tolist()
        identical(found.top, top)
        identical(found.given, np.take_along_axis(log_softmax(logits), ids, axis=1))


def test_how_fast_a_device_reads(monkeypatch):
    """Of a buffer of the size that it may have; none where that would fit a cache."""
    device = open_device()
    monkeypatch.setattr(measure, "_BANDWIDTH_BYTES", 8 << 20)
    assert 1e6 < measure.read_bandwidth(device) < 1e13
    monkeypatch.setattr(device, "binding_bytes", 1 << 20)
    assert measure.read_bandwidth(device) is None
    monkeypatch.setattr(device, "binding_bytes", 64 << 20)
    monkeypatch.setattr(device, "memory", lambda: Memory(1 << 20, 1 << 30))
    assert measure.read_bandwidth(device) is None


@pytest.mark.parametrize("room", [0, 1])
def test_where_memory_ends_nobody_knows_how_fast_it_is_read(monkeypatch, room):
    """The KV cache may have taken what there was: so many buffers still have room."""
    import wgpu  # noqa: PLC0415 - not everywhere

    device = open_device()
    empty, made, freed = device.empty, [], []

    def full(nbytes):
        if len(made) == room:
            raise wgpu.GPUOutOfMemoryError("Not enough memory left.")
        made.append(empty(nbytes))
        made[-1].destroy = lambda: freed.append(nbytes)
        return made[-1]

    monkeypatch.setattr(measure, "_BANDWIDTH_BYTES", 8 << 20)
    monkeypatch.setattr(device, "empty", full)
    assert measure.read_bandwidth(device) is None
    assert len(made) == len(freed) == room


def test_the_likeliest_alone_and_as_many_as_can_be(device, rng):
    logits = distributions(rng, 1000)
    nothing = np.empty((len(logits), 0), np.int32)
    assert measured(device, logits, nothing, 0).argmax.tolist() == logits.argmax(1).tolist()
    k = (MAX_WORDS - 1) // 2
    top_ids, top = top_logprobs(logits, k)
    found = measured(device, logits, nothing, k)
    assert found.top_ids.tolist() == top_ids.tolist()
    identical(found.top, top)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_spoils_no_other(device, rng, wrong):
    logits = distributions(rng, 300)
    logits[2, int(rng.integers(300))] = wrong
    ids = rng.integers(0, 300, (len(logits), 2)).astype(np.int32)
    found = measured(device, logits, ids, 3)
    assert np.flatnonzero(found.argmax < 0).tolist() == [2]
    assert found.top_ids[2].tolist() == [-1] * 3
    assert np.isnan(found.top[2]).all()
    assert np.isnan(found.given[2]).all()
    good = np.arange(len(logits)) != 2
    identical(found.top[good], top_logprobs(logits[good], 3)[1])


@pytest.mark.parametrize("n", [1, 13, 14, 29, 30, 64, 65, 511, 513, 64 * 65, 151936])
def test_digests(device, rng, n):
    """Sizes at which a block, a piece or a level begins, and those behind them in the same row."""
    logits = rng.standard_normal((3, n)).astype(np.float32)
    logits[1, n // 2] = np.inf
    logits[2] = -0.0
    found = measured(device, logits, rng.integers(0, n, (3, 2)).astype(np.int32), 1, digest=True)
    assert [d.tobytes() for d in found.digests] == [tree_digest(x.tobytes()) for x in logits]
    assert found.argmax.tolist() == [int(logits[0].argmax()), -1, 0]
