"""Keeps NumPy's BLAS on one thread: the tests' matrices are small, and machines are shared."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is first imported, below
