"""Attention over the fixed-point KV cache against the specification, bit for bit."""

import numpy as np
import pytest

from isobit import numerics

from .cases import identical, quantised_heads, values


def run_both(ops, q, positions, *arguments):
    identical(ops.attention(q, positions, *arguments), numerics.attention(q, positions, *arguments))


@pytest.mark.parametrize("head_dim", [2, 6, 64, 100, 128, 256, 512])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_random(ops, head_dim, n, rng):
    cache = (*quantised_heads(rng, n, head_dim), *quantised_heads(rng, n, head_dim))
    positions = np.sort(rng.integers(0, n, 7)).astype(np.int32)
    positions[-1] = n - 1
    q = values(rng, 7, head_dim) / np.float32(1e3)
    q[2] = 0
    run_both(ops, q, positions, *cache)


@pytest.mark.parametrize("window", [None, 1, 33, 64, 100, 300])
@pytest.mark.parametrize("sink", [None, np.float32(-300), np.float32(0.3), np.float32(99)])
def test_windows_and_sinks(ops, window, sink, rng):
    cache = (*quantised_heads(rng, 200, 20), *quantised_heads(rng, 200, 20))
    positions = np.sort(rng.integers(0, 200, 9)).astype(np.int32)
    q = values(rng, 9, 20) / np.float32(1e3)
    run_both(ops, q, positions, *cache, window, sink)


def test_every_position_of_a_tile(ops, rng):
    cache = (*quantised_heads(rng, 130, 32), *quantised_heads(rng, 130, 32))
    q = rng.standard_normal((130, 32)).astype(np.float32)
    run_both(ops, q, np.arange(130, dtype=np.int32), *cache)


@pytest.mark.parametrize("head_dim", [128, 512])
def test_largest_integers(ops, head_dim, rng):
    """q, k, v and the probabilities at their limits: every integer sum still fits."""
    n = 128
    low = np.int16(32384)  # high byte 127, low byte -128
    for k_value in (32639, -32639, low):
        k = np.full((n, head_dim), k_value, np.int16)
        d = np.full(n, 1e-6, np.float32)
        q = np.full((3, head_dim), 2.5, np.float32)
        q[1] = -q[0]
        run_both(ops, q, np.array([0, 63, n - 1], np.int32), k, d, k, d)


def test_zero_scales(ops, rng):
    k, dk = quantised_heads(rng, 70, 64)
    zero = np.zeros(70, np.float32)
    q = rng.standard_normal((2, 64)).astype(np.float32)
    positions = np.array([5, 69], np.int32)
    run_both(ops, q, positions, k, zero, k, dk)
    run_both(ops, q, positions, k, dk, k, zero)
