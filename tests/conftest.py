"""Keeps NumPy's BLAS and PyTorch on one thread: small matrices, and machines are shared."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is first imported, below
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from tests.helpers.seed import SEED


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers; a failing test's output shows the seed."""
    print("seed", SEED)
    return np.random.default_rng(SEED)
