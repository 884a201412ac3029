"""What CUDA makes of logits where they lie, against the specification, bit for bit."""

import tracemalloc

import numpy as np
import pytest

from isobit.backends.base.draws import ADJUSTED, OCCURRED, Adjusted, Draws
from isobit.backends.base.row_results import MAX_WORDS, RowRequest, RowResults
from isobit.backends.cpu.sampler import NONE_ALLOWED, NOT_FINITE, Columns
from isobit.backends.cuda import sampler as measure_module
from isobit.backends.cuda.sampler import DeviceSampler, RowDraws
from isobit.numerics import log_softmax, top_logprobs
from isobit.numerics.digest import tree_digest
from isobit.numerics.sampling import adjust
from isobit.runtime.sampler import BatchSampler, Sampler, Sampling

from .cuda_support import Buffers, open_gpu
from .inputs import identical
from .test_sampling import any_row, distributions, expected

NOTHING = np.empty((0, 0), np.int32)


@pytest.fixture(params=["emulated", "cuda"])
def gpu(request):
    gpu = open_gpu(request.param)
    yield gpu
    gpu.close()


def draws_of(rows, which, vocabulary, **more):
    index = np.array([row.index for row in rows], np.uint64)
    columns = Columns.of(rows, vocabulary)
    return Draws(np.array(which, np.int32), columns, index, logprobs=True, **more)


class Measurer:
    """Measures rows on a device, again and again with the same buffers."""

    def __init__(self, gpu, rows, vocabulary):
        self.buffers, self.sampler = Buffers(gpu), DeviceSampler(gpu, rows, vocabulary)
        self.sampler.allocate()
        self.tokens = self.buffers.put(np.full(rows, -7, np.int32))

    def __call__(
        self, logits, ids=NOTHING, k=0, *, rows=(), which=(), digest=False, repeated=0, **more
    ):
        asked = RowRequest(ids.shape[1], k, bool(rows), digest)
        address, n = self.buffers.put(logits), len(logits)
        self.sampler.give(ids)
        draws = draws_of(rows, which, logits.shape[1], **more) if rows else None
        draws = RowDraws.of(draws, np.array(which, np.int32))
        self.sampler.queue(address, n, asked, draws, self.tokens, n + repeated)
        return self.found(n, asked)

    def found(self, n, asked):
        words = np.empty((n, asked.words), np.int32)
        self.buffers.gpu.wait(self.buffers.gpu.mark())  # all that was staged has been read
        self.buffers.gpu.download(self.sampler.found, words)
        self.buffers.check()
        found = RowResults.empty(n, asked)
        found.take(np.arange(n), words, asked)
        return found


@pytest.mark.parametrize("n", [1, 2, 255, 257, 2048, 2049, 5003])
def test_rows_of_every_kind(gpu, rng, n):
    logits = distributions(rng, n)
    logits[4] = np.where(rng.random(n) < 0.5, 0.0, -0.0)  # equals
    measure = Measurer(gpu, len(logits), n)
    for given, k in ((0, 0), (3, 0), (0, 1), (2, min(n, 9))):
        ids = rng.integers(0, n, (len(logits), given)).astype(np.int32)
        found = measure(logits, ids, k)
        top_ids, top = top_logprobs(logits, k)
        assert found.argmax.tolist() == logits.argmax(1).tolist()
        assert found.top_ids.tolist() == top_ids.tolist()
        identical(found.top, top)
        identical(found.given, np.take_along_axis(log_softmax(logits), ids, axis=1))


def test_as_many_as_can_be(gpu, rng):
    """More than a block's keys of the keys of all pieces."""
    logits = distributions(rng, 50_000)[:3]
    k = (MAX_WORDS - 1) // 2
    top_ids, top = top_logprobs(logits, k)
    found = Measurer(gpu, 3, logits.shape[1])(logits, NOTHING, k)
    assert found.top_ids.tolist() == top_ids.tolist()
    identical(found.top, top)


@pytest.mark.parametrize("n", [1, 2, 255, 2049, 5003])
def test_draws(gpu, rng, n):
    """Rows in any order, some without a draw."""
    logits = distributions(rng, n)
    measure = Measurer(gpu, len(logits), n)
    for fixed in ({}, {}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"top_k": 0}, {"top_p": 1.0}):
        which = rng.permutation(len(logits))[: rng.integers(1, len(logits) + 1)].tolist()
        rows = [any_row(rng, **fixed) for _ in which]
        found = measure(logits, rows=rows, which=which)
        want = [expected(logits[i], row) for i, row in zip(which, rows, strict=True)]
        assert found.drawn[which].tolist() == want
        measured = log_softmax(logits)[which, want]
        identical(found.drawn_logprobs[which], measured)
        tokens = measure.buffers.get(measure.tokens, (len(logits),), np.int32)
        assert tokens[which].tolist() == want


