"""Router and weighted sum (docs/numerics.md, section 7)."""

import numpy as np
import pytest

from isobit.numerics import combine, top_k
from tests.helpers import naive
from tests.helpers.passes import same_bits


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 5), (16, 4), (128, 8), (300, 3)])
def test_top_k(experts: int, k: int, normalise: bool, rng: np.random.Generator) -> None:
    z = (4 * rng.standard_normal((20, experts))).astype(np.float32)
    z[10:] = np.rint(z[10:])  # many ties
    ids, weights, _ = top_k(z, k, normalise=normalise)
    expected = [naive.top_k(row, k, normalise=normalise) for row in z.tolist()]
    assert ids.dtype == np.int32
    assert ids.tolist() == [e[0] for e in expected]
    assert same_bits(weights, np.array([e[1] for e in expected], np.float32))


@pytest.mark.parametrize(("groups", "used"), [(1, 1), (2, 1), (6, 4), (6, 6)])
def test_top_k_by_biased_scores_of_groups(groups: int, used: int, rng: np.random.Generator) -> None:
    p = rng.uniform(0, 1, (30, 24)).astype(np.float32)
    p[10:20] = np.rint(8 * p[10:20]) / np.float32(8)  # many ties
    p[20:] *= np.float32(1e-6)  # sums below 2^-14
    bias = np.rint(8 * rng.standard_normal(24)).astype(np.float32) / np.float32(8)
    ids, weights, _ = top_k(p, 5, softmax=False, bias=bias, groups=groups, groups_used=used)
    naively = [
        naive.choose(row, 5, normalise=True, bias=bias.tolist(), groups=groups, used=used)
        for row in p.tolist()
    ]
    assert ids.tolist() == [e[0] for e in naively]
    assert same_bits(weights, np.array([e[1] for e in naively], np.float32))


@pytest.mark.parametrize(("groups", "used"), [(2, 1), (6, 4), (24, 7)])
def test_top_k_of_groups_by_their_best(groups: int, used: int, rng: np.random.Generator) -> None:
    z = (4 * rng.standard_normal((30, 48))).astype(np.float32)
    z[10:] = np.rint(z[10:])  # many ties
    ids, weights, _ = top_k(z, 6, normalise=False, groups=groups, groups_used=used)
    naively = [naive.top_k(r, 6, normalise=False, groups=groups, used=used) for r in z.tolist()]
    assert ids.tolist() == [e[0] for e in naively]
    assert same_bits(weights, np.array([e[1] for e in naively], np.float32))


def test_ties_go_to_the_lower_index() -> None:
    z = np.zeros((1, 128), np.float32)
    z[0, [7, 100]] = 3
    ids, weights, _ = top_k(z, 4)
    assert ids.tolist() == [[7, 100, 0, 1]]
    assert weights[0, 0] == weights[0, 1]


def test_logits_that_differ_but_not_their_probabilities() -> None:
    """Far below the maximum all probabilities are +0, and the order is that of the indices."""
    z = np.array([[-200, -100, 0, -150]], np.float32)
    ids, weights, _ = top_k(z, 3)
    assert ids.tolist() == [[2, 0, 1]]
    assert same_bits(weights, np.array([[1, 0, 0]], np.float32))


def test_combine(rng: np.random.Generator) -> None:
    w = rng.uniform(0, 1, (6, 8)).astype(np.float32)
    y = (rng.standard_normal((6, 8, 40)) * 10.0 ** rng.uniform(-4, 4, (6, 8, 40))).astype(
        np.float32
    )
    expected = [naive.combine(w[t].tolist(), y[t].tolist()) for t in range(6)]
    assert same_bits(combine(w, y), np.array(expected, np.float32))
    assert not same_bits(combine(w[:, ::-1], y[:, ::-1]), combine(w, y))
