"""exp, norms, RoPE, SwiGLU and the router against the specification, bit for bit."""

import numpy as np
import pytest

from isobit import numerics

from .cases import identical, values

EDGES = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 88, 88.00001, 1e30, np.inf, -87, -87.00001, -1e30, -np.inf],
    np.float32,
)


def test_exp(ops, rng):
    every = rng.integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    every = every[~np.isnan(every)]
    x = np.concatenate([EDGES, every, rng.uniform(-88, 89, 20001).astype(np.float32)])
    identical(ops.exp(x), numerics.exp(x))
    assert np.isnan(ops.exp(np.array([np.nan], np.float32))).all()


@pytest.mark.parametrize("n", [2, 64, 100, 128, 255, 256, 257, 2048])
def test_rms_norm(ops, n, rng):
    x = np.concatenate([values(rng, 6, n), np.zeros((1, n), np.float32)])
    w = values(rng, n)
    identical(ops.rms_norm(x, w, 1e-6), numerics.rms_norm(x, w, np.float32(1e-6)))


@pytest.mark.parametrize("head_dim", [2, 6, 64, 128, 200])
def test_rope(ops, head_dim, rng):
    start = int(rng.integers(0, 100000))
    table = numerics.rope_table(numerics.inverse_frequencies(head_dim, 1e6), start, start + 5)
    x = values(rng, 5, 3, head_dim)
    identical(ops.rope(x, *table), numerics.rope(x, *table))


@pytest.mark.parametrize("n", [1, 13, 768])
def test_silu_gate(ops, n, rng):
    gate, up = rng.uniform(-100, 100, (2, 4, n)).astype(np.float32)
    gate[0] = rng.choice(EDGES[np.isfinite(EDGES)], n)
    up[1] = -0.0
    identical(ops.silu_gate(gate, up), numerics.silu_gate(gate, up))


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (16, 4), (128, 8), (300, 7)])
@pytest.mark.parametrize("normalise", [True, False])
def test_top_k(ops, experts, k, normalise, rng):
    z = values(rng, 9, experts) / np.float32(1e6)
    z[0] = 0  # ties everywhere
    z[1] = rng.integers(0, 3, experts)  # ties at the border
    z[2] = np.where(np.arange(experts) == experts - 1, 80, -80)  # probabilities of 0
    got = ops.top_k(z, k, normalise=normalise)
    for g, w in zip(got, numerics.top_k(z, k, normalise=normalise), strict=True):
        identical(g, w)


def test_top_k_of_nan_is_still_a_choice(ops):
    ids, _, _ = ops.top_k(np.full((2, 16), np.nan, np.float32), 4)
    for row in ids:
        assert len(set(row.tolist())) == 4
        assert row.min() >= 0
        assert row.max() < 16


@pytest.mark.parametrize(("k", "n"), [(1, 5), (4, 256), (8, 2048)])
def test_combine(ops, k, n, rng):
    weights, y = values(rng, 3, k), values(rng, 3, k, n)
    y[0] = -0.0  # 0 + w * -0 is +0
    identical(ops.combine(weights, y), numerics.combine(weights, y))