class Edited:
    """What changes the logits of one draw, of n ids, at random; ``z`` with it, by the document."""

    def __init__(self, rng, z):
        f, n = np.float32, len(z)
        count = int(rng.choice([0, 1, n, rng.integers(0, n + 1)]))
        self.adjusted = Adjusted(
            np.zeros(count, ADJUSTED),
            float(rng.choice([1, 1.1, 0.5, 1e-6, 1e6])),
            float(rng.choice([0, 0.7, -2, 1e6, -1e6])),
            float(rng.choice([0, 0.3, -0.1, 1e6, -1e6])),
        )
        ids, a = self.adjusted.ids, self.adjusted
        ids["id"] = rng.permutation(n)[:count]
        ids["bias"] = rng.choice([0, -0.0, 3, -100, 1e6, -1e6, -np.inf, 3e38], count)
        times = rng.choice([0, 0, 1, 2, 7, 16_384, OCCURRED - 1], count).astype(np.uint32)
        ids["seen"] = times | np.where((times > 0) | (rng.random(count) < 0.5), OCCURRED, 0)
        kind, mask = rng.choice(["none", "one", "some", "nothing"], p=[0.3, 0.3, 0.3, 0.1]), None
        if kind != "none":
            mask = rng.random(n) < {"some": 0.5}.get(kind, 0)
            mask[rng.integers(n)] |= kind == "one"
        self.mask, self.asked, self.z = mask, 0, z.copy()
        self.z[ids["id"]] = adjust(
            z[ids["id"]],
            bias=ids["bias"],
            occurred=ids["seen"] >> 31 == 1,
            generated=times.astype(np.int32),
            repetition=f(a.repetition),
            presence=f(a.presence),
            frequency=f(a.frequency),
        )
        if mask is not None:
            self.z[~mask] = -np.inf

    def fill(self, row):
        self.asked += 1
        bits = np.full(32 * len(row), True)  # the last ones are of no id
        bits[: len(self.mask)] = self.mask
        row[:] = np.packbits(bits, bitorder="little").view(np.uint32)

    def expected(self, row):
        return NONE_ALLOWED if (self.z == -np.inf).all() else expected(self.z, row)


def edits_of(edited):
    """As draws have them; those of nothing are as often there as not."""
    each = list(enumerate(edited))
    some = [(i, e.adjusted) for i, e in each if len(e.adjusted.ids) or i % 2]
    return {"adjusted": some, "held": [(i, e.fill) for i, e in each if e.mask is not None]}


