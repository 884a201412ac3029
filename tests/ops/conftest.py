import numpy as np
import pytest

from .harness import SEED


@pytest.fixture
def rng():
    """Fresh random numbers; ISOBIT_TEST_SEED repeats those of a failed test."""
    print(f"seed {SEED}")
    return np.random.default_rng(SEED)
