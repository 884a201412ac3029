"""Prompts beside generations: their share of a step follows from what passes cost."""

import random
from itertools import pairwise

import pytest

from isobit.runtime.pace import Pace


def passes(pace: Pace, cost: tuple[float, float, float], generating: int, prompt: int) -> float:
    """Run a prompt beside generations on a machine of that cost; the longest pass of it."""
    fixed, each, token = cost
    longest = 0.0
    while prompt > 0:
        n = min(pace.beside(generating), prompt)
        seconds = fixed + each * generating + token * n
        pace.ran(generating, n, seconds)
        longest, prompt = max(longest, seconds), prompt - n
    return longest


@pytest.mark.parametrize(
    "cost",
    [(1e-4, 1e-4, 6e-5), (6e-3, 1e-4, 7e-5), (0.04, 0.01, 0.012), (1e-6, 1e-5, 1e-3)],
)
@pytest.mark.parametrize("generating", [1, 3, 8, 64])
def test_a_step_takes_no_half_longer(cost: tuple[float, float, float], generating: int) -> None:
    pace = Pace()
    fixed, each, token = cost
    pace.ran(0, 512, fixed + 512 * token)
    for _ in range(9):
        pace.ran(generating, 0, fixed + each * generating)
    longest = passes(pace, cost, generating, 4096)
    assert longest <= 1.5 * (fixed + each * generating) or longest == pytest.approx(
        fixed + each * generating + token  # one token, the least
    )


def test_it_finds_out_what_it_was_not_told() -> None:
    pace, cost = Pace(), (1e-4, 1e-4, 6e-5)
    assert pace.beside(4) == 2
    for _ in range(9):
        pace.ran(4, 0, 5e-4)
    assert pace.beside(4) == 2
    passes(pace, cost, 4, 4096)
    assert pace.beside(4) == 3  # 0.4 of 500 us, at 60 us each
    pace.ran(64, 25, 6.5e-3 + 25 * 6e-5)  # never without a prompt
    assert 40 <= pace.beside(64) <= 45


def test_a_slow_pass_changes_nothing() -> None:
    pace = Pace()
    for _ in range(5):
        pace.ran(8, 0, 0.01)
        pace.ran(8, 30, 0.013)
    assert pace.beside(8) in {39, 40}
    pace.ran(8, 0, 10.0)
    pace.ran(8, 10, 10.0)
    assert pace.beside(8) in {39, 40}


def test_a_machine_that_becomes_slower_has_the_same_shares() -> None:
    """As where its threads give way to other programs: that is not what prompts cost."""
    pace = Pace()
    for _ in range(50):
        pace.ran(50, 0, 0.01)
        pace.ran(50, 40, 0.014)
    assert pace.beside(50) in {39, 40}
    for n in range(200):
        pace.ran(50 - n % 3, 30 + n % 5, 0.02 + 2e-4 * (n % 5))
    assert pace.beside(50) >= 20


@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0])
def test_many_prompts_do_not_starve(noise: float) -> None:
    """64 streams whose prompts are as long as their answers: most of them generate, always."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng, pace = random.Random(seed), Pace()
    fixed, each, token = 1e-3, 3e-4, 1.2e-4
    left = [[100, 100] for _ in range(64)]  # of each stream: its prompt's tokens, and its answer's
    seen = []
    for _ in range(3000):
        generating = [s for s in left if not s[0]]
        waiting = [s for s in left if s[0]]
        n = room = 512 - len(generating)
        if generating and waiting:
            n = min(room, pace.beside(len(generating), len(waiting)))
        ran = 0
        for stream in waiting:
            some = min(stream[0], n - ran)
            stream[0] -= some
            ran += some
        for stream in generating:
            stream[1] -= 1
            if not stream[1]:
                stream[:] = [rng.randrange(20, 180), rng.randrange(20, 180)]
        seconds = fixed + each * len(generating) + token * ran
        pace.ran(len(generating), ran, seconds * (1 + noise * rng.expovariate(1)))
        seen.append(len(generating))
    assert sum(seen[1000:]) / 2000 > 32


def test_a_token_that_costs_nothing_is_tried_with_care() -> None:
    pace, tried = Pace(), []
    for _ in range(20):
        tried.append(min(pace.beside(32), 512))
        pace.ran(32, tried[-1], 0.008)
    assert tried[0] == 16
    assert tried[-1] == 512
    assert all(b <= 2 * a for a, b in pairwise(tried))
    for _ in range(100):  # it does cost something
        n = pace.beside(32)
        pace.ran(32, n, 0.008 + 1e-4 * n)
    assert pace.beside(32) == pytest.approx(32, abs=2)
