"""What the benchmarks of the GPU backends run."""

import numpy as np

from isobit.backends.base import Batch


def batch(tokens, start, pages, rows=()):
    """Tokens of one sequence from position ``start`` on, with the logits of ``rows``."""
    n = len(tokens)
    return Batch(
        np.array(tokens, np.int32),
        np.arange(start, start + n, dtype=np.int32),
        np.zeros(n, np.int32),
        pages,
        np.array(rows, np.int32),
    )
