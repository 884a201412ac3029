"""How many threads a team runs with: what is the fastest, found by trying."""

from collections.abc import Callable

import numpy as np
import pytest

from isobit.backends.cpu._cpu import TeamSize

MS = 1_000_000


class Machine:
    """Runs one after another on a clock of its own, of one unit of work each.

    speed: units a millisecond of so many threads, by the clock in ms; busy: how many of them work.
    """

    def __init__(self, threads: int, speed: Callable[[int, float], float], busy: float = 0.5):
        self.size, self.now, self.speed, self.busy = TeamSize(threads), 0, speed, busy

    def run(self) -> int:
        """One run; with how many it was."""
        members = self.size.members()
        took = int(MS / self.speed(members, self.now / MS))
        self.now += took
        self.size.ran(took, int(self.busy * took * members), 1)
        return members

    def until(self, ms: float) -> list[int]:
        """Runs until then: the threads of each."""
        runs = []
        while self.now < ms * MS:
            runs.append(self.run())
        return runs


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_where_threads_hardly_wait_fewer_are_not_tried_at_first(threads: int) -> None:
    machine = Machine(threads, lambda n, _: 2.0 * n, busy=0.8)
    assert set(machine.until(200)) == {threads}


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_what_is_faster_loses_less_than_a_per_cent(busy: float) -> None:
    machine = Machine(2, lambda n, _: 2.0 + n, busy)
    machine.until(2000)
    assert len(machine.until(12_000)) > 0.99 * 4 * 10_000


def test_threads_that_hinder_each_other_become_fewer_though_none_waits() -> None:
    machine = Machine(2, lambda n, _: 2.2 - 0.2 * n, busy=0.9)
    machine.until(500)
    assert len(machine.until(2500)) > 0.98 * 2 * 2000


def test_a_slow_second_thread_costs_a_few_per_cent_at_first_and_hardly_any_later() -> None:
    """A run is 50 times slower with two threads."""
    machine = Machine(2, lambda n, _: 2.0 if n == 1 else 0.04)
    assert len(machine.until(3000)) > 0.94 * 2 * 3000
    assert len(machine.until(13_000)) > 0.985 * 2 * 10_000


@pytest.mark.parametrize("two", [0.2, 0.5, 0.8, 0.95, 1.6])
def test_beside_others_the_slower_number_is_rare(two: float) -> None:
    """Speeds that swing as they do where threads wait for a processor: a run in three takes up to
    eight times as long."""
    seed = int(np.random.default_rng().integers(1 << 32))
    print("seed", seed)
    rng = np.random.default_rng(seed)

    def speed(threads: int, _: float) -> float:
        slow = rng.uniform(1, 8) if rng.random() < 1 / 3 else 1.0
        return (two if threads == 2 else 1.0) * 2.0 / slow

    machine = Machine(2, speed)
    machine.until(5000)
    runs = machine.until(65_000)
    slower = 1 if two > 1 else 2
    spent = sum(n == slower for n in runs) / len(runs)
    assert spent * abs(1 - min(two, 1 / two)) < 0.03


def test_all_threads_come_back() -> None:
    machine = Machine(4, lambda n, ms: 1.0 / n if ms < 5000 else 1.0 * n)
    assert machine.until(5000)[-1] == 1
    assert machine.until(9000)[-1] == 4


def test_as_many_stay_as_are_the_fastest() -> None:
    """Six processors of eight are free."""
    machine = Machine(8, lambda n, _: float(n) if n <= 6 else 3.0)
    machine.until(2000)
    runs = machine.until(4000)
    assert runs.count(6) > 0.95 * len(runs)


def test_a_moment_of_another_program_is_soon_over() -> None:
    machine, start = Machine(2, lambda n, ms: 1.0 if n == 1 or ms % 1000 < 100 else 2.0), 0
    machine.speed = lambda n, ms: 0.02 if n == 2 and ms % 1000 < 100 else float(n)
    machine.until(500)
    for start in range(1000, 6000, 1000):
        machine.until(start + 90)
        after = machine.until(start + 1000)
        late = next(i for i in range(len(after)) if set(after[i : i + 100]) == {2})
        assert sum(1 / n for n in after[:late]) < 150
