"""The compiled sampler against the specification, at every level of SIMD, bit for bit."""

import numpy as np
import pytest

from isobit.backends.cpu import simd_levels
from isobit.backends.cpu.sampler import NONE_ALLOWED, NOT_FINITE, Row, RowSampler
from isobit.numerics import log_softmax, top_logprobs
from isobit.numerics.sampling import choose, random_bits

from .inputs import identical
from .ways import LEVELS


@pytest.fixture(params=LEVELS)
def sampler(request):
    if request.param not in simd_levels():
        pytest.skip(f"not run: this machine or build has no {request.param}")
    return RowSampler(request.param, threads=2)


def distributions(rng, n):
    """Rows of n logits of every kind: narrow, wide, few likely ones, equals, extremes."""
    normal = rng.standard_normal((9, n))
    rows = np.stack(
        [
            normal[0] * 0.01,
            normal[1] * 3,
            normal[2] * 20,
            -1.5 * np.log(rng.permutation(n) + 1),
            np.zeros(n),
            rng.integers(-3, 3, n),
            np.where(rng.random(n) < 4 / n, 30, 0) + normal[3],
            normal[4] * 1e37,
            np.where(np.arange(n) == n - 1, 0, -60),
            np.full(n, -0.0),
        ]
    )
    return rows.astype(np.float32)


def any_row(rng, **fixed):
    given = {
        "temperature": float(rng.choice([0, 1e-6, 0.5, 1, 1, 1.7, 1e6])),
        "top_k": int(rng.choice([0, 0, 1, 3, 40, 2000, 1 << 30])),
        "top_p": float(rng.choice([1, 1, 0.5, 0.95, 0.999999, 1e-300, rng.random()])),
        "min_p": float(rng.choice([0, 0, 0.05, 1, 1e-12, rng.random()])),
        "seed": int(rng.integers(0, 1 << 63)) * 2 + 1,
        "index": int(rng.integers(1, 1000)),
    }
    return Row(**{**given, **fixed})


def expected(logits, row, allowed=None):
    z = logits.copy()
    if row.edited_ids is not None:
        z[row.edited_ids] = row.edited_logits
    if allowed is not None:
        z[~allowed] = -np.inf
    random = random_bits(row.seed, row.index)
    return choose(z, row.temperature, row.top_k, row.top_p, row.min_p, random)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 5000])
def test_choose(sampler, n, rng):
    for _ in range(6):
        logits = distributions(rng, n)
        rows = [any_row(rng) for _ in logits]
        tokens = sampler.choose(logits, rows)
        want = [expected(z, row) for z, row in zip(logits, rows, strict=True)]
        identical(tokens, np.array(want, np.int32))


def test_a_vocabulary_of_real_size(sampler, rng):
    logits = distributions(rng, 151_936)
    rows = [any_row(rng) for _ in logits]
    tokens = sampler.choose(logits, rows)
    want = [expected(z, row) for z, row in zip(logits, rows, strict=True)]
    identical(tokens, np.array(want, np.int32))


def test_the_first_of_equals_is_kept(sampler):
    flat = np.zeros((1, 1000), np.float32)
    drawn = {int(sampler.choose(flat, [Row(1, 300, index=i)])[0]) for i in range(1, 4000)}
    assert drawn == set(range(300))
    drawn = {int(sampler.choose(flat, [Row(1, 0, 0.3, index=i)])[0]) for i in range(1, 4000)}
    assert drawn == set(range(300))


def test_edits_and_what_is_allowed(sampler, rng):
    n = 700
    for _ in range(10):
        logits = distributions(rng, n)
        masks = rng.random((len(logits), n)) < 0.3
        masks[:, 5] = True
        rows = []
        for _ in logits:
            ids = rng.permutation(n)[: rng.integers(0, 50)].astype(np.int32)
            values = (rng.standard_normal(len(ids)) * 9).astype(np.float32)
            rows.append(any_row(rng, edited_ids=ids, edited_logits=values))
        rows[0] = any_row(rng)
        padded = np.zeros((len(logits), 22 * 32), np.bool_)
        padded[:, :n] = masks
        allowed = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
        for mask, bits in ((masks, allowed), ([None] * len(logits), None)):
            tokens = sampler.choose(logits, rows, bits)
            want = [expected(z, row, m) for z, row, m in zip(logits, rows, mask, strict=True)]
            identical(tokens, np.array(want, np.int32))


def test_rows_without_a_choice_say_so(sampler):
    logits = np.zeros((5, 300), np.float32)
    logits[1, 299], logits[2, 0], logits[3, 7] = np.nan, np.inf, -np.inf
    logits[2, 5] = np.nan
    allowed = np.full((5, 10), -1 & 0xFFFFFFFF, np.uint32)
    allowed[4] = 0
    tokens = sampler.choose(logits, [Row()] * 5, allowed)
    assert tokens.tolist() == [0, NOT_FINITE, NOT_FINITE, NOT_FINITE, NONE_ALLOWED]
    none = np.empty((5, 0), np.int32)
    argmax, _, ids, top = sampler.measure(logits, none, 2)
    assert argmax.tolist() == [0, NOT_FINITE, NOT_FINITE, NOT_FINITE, 0]
    assert ids.tolist() == [[0, 1], [-1, -1], [-1, -1], [-1, -1], [0, 1]]
    assert np.isnan(top).any(axis=1).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (300, 0), (300, 20), (300, 300), (5000, 700)])
def test_logprobs(sampler, n, k, rng):
    logits = distributions(rng, n)
    ids = rng.integers(0, n, (len(logits), 3)).astype(np.int32)
    argmax, values, top_ids, top = sampler.measure(logits, ids, k)
    identical(argmax, logits.argmax(axis=1).astype(np.int32))
    identical(values, np.take_along_axis(log_softmax(logits), ids, axis=1))
    want_ids, want = top_logprobs(logits, k)
    identical(top_ids, want_ids)
    identical(top, want)


def test_more_than_the_vocabulary_is_all_of_it(sampler, rng):
    _, _, ids, _ = sampler.measure(distributions(rng, 9)[:2], np.empty((2, 0), np.int32), 20)
    assert ids.shape == (2, 9)


def test_ids_out_of_range_are_refused(sampler):
    logits = np.zeros((1, 9), np.float32)
    with pytest.raises(ValueError, match="range"):
        sampler.measure(logits, np.array([[9]], np.int32))
    wrong = Row(edited_ids=np.array([-1], np.int32), edited_logits=np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="range"):
        sampler.choose(logits, [wrong])
