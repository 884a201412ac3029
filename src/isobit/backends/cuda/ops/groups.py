"""Pairs that share a matrix, in groups that one read of its weights is for (batch_matmul.cu)."""

GROUPS = 8, 16, 32
"""Pairs of a group (COLUMNS of sorted_pairs.cuh): of few, of more and of many."""
_DENSE, _HEAD = (32, 256), (8, 16)
"""Tokens from which a matrix of all of them has the next size of groups, rows from which the output
matrix has …"""
_EXPERTS, _PROMPTS_EXPERTS = (6, 64), (6, 24)
"""… and pairs, on average, from which experts have, the latter in prompts on Hopper; as measured
(docs/performance.md)."""


def token_columns(tokens: int, *, head: bool = False) -> int:
    """Pairs of a group of so many tokens."""
    return GROUPS[sum(tokens > n for n in (_HEAD if head else _DENSE))]


def expert_columns(pairs: float, *, prompts: bool) -> int:
    """Pairs of a group, where an expert has so many on average."""
    return GROUPS[sum(pairs > n for n in (_PROMPTS_EXPERTS if prompts else _EXPERTS))]
