"""The logarithm and log-probabilities against the document, number by number."""

import math

import numpy as np
import pytest

from isobit.numerics import log, log_softmax, top_logprobs
from tests.helpers import naive
from tests.helpers.passes import same_bits


def any_positive(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0x00800000, 0x7F800000, n, dtype=np.uint32).view(np.float32)


def test_log_is_the_specification(rng: np.random.Generator) -> None:
    x = np.concatenate([any_positive(rng, 10_000), rng.uniform(0.5, 2, 10_000).astype(np.float32)])
    assert same_bits(log(x), np.array([naive.log(v) for v in x.tolist()], np.float32))


def test_log_error(rng: np.random.Generator) -> None:
    around_one = np.arange(0x3F7F0000, 0x3F810000, dtype=np.uint32).view(np.float32)
    sums = rng.uniform(1, 2e5, 500_000).astype(np.float32)
    x = np.concatenate([any_positive(rng, 1_000_000), around_one, sums])
    exact = np.log(x.astype(np.float64))
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    error = np.abs(log(x) - exact) / ulp
    print(f"largest error {error.max():.3f} ulp, at x = {x[error.argmax()]!r}")
    assert error.max() < 0.9


def test_log_never_falls() -> None:
    x = np.arange(0x3F000000, 0x40800000, 7, dtype=np.uint32).view(np.float32)
    assert (np.diff(log(x)) >= 0).all()
    assert log(np.ones(1, np.float32))[0] == 0


@pytest.mark.parametrize("n", [1, 2, 300])
def test_log_softmax_is_the_specification(n: int, rng: np.random.Generator) -> None:
    z = (rng.standard_normal((3, n)) * 8).astype(np.float32)
    expected = [naive.log_softmax(row) for row in z.tolist()]
    assert same_bits(log_softmax(z), np.array(expected, np.float32))


def test_log_softmax_is_close_to_the_exact_one(rng: np.random.Generator) -> None:
    for spread in (0.0, 0.1, 3.0, 20.0):
        z = (rng.standard_normal((2, 151_936)) * spread).astype(np.float32)
        exact = z.astype(np.float64) - z.max(-1, keepdims=True)
        exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
        relative = np.abs(log_softmax(z) - exact) / np.maximum(np.abs(exact), 1)
        print(f"spread {spread}: {relative.max():.2e}")
        assert relative.max() < 2.5e-7  # two ulp


def test_log_softmax_is_finite() -> None:
    z = np.array([[3e38, -3e38, 0]], np.float32)
    assert np.isfinite(log_softmax(z)).all()
    assert log_softmax(z)[0, 0] == 0


def test_order_of_the_sum_does_not_matter(rng: np.random.Generator) -> None:
    z = (rng.standard_normal((1, 50_000)) * 4).astype(np.float32)
    order = rng.permutation(z.shape[1])
    assert same_bits(log_softmax(z)[:, order], log_softmax(z[:, order]))


def test_top_logprobs_are_the_largest_logits_in_order() -> None:
    z = np.array([[1, 3, 3, -0.0, 0.0, 2]], np.float32)
    ids, values = top_logprobs(z, 5)
    assert ids.tolist() == [[1, 2, 5, 0, 3]]
    assert same_bits(values, log_softmax(z)[:, ids[0]])
    assert math.isclose(np.exp(log_softmax(z)).sum(), 1, rel_tol=1e-6)
