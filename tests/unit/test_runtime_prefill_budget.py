"""Prompts beside generations: their share of a step follows from what passes cost."""

import random
from bisect import bisect_left
from itertools import pairwise

import pytest

from isobit.runtime.prefill_budget import PrefillBudget

Cost = tuple[float, float, float, float]
"""Seconds of a pass, of a generation in it, of a token, of a position that a token attends to."""


class Machine:
    """Runs passes at such costs. Bounds on what noise does hold for most seeds: these are given."""

    def __init__(self, cost: Cost, noise: float = 0.0, seed: int = 0) -> None:
        self.pace, self.cost, self.noise = PrefillBudget(), cost, noise
        self.rng = random.Random(seed)

    def run(self, generating: int, prompt: int, attended: int) -> float:
        """A pass; its seconds."""
        fixed, each, token, attending = self.cost
        seconds = fixed + each * generating + token * prompt + attending * attended
        seconds *= 1 + self.noise * self.rng.expovariate(1)
        self.pace.ran(generating, prompt, attended, seconds)
        return seconds

    def read(self, prompt: int, generating: int) -> list[float]:
        """Run a prompt beside generations, which are at position 500: for each pass, how much
        longer it took than without."""
        found, done, among = [], 0, 500 * generating
        while done < prompt:
            n = min(self.pace.tokens(generating, among, 1, prompt - done, done), prompt - done)
            seconds = self.run(generating, n, among + n * (done + (n + 1) // 2))
            done += n
            fixed, each, token, attending = self.cost
            step = fixed + each * generating + attending * among
            least = step + token + attending * done
            found.append(seconds / max(step, least / 1.5))  # one token is the least
        return found


@pytest.mark.parametrize(
    "cost",
    [
        (1e-4, 1e-4, 6e-5, 0),
        (6e-3, 1e-4, 7e-5, 0),
        (0.04, 0.01, 0.012, 1e-7),
        (1e-6, 1e-5, 1e-3, 0),
        (2e-4, 2.5e-4, 1.6e-4, 3e-7),
    ],
)
@pytest.mark.parametrize("generating", [1, 3, 8, 64])
@pytest.mark.parametrize("noise", [0, 0.1])
def test_a_step_takes_no_half_longer(cost: Cost, generating: int, noise: float) -> None:
    machine = Machine(cost, noise)
    machine.run(0, 512, 512 * 256)
    for _ in range(9):
        machine.run(generating, 0, 500 * generating)
    found = sorted(machine.read(1024, generating))
    assert found[int((0.5 if noise else 0.95) * len(found))] <= 1.52 * (1 + 2 * noise)


@pytest.mark.parametrize("noise", [0, 0.1])
def test_where_a_token_is_too_dear_pieces_are_rare(noise: float) -> None:
    """A token of a prompt costs as much as a step of one, and a tenth of it in a pass of many."""
    pace, rng = PrefillBudget(), random.Random(3)
    step = 1e-3

    def run(generating: int, n: int) -> float:
        seconds = step * (generating + (n if n < 10 else 9 + n / 10))
        seconds *= 1 + noise * rng.expovariate(1)
        pace.ran(generating, n, 0, seconds)
        return seconds

    def read(prompt: int) -> list[float]:
        for _ in range(300):
            run(1, 0)
        found, done = list[float](), 0
        while done < prompt:
            n = pace.tokens(1, 0, 1, prompt - done, done)
            found.append(run(1, n) / step)
            done += n
            assert len(found) < 10 * prompt
        return found

    run(0, 512)
    found = read(4096)
    assert len(read(64)) < 10  # nothing waits that comes after a while
    assert sum(ratio > 1.5 * (1 + 5 * noise) for ratio in found) < 0.01 * len(found)
    assert sum(found) - len(found) < (0.5 + noise) * (len(found) + 300)
    assert any(pace.tokens(8, 0, 1, 4096, 0) for _ in range(8))  # among more it is not too dear


SIZES = 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512
MS = 2.8, 3.7, 5.0, 5.9, 6.8, 7.7, 8.7, 10.8, 12.8, 16.1, 19.4, 26.0, 32.0
"""What an H200 takes for passes of so many tokens, each sent to one expert in 16."""
FEW_MS = 1.3, 2.1, 3.2
"""For steps of one to three."""


class Padded:
    """Runs passes on such a device."""

    def __init__(self, generating: int, *, steady: bool = False) -> None:
        self.pace, self.generating = PrefillBudget(SIZES), generating
        self.pace.steady = steady
        for _ in range(3):
            self.own = self.run(512, 0) / 512
        self.step = self.run(0)

    def run(self, prompt: int, generating: int | None = None) -> float:
        among = self.generating if generating is None else generating
        alone = not prompt and among <= len(FEW_MS)
        ms = FEW_MS[among - 1] if alone else MS[bisect_left(SIZES, among + prompt)]
        self.pace.ran(among, prompt, 0, ms / 1e3)
        return ms

    def next(self, prompts: int, left: int, position: int = 0) -> tuple[int, float]:
        """Tokens of prompts in the next pass, and its milliseconds."""
        n = min(self.pace.tokens(self.generating, 0, prompts, left, position), left)
        return n, self.run(n)


@pytest.mark.parametrize("generating", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize(("prompts", "left"), [(1, 512), (2, 8000)])
def test_a_gpu_reads_no_prompts_in_crumbs(generating: int, prompts: int, left: int) -> None:
    """A token costs little more than in a pass of its own; steady, a step takes no half longer
    however many prompts wait. Passes are full."""
    device = Padded(generating)
    took = [device.next(prompts, left) for _ in range(80)][40:]
    assert all(not n or generating + n in SIZES for n, _ in took)
    assert all(ms - device.step <= 1.25 * device.own * n for n, ms in took)
    device = Padded(generating, steady=True)
    took = [device.next(prompts, left) for _ in range(80)][40:]
    assert sum(ms > 1.5 * device.step for _, ms in took) <= 1


@pytest.mark.parametrize("generating", [1, 2, 3, 4, 7, 8, 9, 16, 31, 32, 64, 128])
def test_a_gpu_reads_a_long_prompt_beside_even_streams(generating: int) -> None:
    """The second of two of 4,096 tokens, as on the first it learns: one step in a hundred takes
    half as long again, and it is read in the seconds that so small steps allow."""
    device = Padded(generating)
    for _ in range(2):
        took, left = list[float](), 4096
        while left:
            n, ms = device.next(1, left, 4096 - left)
            took.append(ms)
            left -= n
    slow = sum(ms > 1.5 * device.step for ms in took)
    assert slow <= 0.01 * len(took)
    assert sum(took) < (3000 if generating in {8, 32} else 6000)


def test_a_gpu_whose_steps_become_longer() -> None:
    """As contexts grow: sizes that it had tried before cost more now, too."""
    device = Padded(8)
    for _ in range(100):
        device.next(1, 4096)
    slow = 0
    for i in range(600):
        more = min(0.02 * i, 6)
        n = device.pace.tokens(8, 0, 1, 4096, 0)
        ms = more + MS[bisect_left(SIZES, 8 + n)]
        device.pace.ran(8, n, 0, ms / 1e3)
        slow += ms > 1.5 * (more + device.step)
    assert slow <= 6
    assert n in {0, 40}


def test_a_piece_whose_prompt_left_is_not_waited_for() -> None:
    device = Padded(1)
    n = 0
    while n < 100:
        assert not device.pace.piece_comes
        n = device.pace.tokens(1, 0, 1, 4096, 0)
        if n < 100:
            device.run(n)
    assert device.pace.piece_comes
    device.run(0)
    device.run(0)
    assert not device.pace.piece_comes


def test_a_short_prompt_that_ends_where_a_long_one_did() -> None:
    device = Padded(8)
    left = 4096
    while left:
        n, _ = device.next(1, left, 4096 - left)
        left -= n
    device.run(0)
    read = 0
    for _ in range(8):
        read += device.next(1, 300 - read, 3796 + read)[0] if read < 300 else 0
    assert read == 300


def test_it_finds_out_what_it_was_not_told() -> None:
    machine = Machine((1e-4, 1e-4, 6e-5, 0))
    pace = machine.pace
    assert pace.tokens(4, 0, 1, 4096, 0) == 2
    for _ in range(9):
        machine.run(4, 0, 0)
    assert pace.tokens(4, 0, 1, 4096, 0) == 2
    machine.read(4096, 4)
    machine.run(4, 0, 0)
    assert pace.tokens(4, 2000, 1, 4096, 0) in {3, 4}  # 0.45 of 500 us, at 60 us each
    machine.run(64, 25, 0)  # never without a prompt
    assert 44 <= pace.tokens(64, 0, 1, 4096, 0) <= 52


def test_a_slow_pass_changes_nothing() -> None:
    pace = PrefillBudget()
    for _ in range(5):
        pace.ran(8, 0, 0, 0.01)
        pace.ran(8, 30, 0, 0.013)
    assert pace.tokens(8, 0, 1, 4096, 0) in {43, 44, 45}
    pace.ran(8, 0, 0, 10.0)
    pace.ran(8, 10, 0, 10.0)
    assert pace.tokens(8, 0, 1, 4096, 0) in {43, 44, 45}


def test_a_machine_that_becomes_slower_has_the_same_shares() -> None:
    """As where its threads give way to other programs: that is not what prompts cost."""
    pace = PrefillBudget()
    for _ in range(50):
        pace.ran(50, 0, 0, 0.01)
        pace.ran(50, 40, 0, 0.014)
    assert pace.tokens(50, 0, 1, 4096, 0) in {43, 44, 45}
    for n in range(200):
        pace.ran(50 - n % 3, 30 + n % 5, 0, 0.02 + 2e-4 * (n % 5))
    pace.ran(50, 0, 0, 0.014)
    assert pace.tokens(50, 0, 1, 4096, 0) >= 20


def test_what_a_step_costs_alone_is_seen_while_a_prompt_is_read() -> None:
    machine = Machine((1e-4, 1e-4, 6e-5, 0))
    for _ in range(9):
        machine.run(4, 0, 0)
    beside = []
    for _ in range(64):
        beside.append(machine.pace.tokens(4, 2000, 1, 4096, 0))
        machine.run(4, beside[-1], 2000)
    assert beside.count(0) == 8
    assert all(0 in beside[i : i + 8] for i in range(56))


@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0])
def test_many_prompts_do_not_starve(noise: float) -> None:
    """64 streams whose prompts are as long as their answers: most of them generate, always."""
    machine = Machine((1e-3, 3e-4, 1.2e-4, 0), noise)
    rng, pace = machine.rng, machine.pace
    left = [[100, 100] for _ in range(64)]  # of each stream: its prompt's tokens, and its answer's
    seen = []
    for _ in range(3000):
        generating = [s for s in left if not s[0]]
        waiting = [s for s in left if s[0]]
        n = room = 512 - len(generating)
        if generating and waiting:
            n = min(
                room, pace.tokens(len(generating), 0, len(waiting), sum(s[0] for s in waiting), 0)
            )
        ran = 0
        for stream in waiting:
            some = min(stream[0], n - ran)
            stream[0] -= some
            ran += some
        for stream in generating:
            stream[1] -= 1
            if not stream[1]:
                stream[:] = [rng.randrange(20, 180), rng.randrange(20, 180)]
        machine.run(len(generating), ran, 0)
        seen.append(len(generating))
    assert sum(seen[1000:]) / 2000 > 32


def test_a_token_that_costs_nothing_is_tried_with_care() -> None:
    pace, tried = PrefillBudget(), []
    for _ in range(20):
        if n := min(pace.tokens(32, 0, 1, 4096, 0), 512):
            tried.append(n)
        pace.ran(32, n, 0, 0.008)
    assert tried[0] == 16
    assert tried[-1] == 512
    assert all(b <= 2 * a for a, b in pairwise(tried))
    for _ in range(100):  # it does cost something
        n = pace.tokens(32, 0, 1, 4096, 0)
        pace.ran(32, n, 0, 0.008 + 1e-4 * n)
    pace.ran(32, 0, 0, 0.008)
    assert pace.tokens(32, 0, 1, 4096, 0) == pytest.approx(36, abs=2)


def test_tokens_that_were_slow_by_chance_run_beside_steps_after_all() -> None:
    pace, ran = PrefillBudget((8, 16, 512)), 0
    cost = {0: 3.8e-3, 8: 4.9e-3, 504: 44e-3}
    for _ in range(6000):
        n = pace.tokens(8, 0, 1, 1 << 20, 0)
        n = min(k for k in cost if k >= n)
        ran += n == 8
        slow = 1.6 if n == 8 and ran <= 2 else 1
        pace.ran(8, n, 0, slow * cost[n])
    assert ran > 500
    for _ in range(20):  # steps that took as long now and then do not hide what they take mostly
        pace.ran(8, 0, 0, 3.8e-3)
        pace.ran(8, 8, 0, 4.9e-3)
    for _ in range(2):
        pace.ran(8, 8, 0, 9e-3)
    assert {8} <= {pace.tokens(8, 0, 1, 1 << 20, 0) for _ in range(2)} <= {0, 8}
