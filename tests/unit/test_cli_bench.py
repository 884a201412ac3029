"""What a bench row means: which tokens are run when, and the arithmetic of the samples."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from isobit.backends.hardware import read_bandwidth
from isobit.bench import Result, Workload, make_tests, measure
from isobit.errors import UsageError


class FakeModel:
    """Writes down what it is asked to run."""

    config = SimpleNamespace(vocab=100)

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    @contextmanager
    def new_sequence(self):
        yield SimpleNamespace(length=0)
        self.calls.append(("close", 0, 0))

    def prefill(self, sequence, ids, progress=None):  # noqa: ARG002
        assert all(0 <= i < 100 for i in ids)
        self.calls.append(("prefill", sequence.length, len(ids)))
        sequence.length += len(ids)

    def step(self, sequence, token):
        assert 0 <= token < 100
        self.calls.append(("step", sequence.length, 1))
        sequence.length += 1


def test_rows_are_every_length_at_every_depth() -> None:
    tests = make_tests([512, 0, 64], [128], [0, 4096])
    assert [t.name for t in tests] == [
        "pp512",
        "pp64",
        "tg128",
        "pp512 @ d4096",
        "pp64 @ d4096",
        "tg128 @ d4096",
    ]
    assert max(t.length for t in tests) == 4096 + 512


def test_rows_of_several_sequences() -> None:
    tests = make_tests([8], [4], [2], [1, 3])
    assert [t.name for t in tests] == ["pp8 @ d2", "tg4 @ d2", "tg4 x 3 @ d2"]
    assert Result(tests[2], [10**9]).samples_ts == [12.0]
    with pytest.raises(UsageError, match="n_sequences"):
        make_tests([8], [4], [2], [0])


@pytest.mark.parametrize("lengths", [([0], [0], [0]), ([-1], [1], [0]), ([1], [1], [1 << 24])])
def test_lengths_out_of_range(lengths: tuple[list[int], list[int], list[int]]) -> None:
    with pytest.raises(UsageError):
        make_tests(*lengths)


def test_a_prompt_is_run_at_its_depth_each_time() -> None:
    model, seen = FakeModel(), []
    result = measure(
        model, Workload(n_prompt=7, n_gen=0, n_depth=5), 2, lambda *run: seen.append(run)
    )
    again = ("prefill", 5, 7)
    assert model.calls == [("prefill", 0, 5), again, again, again, ("close", 0, 0)]
    assert len(result.samples_ns) == 2  # the first is the warm-up
    assert seen == [("pp7 @ d5", 1)] * 3


def test_generation_warms_up_with_one_token() -> None:
    model = FakeModel()
    result = measure(model, Workload(n_prompt=0, n_gen=3, n_depth=0), 2, lambda *_: None)
    run = [("step", 0, 1), ("step", 1, 1), ("step", 2, 1)]
    assert model.calls == [("step", 0, 1), *run, *run, ("close", 0, 0)]
    assert len(result.samples_ns) == 2


def test_rates() -> None:
    result = Result(Workload(10, 0, 4), [1_000_000_000, 2_000_000_000, 500_000_000])
    assert result.samples_ts == [10, 5, 20]
    assert result.avg_ts == pytest.approx(35 / 3)
    assert result.stddev_ts == pytest.approx(7.6376261582597)
    assert result.median_ts == 10
    assert Result(Workload(10, 0, 0), [5]).stddev_ts == 0


def test_read_bandwidth_is_plausible() -> None:
    assert 1e8 < read_bandwidth(1) < 1e13
