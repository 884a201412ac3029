"""What the model tests share: the sample model, its held-out text and the oracle's run over it."""

import pytest

from tests.model.accuracy import SAMPLE, TEXT, tokens_of
from tests.model.oracle import Oracle, OracleRun


@pytest.fixture(scope="session")
def heldout() -> list[int]:
    """4,096 tokens the sample model was not trained on: its whole context."""
    return tokens_of(TEXT)[:4096]


@pytest.fixture(scope="session")
def sample_oracle() -> Oracle:
    return Oracle(SAMPLE)


@pytest.fixture(scope="session")
def heldout_run(sample_oracle: Oracle, heldout: list[int]) -> OracleRun:
    """Its first 1,024 tokens."""
    return sample_oracle.run(heldout[:1024])
