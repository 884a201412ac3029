"""RoPE tables against mpmath's arithmetic of many digits (docs/numerics.md, section 8)."""

import mpmath
import numpy as np
import pytest

from isobit.numerics import inverse_frequencies, rope_table
from tests.helpers.passes import same_bits

mpmath.mp.dps = 60

SHAPES = [(128, 1e7), (128, 1e6), (64, 1e6), (64, 10000.0), (6, 500000.0), (2, 10000.0)]


@pytest.mark.parametrize(("head_dim", "base"), SHAPES)
def test_inverse_frequencies_are_correctly_rounded(head_dim: int, base: float) -> None:
    found = inverse_frequencies(head_dim, base)
    exact = [mpmath.power(base, mpmath.mpf(-2 * i) / head_dim) for i in range(head_dim // 2)]
    assert found.tolist() == [float(x) for x in exact]


@pytest.mark.parametrize(("head_dim", "base"), SHAPES)
def test_table_is_correctly_rounded(head_dim: int, base: float, rng: np.random.Generator) -> None:
    """Half a float32 ulp of the cosine of the float64 angle, up to the last position of 2^24."""
    frequencies = inverse_frequencies(head_dim, base)
    positions = [0, 1, 2, 63, 64, 4095, 40959, (1 << 24) - 1]
    positions += rng.integers(0, 1 << 24, 12).tolist()
    for position in positions:
        cos, sin = rope_table(frequencies, position, position + 1)
        for i, frequency in enumerate(frequencies):
            angle = mpmath.mpf(float(np.float64(position) * frequency))
            for found, exact in ((cos[0, i], mpmath.cos(angle)), (sin[0, i], mpmath.sin(angle))):
                ulp = float(np.spacing(np.float32(abs(exact))))
                assert abs(mpmath.mpf(float(found)) - exact) <= 0.500001 * ulp, (position, i)


def test_position_zero_turns_nothing() -> None:
    cos, sin = rope_table(inverse_frequencies(64, 1e6), 0, 1)
    assert same_bits(cos, np.ones((1, 32), np.float32))
    assert same_bits(sin, np.zeros((1, 32), np.float32))


def test_a_part_of_the_table_is_that_part() -> None:
    frequencies = inverse_frequencies(64, 1e6)
    whole, part = rope_table(frequencies, 0, 300), rope_table(frequencies, 123, 200)
    for a, b in zip(whole, part, strict=True):
        assert same_bits(a[123:200], b)
