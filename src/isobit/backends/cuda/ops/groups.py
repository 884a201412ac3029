"""Items that share a matrix, in groups that one read of its weights is for (batch_matmul.cu)."""

import numpy as np
from numpy.typing import NDArray

WORDS_OF_GROUP = 4
GROUPS = 8, 16, 32
"""Items of a group (COLUMNS of sorted_pairs.cuh): of few, of more and of many."""
_DENSE = 32, 512
"""Tokens from which a matrix of all of them has the next size of groups …"""
_EXPERTS = 6, 64
"""… and items, on average, from which experts have; as measured (docs/performance.md)."""


_HEAD = _DENSE


def token_columns(tokens: int, *, head: bool = False) -> int:
    """Items of a group of so many tokens."""
    return GROUPS[sum(tokens > n for n in (_HEAD if head else _DENSE))]


def expert_columns(items: float) -> int:
    """Items of a group, where an expert has so many on average."""
    return GROUPS[sum(items > n for n in _EXPERTS)]


def groups_of(tokens: int) -> NDArray[np.int32]:
    """All tokens as groups of sorted_pairs.cuh behind their number, int32 [1 + groups, 4]."""
    columns = token_columns(tokens)
    first = np.arange(0, tokens, columns, dtype=np.int32)
    groups = np.zeros((1 + len(first), 4), np.int32)
    groups[0, 0] = len(first)
    groups[1:, 1], groups[1:, 2] = first, np.minimum(columns, tokens - first)
    return groups


def most_words(tokens: int) -> int:
    """Words that :func:`groups_of` needs for any number of tokens up to this."""
    return max(groups_of(n).size for n in (*(min(tokens, n) for n in _DENSE), tokens))
