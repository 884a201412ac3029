"""Attention over fixed-point keys and values against the specification number by number."""

import numpy as np
import pytest

from isobit.numerics import KV_PAGE, attention, attention_softmax, quantise
from tests.helpers import naive
from tests.helpers.passes import i32, same_bits


def both(
    q: np.ndarray,
    positions: list[int],
    k: np.ndarray,
    v: np.ndarray,
    window: int | None = None,
    sink: np.float32 | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    k_int, dk = quantise(k, planes=2)
    v_int, dv = quantise(v, planes=2)
    cache = k_int.astype(np.int16), dk, v_int.astype(np.int16), dv
    found = attention(q, i32(positions), *cache, window, sink)
    expected = [
        naive.attention(
            q[t].tolist(),
            k[: pos + 1].tolist(),
            v[: pos + 1].tolist(),
            max(0, pos + 1 - window) if window else 0,
            None if sink is None else float(sink),
        )
        for t, pos in enumerate(positions)
    ]
    return found, np.array(expected, np.float32)


@pytest.mark.parametrize(
    ("head_dim", "positions"),
    [
        (16, [0]),
        (16, [0, 1, 62, 63, 64, 65, 127, 128, 150]),
        (64, [70]),
        (128, [5, 66]),
        (6, [30, 200]),
    ],
)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_attention(
    head_dim: int, positions: list[int], spread: float, rng: np.random.Generator
) -> None:
    """With a wide spread some weights underflow and the running maximum moves between tiles."""
    n = max(positions) + 1
    q = (spread * rng.standard_normal((len(positions), head_dim))).astype(np.float32)
    k, v = (rng.standard_normal((n, head_dim)).astype(np.float32) for _ in range(2))
    k[n // 2] *= 10
    v *= 10.0 ** rng.uniform(-3, 3, (n, 1)).astype(np.float32)
    assert same_bits(*both(q, positions, k, v))


@pytest.mark.parametrize("window", [1, 2, 30, 64, 65, 100, 128, 500])
@pytest.mark.parametrize("sink", [None, np.float32(-300), np.float32(0.7), np.float32(90)])
def test_windows_and_sinks(window: int, sink: np.float32 | None, rng: np.random.Generator) -> None:
    positions = [0, 1, 63, 64, 65, 127, 128, 200]
    q = rng.standard_normal((len(positions), 6)).astype(np.float32)
    k, v = (rng.standard_normal((201, 6)).astype(np.float32) for _ in range(2))
    assert same_bits(*both(q, positions, k, v, window, sink))
    softmax = attention_softmax(
        rng.standard_normal((8, 201)).astype(np.float32), i32(positions), window, sink
    )
    seen = np.arange(201) <= np.array(positions)[:, None]
    seen &= np.arange(201) > np.array(positions)[:, None] - window
    assert not softmax[~seen].any()
    assert (softmax.sum(axis=1) < 1 + 1e-5).all()
    if sink is None:
        assert (softmax.sum(axis=1) > 1 - 1e-5).all()


def test_zero_keys_and_values(rng: np.random.Generator) -> None:
    q = rng.standard_normal((1, 16)).astype(np.float32)
    k, v = np.zeros((80, 16), np.float32), rng.standard_normal((80, 16)).astype(np.float32)
    assert same_bits(*both(q, [79], k, v))
    assert same_bits(*both(q, [79], v, k))
    assert same_bits(*both(np.zeros_like(q), [79], v, v))


def test_later_keys_are_not_seen(rng: np.random.Generator) -> None:
    """Whatever lies in the cache beyond a query's position, NaN scales included."""
    q, k, v = (rng.standard_normal((n, 32)).astype(np.float32) for n in (1, 100, 100))
    k_int, dk = quantise(k, planes=2)
    v_int, dv = quantise(v, planes=2)
    arguments = (k_int.astype(np.int16), dk, v_int.astype(np.int16), dv)
    for position in (0, 30, 63, 64, 98):
        seen = attention(q, i32([position]), *(a[: position + 1] for a in arguments))
        spoiled = tuple(a.copy() for a in arguments)
        for a in spoiled:
            a[position + 1 :] = 32767 if a.dtype == np.int16 else np.nan
        with np.errstate(invalid="ignore"):
            assert same_bits(attention(q, i32([position]), *spoiled), seen)


def test_weights_add_up(rng: np.random.Generator) -> None:
    """Equal values come back as they are, within the 16 bits of a weight."""
    q, k = (rng.standard_normal((n, 32)).astype(np.float32) for n in (1, 3 * KV_PAGE))
    value = rng.standard_normal(32).astype(np.float32)
    found, _ = both(q, [3 * KV_PAGE - 1], k, np.tile(value, (3 * KV_PAGE, 1)))
    np.testing.assert_allclose(found[0], value, atol=2e-3)
