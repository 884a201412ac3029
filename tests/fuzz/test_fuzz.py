"""A short run of every target; ``python -m tests.fuzz`` is the long one."""

import random

import pytest

from tests.fuzz import harness
from tests.fuzz.targets import TARGETS

SECONDS = 1.0  # for each target, beside that in which its process starts


@pytest.mark.parametrize("target", TARGETS)
def test_a_few_hostile_inputs(target: str) -> None:
    seed = random.randrange(2**32)
    result = harness.run(target, seed, 10_000, seconds=SECONDS, patience=120)
    print(result)
    assert not result.faults, str(result)
    assert result.inputs


@pytest.mark.parametrize("kind", ["exception", "crash", "hang", "memory"])
def test_the_harness_sees_what_it_is_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUZZ_PLANTED", kind)
    result = harness.run("planted", 1, 4, patience=1 if kind == "hang" else 60)
    assert {fault.kind for fault in result.faults} == {kind}, str(result)
    assert result.outcomes["good"], "it goes on after a fault"
    assert f"--first {result.faults[0].index} " in str(result)
