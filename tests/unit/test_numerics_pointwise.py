"""Sums, exp and the pointwise operations against the specification written out number by number."""

import numpy as np
import pytest

from isobit.numerics import exp, rms_norm, rope, silu_gate, sum256, tree
from tests.helpers import naive
from tests.helpers.passes import same_bits


def wide(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Values of very different sizes, so that every order of adding gives other bits."""
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 4, shape)).astype(np.float32)


def as_f32(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize("n", [1, 2, 64, 256])
def test_tree(n: int, rng: np.random.Generator) -> None:
    v = wide(rng, 20, n)
    assert same_bits(tree(v), as_f32([naive.tree(row) for row in v.tolist()]))


@pytest.mark.parametrize("n", [1, 5, 128, 255, 256, 257, 700, 2048])
def test_sum256(n: int, rng: np.random.Generator) -> None:
    v = wide(rng, 5, n)
    assert same_bits(sum256(v), as_f32([naive.sum256(row) for row in v.tolist()]))


def test_sum256_is_not_any_sum(rng: np.random.Generator) -> None:
    """Partners n/2 apart, lanes of stride 256: other shapes do give other bits on such values."""
    v = wide(rng, 50, 2048)
    neighbours = v.reshape(50, 256, 8)
    assert not same_bits(sum256(v), v.sum(axis=1, dtype=np.float32))
    assert not same_bits(
        sum256(v), sum256(np.ascontiguousarray(neighbours.swapaxes(1, 2)).reshape(50, -1))
    )


def test_sum256_keeps_positive_zero() -> None:
    """Lanes start at +0, so that a sum of negative zeros is +0."""
    assert same_bits(sum256(np.full((1, 300), -0.0, np.float32)), as_f32([0.0]))


def test_exp_is_the_specification(rng: np.random.Generator) -> None:
    x = rng.uniform(-90, 90, 20_000).astype(np.float32)
    assert same_bits(exp(x), as_f32([naive.exp(v) for v in x.tolist()]))


def test_exp_error(rng: np.random.Generator) -> None:
    """Below 1.2 ulp over the whole range; float64's exp is exact enough to tell."""
    x = np.concatenate(
        [
            rng.uniform(-87, 88, 1_000_000),
            rng.uniform(-1, 1, 500_000),
            np.arange(-125, 127) * np.log(2),  # where the argument is reduced to nearly 0
            (np.arange(-125, 127) + 0.5) * np.log(2),  # where n changes
            10.0 ** rng.uniform(-30, 0, 100_000),
        ]
    ).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    error = np.abs(exp(x).astype(np.float64) - exact) / ulp
    print(f"largest error {error.max():.3f} ulp, at x = {x[error.argmax()]!r}")
    assert error.max() < 1.2


def test_exp_at_the_edges() -> None:
    subnormal = np.uint32(1).view(np.float32)
    below = np.nextafter(np.float32(-87), np.float32(-100))
    x = np.array([0, -0.0, subnormal, -subnormal, below, -88, -np.inf, 88, 89, np.inf], np.float32)
    y = exp(x)
    assert same_bits(y[:4], np.ones(4, np.float32))
    assert same_bits(y[4:7], np.zeros(3, np.float32))
    assert same_bits(y[7:], np.repeat(y[7], 3))
    assert np.isfinite(y).all()
    assert exp(np.array([-87], np.float32))[0] >= np.finfo(np.float32).tiny
    assert np.isnan(exp(np.array([np.nan], np.float32))[0])


@pytest.mark.parametrize("n", [32, 96, 128, 256, 2048])
def test_rms_norm(n: int, rng: np.random.Generator) -> None:
    x, weight, eps = wide(rng, 4, n), wide(rng, n), np.float32(1e-6)
    expected = [naive.rms_norm(row, weight.tolist(), float(eps)) for row in x.tolist()]
    assert same_bits(rms_norm(x, weight, eps), np.array(expected, np.float32))


def test_rms_norm_of_zeros() -> None:
    x = np.zeros((1, 256), np.float32)
    assert same_bits(rms_norm(x, np.ones(256, np.float32), np.float32(1e-6)), x)


def test_silu_gate(rng: np.random.Generator) -> None:
    g, u = wide(rng, 3000), wide(rng, 3000)
    g[:8] = [0, -0.0, 87, 88, 1000, -87, -1000, -1e30]
    expected = [naive.silu_gate(a, b) for a, b in zip(g.tolist(), u.tolist(), strict=True)]
    assert same_bits(silu_gate(g, u), as_f32(expected))


@pytest.mark.parametrize("head_dim", [2, 64, 128])
def test_rope(head_dim: int, rng: np.random.Generator) -> None:
    x = wide(rng, 3, 2, head_dim)
    angle = rng.uniform(0, 7, (3, head_dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    expected = [
        [naive.rope(head, cos[t].tolist(), sin[t].tolist()) for head in x[t].tolist()]
        for t in range(3)
    ]
    assert same_bits(rope(x, cos, sin), np.array(expected, np.float32))
