"""Distances, margins and histograms on arrays whose figures are known."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from isobit.verify.histogram import Histogram
from isobit.verify.metrics import (
    Distance,
    WorstValue,
    exact,
    kl_divergence,
    router_margin,
    ulp_distance,
)

F32 = np.float32


def distance(a: object, b: object, dtype: type = F32) -> Distance:
    x, y = np.atleast_2d(np.array(a, dtype)), np.atleast_2d(np.array(b, dtype))
    d = Distance()
    d.add(x, y, np.arange(len(x), dtype=np.int32))
    return d


def test_two_values_that_differ_look_different() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    bits = np.random.default_rng(seed).integers(0, 2**32 - 1, 2000, np.uint32)
    near = [0x3CA6DB62, 0, 0x80000000, 0x7F7FFFFE, 0x00000001, 0x7F800000]
    bits = np.concatenate([bits, np.array(near, np.uint32)])
    for a, b in zip(bits.view(np.float32), (bits + np.uint32(1)).view(np.float32), strict=True):
        assert exact(float(a)) != exact(float(b))
        if not np.isnan(a):
            digits, inside = exact(float(a)).split(" ")
            assert np.float32(digits).tobytes() == a.tobytes()
            assert inside == f"(0x{int(a.view(np.uint32)):08x})"
    assert exact(0.1) != exact(float(np.nextafter(0.1, 1)))
    value = WorstValue(3, 7, 1.0, float(np.nextafter(np.float32(1), np.float32(2))))
    assert value.shown() == [
        "3",
        "7",
        "1 (0x3f800000)",
        "1.00000012 (0x3f800001)",
        "1.19e-07 (1 ulp)",
    ]
    assert WorstValue(0, 0, 1e300, -1e300).shown()[2:] == ["1e+300", "-1e+300", "2e+300"]
    assert WorstValue(0, 0, float("inf"), float("nan")).shown()[4] == "nan"


def test_known_figures() -> None:
    d = distance([[3, 4], [0, 0]], [[3, 0], [0, 0]])
    assert (d.values, d.differing, d.first_position, d.max_abs) == (4, 1, 0, 4.0)
    assert d.cosine == pytest.approx(3 / 5)
    assert d.relative_rms == pytest.approx(4 / 3)
    assert [(w.position, w.index, w.a, w.b) for w in d.worst] == [(0, 1, 4.0, 0.0)]


def test_one_ulp_is_not_identical() -> None:
    d = distance([1.0, 2.0], [1.0, np.nextafter(F32(2), F32(3))])
    assert not d.identical
    assert (d.differing, d.max_ulp) == (1, 1)


@pytest.mark.parametrize(
    ("a", "b", "ulp"),
    [
        (0.0, -0.0, 0),
        (1e-45, -1e-45, 2),  # the smallest subnormals on both sides of zero
        (1.0, 1.0, 0),
        (-1.0, 1.0, 2 * 0x3F800000),
        (3.4028235e38, np.inf, 1),
    ],
)
def test_ulp_distance(a: float, b: float, ulp: int) -> None:
    assert ulp_distance(np.array([a], F32), np.array([b], F32)).tolist() == [ulp]


def test_the_sign_of_zero_counts() -> None:
    d = distance([0.0], [-0.0])
    assert (d.identical, d.differing, d.max_ulp, d.cosine) == (False, 1, 0, 1.0)


def test_many_values_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    b = rng.standard_normal((7, 2, 3)).astype(F32)
    a = b + (rng.standard_normal(b.shape) * (rng.random(b.shape) < 0.5)).astype(F32)
    a[3, 1, 2] = np.nan
    whole, kl = distance(a, b), kl_divergence(b[:, 0], b[:, 1])
    monkeypatch.setattr("isobit.verify.metrics._AT_ONCE", 13)  # two rows
    parts = distance(a, b)
    assert (parts.values, parts.differing, parts.max_ulp) == (42, whole.differing, whole.max_ulp)
    assert (parts.first_position, parts.nonfinite_a) == (whole.first_position, 1)
    assert repr(parts.worst) == repr(whole.worst)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.relative_rms == pytest.approx(whole.relative_rms)
    np.testing.assert_allclose(kl_divergence(b[:, 0], b[:, 1]), kl)


def test_nan_and_infinity() -> None:
    d = distance([np.nan, 1.0, np.inf], [np.nan, 2.0, -np.inf])
    assert (d.nonfinite_a, d.nonfinite_b) == (2, 2)
    assert d.differing == 2  # equal NaN bits are equal
    assert d.max_abs == 1.0
    assert d.max_ulp == 1 << 23
    assert math.isinf(d.worst[0].a)


def test_zero_vectors() -> None:
    assert distance([0.0], [0.0]).cosine == 1.0
    assert distance([1.0], [0.0]).cosine is None
    assert distance([1.0], [0.0]).relative_rms is None


def test_without_a_number_there_is_no_figure() -> None:
    d = distance([np.nan, 1.0], [0.5, np.inf])
    assert (d.differing, d.nonfinite_a, d.nonfinite_b) == (2, 1, 1)
    assert d.cosine is d.relative_rms is None


def test_other_types_have_no_ulps() -> None:
    assert distance([1, 2], [1, 3], np.int32).max_ulp is None
    mixed = Distance()
    mixed.add(np.ones((1, 2), F32), np.array([[1.0, 1.5]]), np.zeros(1, np.int32))
    assert (mixed.differing, mixed.max_ulp) == (1, None)


@given(arrays(F32, (6, 3), elements=st.floats(width=32)), st.integers(1, 5))
def test_parts_add_up(a: np.ndarray, cut: int) -> None:
    b = a.copy()
    b[1::2] = np.float32(1)
    positions = np.arange(6, dtype=np.int32)
    whole, parts = Distance(), Distance()
    with np.errstate(all="ignore"):
        whole.add(a, b, positions)
        for rows in (slice(0, cut), slice(cut, 6)):
            parts.add(a[rows], b[rows], positions[rows])
    for name in ("values", "differing", "max_ulp", "max_abs", "nonfinite_a", "first_position"):
        assert getattr(whole, name) == getattr(parts, name), name
    assert (whole.cosine or 0) == pytest.approx(parts.cosine or 0, nan_ok=True)
    assert len(whole.worst) == len(parts.worst) == min(5, whole.differing)


def test_router_margin() -> None:
    p = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert router_margin(np.log(p), 2) == pytest.approx([1 / 3, 0.0])
    assert router_margin(np.log(p), 4).tolist() == [1.0, 1.0]


def test_kl_divergence() -> None:
    p, q = np.array([[0.5, 0.5]]), np.array([[0.75, 0.25]])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert kl_divergence(np.log(p) + 7, np.log(q)) == pytest.approx([expected])
    assert kl_divergence(np.log(p), np.log(p)).tolist() == [0.0]


def test_histogram_counts_every_finite_value() -> None:
    h = Histogram()
    h.add(np.array([0.0, 1.0, 2.0, np.nan]), np.array([0.0, 1.0, 2.5, 0.0]))
    h.add(np.array([100.0]), np.array([-100.0]))  # beyond the first chunk's range
    assert (h.low, h.high) == (0.0, 2.5)
    assert sum(h.a) == sum(h.b) == 4
    assert h.a[-1] == 1
    assert h.b[0] == 2
    assert sum(h.difference) == 2
