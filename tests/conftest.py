"""Keeps NumPy's BLAS on one thread: the tests' matrices are small, and machines are shared."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is first imported, below

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers; a failing test's output shows the seed."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"rng seed {seed}")
    return np.random.default_rng(seed)
