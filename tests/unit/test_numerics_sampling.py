"""Section 10 of docs/numerics.md: what is kept, what is drawn, and what adjusts logits."""

import numpy as np
import pytest

from isobit.numerics import exp
from isobit.numerics.sampling import adjust, choose, distribution, draw, random_bits
from tests.helpers import naive
from tests.helpers.passes import same_bits

LAST = 2**64 - 1
FILTERS = [
    {},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.5, "min_p": 0.01},
    {"top_p": 1e-300},
    {"top_k": 10_000, "top_p": 0.999999},
    {"min_p": 1.0},
]


def settings(**chosen: float) -> tuple[float, int, float, float]:
    s: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **chosen}
    return s["temperature"], int(s["top_k"]), s["top_p"], s["min_p"]


def drawn(logits: list[float] | np.ndarray, random: int, **chosen: float) -> int:
    return choose(np.array(logits, np.float32), *settings(**chosen), random)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.3, 1.0, 2.5, 1e6])
@pytest.mark.parametrize("filters", FILTERS)
def test_the_document(
    temperature: float, filters: dict[str, float], rng: np.random.Generator
) -> None:
    logits = (rng.standard_normal(500) * 3).astype(np.float32)
    logits[100:200] = logits.max() - 1  # equals: the lower id first
    logits[rng.integers(0, 500, 20)] = -np.inf  # not allowed
    chosen = settings(temperature=temperature, **filters)
    kept = naive.kept(logits.tolist(), *chosen)
    weights = distribution(logits, *chosen)
    assert {i: w for i, w in kept.items() if w} == {
        int(i): int(weights[i]) for i in np.flatnonzero(weights)
    }
    for random in (0, LAST, *(naive.philox(5, t) for t in range(1, 9))):
        assert choose(logits, *chosen, random) == naive.draw(kept, random)


def test_random_bits_are_philox() -> None:
    for seed in (0, 1, 2**63, LAST):
        for index in (1, 2, 77, 2**40):
            assert random_bits(seed, index) == naive.philox(seed, index)


def test_a_draw_at_the_very_end_is_the_last_kept() -> None:
    for n in (*range(1, 40), 4097, 99_999):
        assert drawn(np.zeros(n), LAST) == n - 1


def test_a_draw_on_a_boundary_is_the_next_token() -> None:
    assert [drawn([0, 0], bits) for bits in (0, 2**63 - 1, 2**63)] == [0, 0, 1]


def test_unlikely_tokens_can_be_drawn() -> None:
    assert drawn([0, -27], LAST) == 1
    assert drawn([0, -28], LAST) == 0  # its weight is below one


def test_the_order_of_ids_does_not_change_what_is_kept(rng: np.random.Generator) -> None:
    logits = (rng.standard_normal(400) * 2).astype(np.float32)
    order = rng.permutation(400)
    weights = distribution(logits, 0.9, 100, 0.9, 0.001)
    moved = distribution(logits[order], 0.9, 100, 0.9, 0.001)
    assert np.array_equal(weights[order], moved)


def test_frequencies_follow_the_probabilities(rng: np.random.Generator) -> None:
    logits = (rng.standard_normal(300) * 3).astype(np.float32)
    weights = distribution(logits, 0.8, 0, 1.0, 0.0)
    p = weights / weights.sum()
    tokens = [draw(weights, random_bits(1, t)) for t in range(1, 4001)]
    counts = np.bincount(tokens, minlength=300)
    top = np.argsort(-p)[:5]
    assert (np.abs(counts[top] / 4000 - p[top]) < 6 * np.sqrt(p[top] * (1 - p[top]) / 4000)).all()


def adjusted(z: list[float], **changed: object) -> np.ndarray:
    n = len(z)
    given = {
        "bias": np.zeros(n, np.float32),
        "occurred": np.zeros(n, np.bool_),
        "generated": np.zeros(n, np.int32),
        "repetition": 1.0,
        "presence": 0.0,
        "frequency": 0.0,
        **changed,
    }
    return adjust(np.array(z, np.float32), **given)  # type: ignore[arg-type]


def test_adjustments_in_their_order() -> None:
    """Bias, repetition, then frequency and presence; each rounded on its own."""
    f = np.float32
    got = adjusted(
        [4.0, -3.0, 2.0, 0.1],
        bias=np.array([0.1, 0.1, 0, 0.1], f),
        occurred=np.array([True, True, False, False]),
        generated=np.array([3, 0, 0, 0], np.int32),
        repetition=1.3,
        presence=0.7,
        frequency=0.3,
    )
    first = ((f(4) + f(0.1)) / f(1.3) - f(0.3) * f(3)) - f(0.7)
    expected = [first, (f(-3) + f(0.1)) * f(1.3), f(2), f(0.1) + f(0.1)]
    assert same_bits(got, np.array(expected, f))


def test_a_bias_comes_before_the_repetition_penalty() -> None:
    occurred = np.array([True])
    got = adjusted([-1.0], bias=np.array([3.0], np.float32), occurred=occurred, repetition=2.0)
    assert got[0] == 1.0


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_penalties_leave_numbers(penalty: float) -> None:
    got = adjusted([3e38, -3e38, 1.0], occurred=np.ones(3, np.bool_), repetition=penalty)
    assert np.isfinite(got).all()
    assert 0 <= drawn(got, 0) < 3


def test_min_p_keeps_what_is_just_as_likely() -> None:
    assert drawn([0, 0, -1e-6], LAST, min_p=1.0) == 1
    p = exp(np.array([-1.5], np.float32))[0]
    assert drawn([0, -1.5], LAST, min_p=float(p)) == 1
    assert drawn([0, -1.5], LAST, min_p=float(np.nextafter(p, np.float32(1)))) == 0
