"""Choosing tokens: greedy, ties, filters, seeds, and the settings that are refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from isobit.errors import UsageError
from isobit.numerics import exp
from isobit.runtime.sampler import Sampler, Sampling

SEED = int(np.random.SeedSequence().entropy % (1 << 32))


@pytest.fixture
def logits() -> np.ndarray:
    print("seed", SEED)
    return (np.random.default_rng(SEED).standard_normal(500) * 3).astype(np.float32)


def draws(sampling: Sampling, logits: np.ndarray, n: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.array([sampler.choose(logits, []) for _ in range(n)])


def by_the_document(s: Sampling, logits: np.ndarray, history: list[int], bits: int) -> int:
    """Section 10 of docs/numerics.md, step by step."""
    z = [np.float32(v) for v in logits]
    for i in set(history):
        penalty = np.float32(s.repeat_penalty)
        z[i] = z[i] / penalty if z[i] > 0 else z[i] * penalty
    top = max(z)
    if s.temperature == 0:
        return z.index(top)
    x = [(v - top) / np.float32(s.temperature) for v in z]
    ids = sorted((i for i in range(len(x)) if x[i] >= -40), key=lambda i: (-x[i], i))
    ids = ids[: s.top_k or None]
    p = exp(np.array([x[i] for i in ids])).astype(np.float64).tolist()
    sums, total = [], 0.0
    for value in p:
        total += value
        sums.append(total)
    last = next(i for i in range(len(p)) if sums[i] >= s.top_p * total)
    last = max(i for i in range(last + 1) if p[i] >= s.min_p)
    u = (bits >> 11) * 2.0**-53
    return ids[next(i for i in range(last + 1) if sums[i] > u * sums[last])]


def drawn(logits: list[float] | np.ndarray, bits: int, **settings: float) -> int:
    """The token that 64 given random bits draw."""
    sampler = Sampler(Sampling(temperature=1.0, **settings))  # type: ignore[arg-type]
    sampler._random = SimpleNamespace(random_raw=lambda: bits)  # type: ignore[assignment]
    return sampler.choose(np.array(logits, np.float32), [])


LAST = 2**64 - 1


def test_a_draw_at_the_very_end_is_the_last_kept() -> None:
    for n in (*range(1, 40), 4097, 8191, 99999):
        assert drawn(np.zeros(n), LAST) == n - 1


def test_a_draw_on_a_boundary_is_the_next_token() -> None:
    assert [drawn([0, 0], bits) for bits in (0, 2**63 - 1, 2**63)] == [0, 0, 1]


def test_unlikely_tokens_can_be_drawn() -> None:
    assert drawn([0, -35], LAST) == 1


def test_min_p_keeps_what_is_just_as_likely() -> None:
    assert drawn([0, 0, -1e-6], LAST, min_p=1.0) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("repeat_penalty", [1.0, 1.3])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05, "top_k": 40}]
)
def test_the_document(
    logits: np.ndarray, temperature: float, repeat_penalty: float, filters: dict[str, float]
) -> None:
    settings = Sampling(temperature, repeat_penalty=repeat_penalty, seed=SEED, **filters)  # type: ignore[arg-type]
    sampler, random = Sampler(settings), np.random.Philox(SEED)
    history = np.argsort(-logits)[:5].tolist()
    logits[100:200] = np.float32(2.5)  # equals: the lower id first
    for _ in range(20):
        expected = by_the_document(settings, logits, history, int(random.random_raw()))
        assert sampler.choose(logits, history) == expected


def test_greedy_takes_the_lowest_of_equals(logits: np.ndarray) -> None:
    logits[[7, 3, 400]] = 50
    assert Sampler(Sampling()).choose(logits, []) == 3


def test_a_seed_repeats_itself_and_others_differ(logits: np.ndarray) -> None:
    first = draws(Sampling(temperature=1.0, seed=5), logits, 100)
    assert np.array_equal(first, draws(Sampling(temperature=1.0, seed=5), logits, 100))
    assert not np.array_equal(first, draws(Sampling(temperature=1.0, seed=6), logits, 100))


def test_frequencies_follow_the_probabilities(logits: np.ndarray) -> None:
    for temperature in (0.5, 1.0, 2.0):
        p = exp((logits - logits.max()) / np.float32(temperature)).astype(np.float64)
        p /= p.sum()
        counts = np.bincount(
            draws(Sampling(temperature=temperature, seed=1), logits), minlength=500
        )
        top = np.argsort(-p)[:5]
        error = np.sqrt(p[top] * (1 - p[top]) / 4000)
        assert (np.abs(counts[top] / 4000 - p[top]) < 6 * error).all()


def test_filters_keep_what_they_say(logits: np.ndarray) -> None:
    order = np.argsort(-logits, kind="stable")
    p = exp(logits - logits.max()).astype(np.float64)
    assert set(draws(Sampling(temperature=1.0, top_k=3, seed=2), logits)) <= set(order[:3])
    sums = np.cumsum(p[order]) / p.sum()
    nucleus = set(order[: int(np.searchsorted(sums, 0.5)) + 1])
    assert set(draws(Sampling(temperature=1.0, top_p=0.5, seed=2), logits)) <= nucleus
    likely = set(np.flatnonzero(p >= 0.3))
    assert set(draws(Sampling(temperature=1.0, min_p=0.3, seed=2), logits)) <= likely
    only = Sampling(temperature=1.0, top_k=1000, top_p=1e-9, seed=2)
    assert set(draws(only, logits, 50)) == {order[0]}


def test_the_first_of_equals_is_kept_by_top_k() -> None:
    flat = np.zeros(20, np.float32)
    assert set(draws(Sampling(temperature=1.0, top_k=4, seed=3), flat, 400)) == {0, 1, 2, 3}


def test_repeat_penalty_divides_and_multiplies() -> None:
    logits = np.array([4.0, 3.0, -1.0], np.float32)
    assert Sampler(Sampling(repeat_penalty=2.0)).choose(logits, [0]) == 1
    negative = np.array([-1.0, -1.5], np.float32)
    assert Sampler(Sampling(repeat_penalty=2.0)).choose(negative, [0]) == 1
    assert logits[0] == 4.0  # the caller's array is left alone


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_penalties_leave_numbers(penalty: float) -> None:
    logits = np.array([3e38, -3e38, 1.0], np.float32)
    for temperature in (0.0, 1.0):
        sampler = Sampler(Sampling(temperature, repeat_penalty=penalty, seed=0))
        assert 0 <= sampler.choose(logits, [0, 1]) < 3


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_draw_something(logits: np.ndarray, temperature: float) -> None:
    assert 0 <= draws(Sampling(temperature=temperature, seed=0), logits, 1)[0] < 500


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": 1e-300},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": 2.5},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": 1e-50},
        {"seed": 1.5},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]
