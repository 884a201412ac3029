"""What fixed-point activations may cost, against the float64 oracle over the same weights."""

import numpy as np
import pytest

from tests.helpers import passes
from tests.model import accuracy
from tests.model.accuracy import SAMPLE, Accuracy
from tests.model.oracle import Oracle, OracleRun

TOKENS = {"reference": 512, "cpu": 1024}
"""The reference is slow; its bits are the CPU's, so that the long text counts for both."""


def measured(backend: str, planes: int, oracle: OracleRun) -> Accuracy:
    oracle = oracle.first(TOKENS[backend])
    result = accuracy.measure(SAMPLE, oracle, backend, planes)
    print(f"{backend}, planes {planes}: {result}")
    return result


@pytest.mark.parametrize("backend", passes.BACKENDS)
def test_two_planes_stay_with_the_oracle(backend: str, heldout_run: OracleRun) -> None:
    result = measured(backend, 2, heldout_run)
    assert result.mean_kl <= 1e-4
    assert result.changed_sets <= 0.002
    assert result.top1_kept >= 0.995
    assert abs(result.perplexity_change) <= 0.001


@pytest.mark.parametrize("backend", passes.BACKENDS)
def test_one_plane_is_coarse_but_sane(backend: str, heldout_run: OracleRun) -> None:
    """No promise is made for int8 activations; this catches a wrong plane, not rounding."""
    result = measured(backend, 1, heldout_run)
    assert 1e-4 < result.mean_kl < 1e-2
    assert result.top1_kept > 0.95


def test_the_oracle_knows_the_text(heldout_run: OracleRun) -> None:
    """A yardstick that fits nothing would still be near to a run that fits nothing."""
    result = Accuracy.of(heldout_run, heldout_run.logits, heldout_run.experts)
    assert 5 < result.oracle_perplexity < 12
    assert (result.mean_kl, result.changed_sets, result.top1_kept) == (0, 0, 1)


def test_the_measure_sees_a_small_disturbance(heldout_run: OracleRun) -> None:
    seed = int(np.random.SeedSequence().entropy) % (1 << 32)  # type: ignore[arg-type]
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    part = heldout_run.first(512)
    experts = part.experts.copy()
    experts[:, ::100, 0] = (experts[:, ::100].max(axis=2) + 1) % 16  # some sets, every layer
    noisy = part.logits + 0.05 * rng.standard_normal(part.logits.shape)
    result = Accuracy.of(part, noisy, experts)
    assert result.mean_kl > 1e-4
    assert 0.002 < result.changed_sets <= 6 / 512


def test_the_oracle_does_not_look_ahead(sample_oracle: Oracle, heldout_run: OracleRun) -> None:
    short = sample_oracle.run(heldout_run.ids[:100].tolist())
    np.testing.assert_allclose(short.logits, heldout_run.logits[:100], rtol=0, atol=1e-9)
    assert (short.experts == heldout_run.experts[:, :100]).all()
