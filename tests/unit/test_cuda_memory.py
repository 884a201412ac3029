"""The CUDA backend's plan of the device's memory, in numbers; no device needed."""

from types import SimpleNamespace

import pytest

from isobit.backends.cuda import memory
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from tests.helpers.synth import QWEN3_30B_A3B

FILE = 18_556_681_408  # Q4_K_M
CARD = 24_564 << 20  # what a card of 24 GB has


@pytest.fixture
def weights(monkeypatch):
    one = SimpleNamespace(data=SimpleNamespace(nbytes=FILE))
    monkeypatch.setattr(memory, "matrices", lambda _: {"all": one})
    return SimpleNamespace(config=QWEN3_30B_A3B)


def test_30b_with_16k_positions_fits_on_24_gb(weights):
    plan = memory.Plan.of(weights, EngineConfig(context=16384, max_sequences=1))
    assert plan.total <= 0.95 * CARD
    assert plan.weights + plan.workspace <= 1.05 * FILE
    needed = plan.weights + plan.cache + plan.rope + plan.workspace
    plan.check(needed, CARD)
    with pytest.raises(BackendUnavailable):  # what is free counts, not what there is
        plan.check(needed - 1, CARD)


def test_what_does_not_fit_is_refused_with_the_arithmetic(weights):
    plan = memory.Plan.of(weights, EngineConfig(context=40960, max_sequences=8))
    with pytest.raises(BackendUnavailable) as refusal:
        plan.check(25_000_000_000, CARD)
    words = str(refusal.value)
    assert f"= {plan.total / 1e9:.2f} GB" in words
    assert "25.00 of 25.76 GB are free" in words
    assert "a smaller --context or fewer sequences" in words
