"""Router and weighted sum of experts (docs/numerics.md, section 7)."""

import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32
from isobit.numerics.pointwise import exp, sum256

LEAST_SUM = 2.0**-14
"""What normalised weights are divided by at least; a softmax's never add up to less."""


def top_k(
    z: F32,
    k: int,
    *,
    normalise: bool = True,
    softmax: bool = True,
    bias: F32 | None = None,
    groups: int = 1,
    groups_used: int = 1,
) -> tuple[NDArray[np.int32], F32, F32]:
    """Choose k experts by the softmax of router logits [T, E], or by z as it is; ``bias`` [E] is
    added for the choice alone. Only the best ``groups_used`` of equal groups are chosen from; see
    :func:`best`.

    Returns (ids int32 [T, k], best first, ties to the lower index; weights float32 [T, k];
    probabilities float32 [T, E]).
    """
    p = z
    if softmax:
        e = exp(z - z.max(axis=1, keepdims=True))
        p = e / sum256(e)[:, None]
    ids = best(p if bias is None else p + bias, k, groups, groups_used, alone=softmax)
    chosen = np.take_along_axis(p, ids, axis=1)
    if not normalise:
        return ids, chosen, p
    total = np.zeros(len(p), np.float32)
    for rank in range(k):
        total = total + chosen[:, rank]
    divisor: F32 = np.maximum(total, np.float32(LEAST_SUM))
    return ids, chosen / divisor[:, None], p


def best(
    score: NDArray[np.floating],
    k: int,
    groups: int = 1,
    groups_used: int = 1,
    *,
    alone: bool = False,
) -> NDArray[np.int32]:
    """The k best of scores [T, E], ties to the lower index: ids int32 [T, k]. A group is as good as
    its best score, unless ``alone`` the second added."""
    if groups_used < groups:
        each = score.reshape(len(score), groups, -1)
        two = np.sort(each, axis=2)[..., -2:]
        of_group = two[..., 1] if alone else two[..., 1] + two[..., 0]
        order = np.argsort(-of_group, axis=1, kind="stable")
        left, kept = np.full_like(each, -np.inf), order[:, :groups_used, None]
        np.put_along_axis(left, kept, np.take_along_axis(each, kept, axis=1), axis=1)
        score = left.reshape(score.shape)
    return np.argsort(-score, axis=1, kind="stable")[:, :k].astype(np.int32)


def combine(weights: F32, outputs: F32) -> F32:
    """Add expert outputs [T, k, N] times weights [T, k] in rank order: float32 [T, N]."""
    out = np.zeros((outputs.shape[0], outputs.shape[2]), np.float32)
    for rank in range(outputs.shape[1]):
        out = out + weights[:, rank, None] * outputs[:, rank]
    return out
