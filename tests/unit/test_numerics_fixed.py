"""Fixed point: the split into planes, and quantising at the edges (docs/numerics.md, section 3)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from isobit.numerics import LIMIT, planes_of, quantise, quantise_rows
from tests.helpers import naive
from tests.helpers.passes import same_bits

SMALLEST = np.float32(2.0**-96)
BLOCKS = arrays(
    np.float32,
    st.integers(1, 256),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True),
)
FINITE = arrays(
    np.float32,
    st.integers(1, 256),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
PLANES = st.sampled_from([1, 2])


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_planes_of_every_integer() -> None:
    q = np.arange(-LIMIT[2], LIMIT[2] + 1, dtype=np.int32)
    high, low = planes_of(q, planes=2)
    assert (256 * high + low == q).all()
    for plane in (high, low):
        assert plane.min() >= -128
        assert plane.max() <= 127
    assert [naive.split(n, 2) for n in q.tolist()] == np.stack([high, low], axis=1).tolist()


@given(st.integers(-LIMIT[1], LIMIT[1]))
def test_one_plane_is_the_integer(n: int) -> None:
    (plane,) = planes_of(np.array([n], np.int32), planes=1)
    assert plane.tolist() == [n]


@given(BLOCKS, PLANES)
def test_quantise_is_the_specification(x: np.ndarray, planes: int) -> None:
    q, d = quantise(x, planes)
    expected_q, expected_d = naive.quantise(x.tolist(), planes)
    assert q.dtype == np.int32
    assert q.tolist() == expected_q
    if np.isnan(expected_d):
        assert np.isnan(d)
    else:
        assert same_bits(np.atleast_1d(d), f32(expected_d))


@given(FINITE, PLANES)
def test_quantise_stays_within_its_bounds(x: np.ndarray, planes: int) -> None:
    q, d = quantise(x, planes)
    assert np.abs(q).max() <= LIMIT[planes]
    if np.abs(x).max() >= SMALLEST:
        assert np.abs(q).max() == LIMIT[planes]
        error = np.abs(x.astype(np.float64) - float(d) * q)
        assert error.max() <= float(d) * 0.51  # half a step, and the rounding of 1/L and L/amax


@given(FINITE, PLANES)
def test_quantise_is_odd(x: np.ndarray, planes: int) -> None:
    q, d = quantise(x, planes)
    negated, same = quantise(-x, planes)
    assert (negated == -q).all()
    assert same_bits(np.atleast_1d(same), np.atleast_1d(d))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 100, 255])
def test_a_value_that_is_not_finite_spoils_its_block_alone(
    planes: int, bad: float, place: int, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((3, 256)).astype(np.float32)
    clean_q, clean_d = quantise(x, planes)
    x[1, place] = bad
    q, d = quantise(x, planes)
    assert np.isnan(d).tolist() == [False, True, False]
    assert not q[1].any()
    assert (q[[0, 2]] == clean_q[[0, 2]]).all()
    assert same_bits(d[[0, 2]], clean_d[[0, 2]])


@pytest.mark.parametrize("planes", [1, 2])
def test_the_smallest_block(planes: int) -> None:
    """2^-96 itself counts; what is below it, subnormals and zeros of either sign are zero."""
    below = np.nextafter(SMALLEST, np.float32(0))
    q, d = quantise(f32(SMALLEST, -SMALLEST, 0), planes)
    assert q.tolist() == [LIMIT[planes], -LIMIT[planes], 0]
    assert d > 0
    subnormal = np.uint32(1).view(np.float32)
    for x in (f32(below, -below), f32(subnormal, -subnormal), f32(0, -0.0)):
        q, d = quantise(x, planes)
        assert q.tolist() == [0, 0]
        assert same_bits(np.atleast_1d(d), f32(0))


@pytest.mark.parametrize("planes", [1, 2])
def test_the_largest_block(planes: int) -> None:
    top = np.finfo(np.float32).max
    q, d = quantise(f32(top, -top, top / 2), planes)
    assert q[:2].tolist() == [LIMIT[planes], -LIMIT[planes]]
    assert np.isfinite(d)


@pytest.mark.parametrize("planes", [1, 2])
def test_ties_go_to_even(planes: int) -> None:
    """With amax = L the factor L / amax is 1, so that halves are exact ties."""
    q, _ = quantise(f32(LIMIT[planes], 0.5, 1.5, 2.5, -0.5, -1.5, -2.5), planes)
    assert q.tolist() == [LIMIT[planes], 0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("width", [1, 32, 255, 256, 257, 288, 600])
@pytest.mark.parametrize("planes", [1, 2])
def test_rows_are_cut_into_blocks_of_256(width: int, planes: int, rng: np.random.Generator) -> None:
    x = (rng.standard_normal((3, width)) * 10.0 ** rng.uniform(-3, 3, (3, width))).astype(
        np.float32
    )
    q, d = quantise_rows(x, planes)
    assert q.shape == x.shape
    assert d.shape == (3, -(-width // 256))
    for t in range(3):
        for s in range(d.shape[1]):
            block = slice(256 * s, 256 * (s + 1))
            expected_q, expected_d = naive.quantise(x[t, block].tolist(), planes)
            assert q[t, block].tolist() == expected_q
            assert float(d[t, s]) == expected_d
