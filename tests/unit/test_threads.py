"""How many threads a team runs with: fewer while they wait for one another, all again later."""

import pytest

from isobit.backends.cpu._cpu import TeamSize

MS = 1_000_000


class Machine:
    """Runs one after another on a clock of its own."""

    def __init__(self, threads: int) -> None:
        self.pace, self.now = TeamSize(threads), 0

    def run(self, took: int, lost: float) -> int:
        """One run, of whose time the threads waited this share; with how many it was."""
        members = self.pace.members(self.now)
        self.now += took
        self.pace.ran(self.now, took, int(lost * took * (members - 1)))
        return members


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_what_waits_little_keeps_all(threads: int) -> None:
    machine = Machine(threads)
    assert {machine.run(MS // 5, 0.2) for _ in range(1000)} == {threads}


def test_one_hiccup_changes_nothing() -> None:
    machine = Machine(2)
    runs = [machine.run(3 * MS, 0.99), *(machine.run(MS // 5, 0) for _ in range(100))]
    assert set(runs) == {2}


def test_long_waits_leave_one_thread_and_cost_a_few_per_cent() -> None:
    """A run is 50 times slower with two threads: over ten seconds that must hardly be felt."""
    machine, alone, runs = Machine(2), MS // 2, 0
    while machine.now < 10_000 * MS:
        two = machine.pace.members(machine.now) == 2
        machine.run(50 * alone if two else alone, 0.98 if two else 0)
        runs += 1
    assert runs * alone > 0.97 * machine.now


def test_all_threads_come_back() -> None:
    machine = Machine(4)
    while machine.run(MS, 0.9) == 4:
        pass
    assert machine.pace.members(machine.now) == 1
    late = machine.now + 500 * MS
    while machine.now < late:
        machine.run(MS, 0)
    assert machine.run(MS, 0) == 4


def test_as_many_stay_as_do_not_wait() -> None:
    machine = Machine(8)
    for _ in range(12):
        machine.run(MS, 0.3)
    assert machine.pace.members(machine.now) == 5


def test_a_moment_of_another_program_is_soon_over() -> None:
    machine = Machine(2)
    for _ in range(10):  # as a server's client takes a core after every few passes
        assert machine.run(20 * MS, 0.9) == 2
        late = machine.now + 20 * MS
        while machine.now < late:
            assert machine.run(10 * MS, 0) == 1
        assert {machine.run(10 * MS, 0) for _ in range(5)} == {2}
