"""Items that share a matrix, in groups that one read of its weights is for (batch_matmul.cu)."""

import numpy as np
from numpy.typing import NDArray

GROUPS = 8, 16
"""Items of a group of batch_matmul.cu (COLUMNS of items.cuh): of few tokens, and of more."""


def group_columns(items: float) -> int:
    """Items of a group, where a matrix has so many on average."""
    return next((n for n in GROUPS if items <= n), GROUPS[-1])


def groups_of(tokens: int) -> NDArray[np.int32]:
    """All tokens as groups of items.cuh behind their number, int32 [1 + groups, 4]."""
    columns = group_columns(tokens)
    first = np.arange(0, tokens, columns, dtype=np.int32)
    groups = np.zeros((1 + len(first), 4), np.int32)
    groups[0, 0] = len(first)
    groups[1:, 1], groups[1:, 2] = first, np.minimum(columns, tokens - first)
    return groups