@pytest.mark.parametrize("n", [1, 2, 33, 2049, 5003])
@pytest.mark.parametrize("at_once", [64, 3])
def test_bias_penalties_and_masks(gpu, rng, monkeypatch, n, at_once):
    """Beside rows without: some together, with more edits than are told together."""
    monkeypatch.setattr(measure_module, "_ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(measure_module, "_EDITS", 4096 if at_once == 64 else 700)
    logits = distributions(rng, n)
    measure = Measurer(gpu, len(logits), n)
    for fixed in ({}, {}, {"temperature": 0.0}, {"temperature": 1.0, "top_k": 0, "min_p": 0.0}):
        which = rng.permutation(len(logits))[: rng.integers(1, len(logits) + 1)].tolist()
        rows = [any_row(rng, **fixed) for _ in which]
        edited = [Edited(rng, logits[i]) for i in which]
        found = measure(logits, k=1, rows=rows, which=which, digest=True, **edits_of(edited))
        want = [e.expected(row) for e, row in zip(edited, rows, strict=True)]
        assert found.drawn[which].tolist() == want
        assert [e.asked for e in edited] == [int(e.mask is not None) for e in edited]
        measured = log_softmax(logits)[which, np.maximum(want, 0)]
        measured[np.array(want) < 0] = np.nan
        identical(found.drawn_logprobs[which], measured)
        identical(found.top, top_logprobs(logits, 1)[1])  # of the logits as they were
        assert [d.tobytes() for d in found.digests] == [tree_digest(z.tobytes()) for z in logits]
        tokens = measure.buffers.get(measure.tokens, (len(logits),), np.int32)
        if fixed == {"temperature": 0.0} and at_once == 64 and any(edits_of(edited).values()):
            z = measure.buffers.get(measure.sampler._at(measure.sampler._p), (len(which), n))
            identical(z, np.stack([edited[i].z for i in np.argsort(which)]))
        assert [t for t, w in zip(tokens[which], want, strict=True) if w >= 0] == [
            w for w in want if w >= 0
        ]


def test_some_rows_at_a_time(gpu, rng, monkeypatch):
    """The last token is repeated."""
    monkeypatch.setattr(measure_module, "_ROWS_AT_ONCE", 4)
    n = 3000
    logits = distributions(rng, n)
    rows = [any_row(rng, temperature=1.0, index=5) for _ in logits]
    ids = rng.integers(0, n, (len(logits), 2)).astype(np.int32)
    measure = Measurer(gpu, len(logits), n)
    measure.tokens = measure.buffers.put(np.zeros(len(logits) + 3, np.int32))
    found = measure(logits, ids, 2, rows=rows, which=range(len(rows)), digest=True, repeated=2)
    want = [expected(z, row) for z, row in zip(logits, rows, strict=True)]
    assert found.drawn.tolist() == want
    identical(found.given, np.take_along_axis(log_softmax(logits), ids, axis=1))
    identical(found.top, top_logprobs(logits, 2)[1])
    assert [d.tobytes() for d in found.digests] == [tree_digest(z.tobytes()) for z in logits]
    tokens = measure.buffers.get(measure.tokens, (len(logits) + 3,), np.int32)
    assert tokens.tolist() == [*want, want[-1], want[-1], 0]


def test_the_first_of_equals_is_kept(gpu):
    flat = np.zeros((64, 5000), np.float32)
    measure = Measurer(gpu, 64, 5000)
    for fixed in ({"top_k": 3000}, {"top_p": 0.6}):
        rows = [
            any_row(np.random.default_rng(i), temperature=1.0, min_p=0.0, top_k=0, top_p=1.0)
            for i in range(64)
        ]
        rows = [type(row)(**{**vars(row), **fixed}) for row in rows]
        drawn = measure(flat, rows=rows, which=range(64)).drawn
        want = [expected(flat[0], row) for row in rows]
        assert drawn.tolist() == want
        assert 2048 < drawn.max() < 3000


@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_spoils_no_other(gpu, rng, wrong):
    n = 2500
    logits = distributions(rng, n)
    logits[2, int(rng.integers(n))] = wrong
    ids = rng.integers(0, n, (len(logits), 2)).astype(np.int32)
    rows = [any_row(rng) for _ in logits]
    held = [(2, lambda mask: mask.fill(0))]  # nor does what is forbidden hide it
    found = Measurer(gpu, len(logits), n)(
        logits, ids, 3, rows=rows, which=range(len(rows)), held=held
    )
    assert np.flatnonzero(found.argmax < 0).tolist() == [2]
    assert found.top_ids[2].tolist() == [-1] * 3
    assert np.isnan(found.top[2]).all()
    assert np.isnan(found.given[2]).all()
    assert found.drawn[2] == NOT_FINITE
    assert np.isnan(found.drawn_logprobs[2])
    good = np.arange(len(logits)) != 2
    identical(found.top[good], top_logprobs(logits[good], 3)[1])
    want = [expected(z, row) for z, row in zip(logits[good], np.array(rows)[good], strict=True)]
    assert found.drawn[good].tolist() == want


@pytest.mark.parametrize("n", [1, 13, 14, 29, 30, 64, 65, 511, 513, 64 * 65, 151_936])
def test_digests(gpu, rng, n):
    """Sizes at which a block, a piece or a level begins, and those behind them in the same row."""
    logits = rng.standard_normal((3, n)).astype(np.float32)
    logits[1, n // 2] = np.inf
    logits[2] = -0.0
    ids = rng.integers(0, n, (3, 2)).astype(np.int32)
    found = Measurer(gpu, 3, n)(logits, ids, 1, digest=True)
    assert [d.tobytes() for d in found.digests] == [tree_digest(x.tobytes()) for x in logits]
    assert found.argmax.tolist() == [int(logits[0].argmax()), -1, 0]


def test_a_bias_of_every_id_is_made_ready_once():
    """Of a whole vocabulary a step makes and writes nothing anew but the bytes that it tells."""
    bias = tuple((id, 1.0) for id in range(150_000))
    samplers = [Sampler(Sampling(1.0, seed=i, logit_bias=bias)) for i in range(2)]
    rows = np.arange(2, dtype=np.int32)

    def told():
        return RowDraws.of(BatchSampler(samplers, 150_000).draws(rows), rows).edits(1 << 15)

    for _ in told():
        pass
    tracemalloc.start()
    try:
        for sampler in samplers:
            sampler.append(7)
        there = 0
        for parts in told():
            there += sum(map(len, parts)) // ADJUSTED.itemsize
            assert all(any(np.shares_memory(p, s.adjusted.ids) for s in samplers) for p in parts)
        assert there == 300_000
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
