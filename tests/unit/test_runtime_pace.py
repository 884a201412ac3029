"""Prompts beside generations: their share of a step follows from what passes cost."""

import pytest

from isobit.runtime.pace import FIRST, Pace


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
    assert pace.beside(4) == FIRST
    for _ in range(9):
        pace.ran(4, 0, 5e-4)
    assert pace.beside(4) == FIRST
    passes(pace, cost, 4, 4096)
    assert pace.beside(4) == 3  # 0.4 of 500 us, at 60 us each
    assert pace.beside(64) == 3  # of so many nothing is known yet
    assert pace.beside(1) == FIRST
    pace.ran(64, 10, 6.5e-3 + 10 * 6e-5)  # never without a prompt
    assert 40 <= pace.beside(64) <= 45


def test_a_slow_pass_changes_nothing() -> None:
    pace = Pace()
    pace.ran(0, 100, 0.01)
    for _ in range(5):
        pace.ran(8, 0, 0.01)
    assert pace.beside(8) == 40
    pace.ran(8, 0, 10.0)
    pace.ran(8, 10, 10.0)
    assert pace.beside(8) == 40
    for _ in range(20):  # a machine that has become slower
        pace.ran(8, 0, 0.02)
    assert pace.beside(8) == 80
