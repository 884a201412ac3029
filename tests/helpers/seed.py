"""What the random numbers of a run of the tests begin with; what fails prints it."""

import os

import numpy as np

SEED = int(os.environ.get("ISOBIT_TEST_SEED", np.random.SeedSequence().entropy % (1 << 32)))
"""ISOBIT_TEST_SEED repeats that of a failed test."""
