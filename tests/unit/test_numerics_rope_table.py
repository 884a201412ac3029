"""RoPE tables against mpmath's arithmetic of many digits (docs/numerics.md, section 8)."""

import mpmath
import numpy as np
import pytest

from isobit.config import Metadata
from isobit.model.architectures.scaling import llama3_divisors
from isobit.model.huggingface import MINUS_EXP
from isobit.numerics import inverse_frequencies, rope_table
from tests.helpers import naive
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


def test_table_is_the_specification(rng: np.random.Generator) -> None:
    """Many angles: the last terms of the series are seen in few of them."""
    frequencies = np.sort(rng.uniform(0, 1, 400))
    start = int(rng.integers(0, 1 << 23))
    cos, sin = rope_table(frequencies, start, start + 400)
    expected = [
        [naive.cos_sin(position * f) for f in frequencies.tolist()]
        for position in range(start, start + 400)
    ]
    assert same_bits(cos, np.array(expected, np.float32)[..., 0].copy())
    assert same_bits(sin, np.array(expected, np.float32)[..., 1].copy())


def test_position_zero_turns_nothing() -> None:
    cos, sin = rope_table(inverse_frequencies(64, 1e6), 0, 1)
    assert same_bits(cos, np.ones((1, 32), np.float32))
    assert same_bits(sin, np.zeros((1, 32), np.float32))


def test_a_part_of_the_table_is_that_part() -> None:
    frequencies = inverse_frequencies(64, 1e6)
    whole, part = rope_table(frequencies, 0, 300), rope_table(frequencies, 123, 200)
    for a, b in zip(whole, part, strict=True):
        assert same_bits(a[123:200], b)


def test_llama3s_divisors_are_the_specification(rng: np.random.Generator) -> None:
    base, context = float(rng.uniform(1e4, 1e6)), int(rng.integers(1000, 10000))
    factor, low, high = 8.0, 1.0, 4.0
    config = {
        "rope_type": "llama3",
        "rope_theta": base,
        "num_attention_heads": 2,
        "hidden_size": 256,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    found = llama3_divisors(Metadata(config, "config.json"))["rope_freqs.weight"]
    expected = []
    for i in range(64):
        turns = context * float(mpmath.power(base, mpmath.mpf(-2 * i) / 128)) / float(2 * mpmath.pi)
        e = min(1.0, max(0.0, (turns - low) / (high - low)))
        expected.append(1 / (e + (1 - e) / factor))
    assert found.tolist() == np.array(expected, np.float32).tolist()
    assert found[0] == 1
    assert found[-1] == factor


def test_a_checkpoints_decay_is_correctly_rounded(rng: np.random.Generator) -> None:
    a = np.append(
        rng.normal(0, 3, (2, 49)).astype(np.float32), np.float32([[-np.inf], [np.inf]]), 1
    )
    exact = [-float(mpmath.exp(float(x))) for x in a.reshape(-1)]
    assert same_bits(MINUS_EXP.there(a), np.array(exact, np.float32).reshape(2, 50))
