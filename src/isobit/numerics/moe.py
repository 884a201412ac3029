"""Router and weighted sum of experts (docs/numerics.md, section 7)."""

import numpy as np
from numpy.typing import NDArray

from isobit.numerics.pointwise import F32, exp, sum256


def top_k(logits: F32, k: int, *, normalise: bool = True) -> tuple[NDArray[np.int32], F32, F32]:
    """Choose k experts from router logits [T, E].

    Returns (ids int32 [T, k] by descending probability, ties to the lower index; weights float32
    [T, k]; probabilities float32 [T, E]).
    """
    e = exp(logits - logits.max(axis=1, keepdims=True))
    p = e / sum256(e)[:, None]
    ids = np.argsort(-p, axis=1, kind="stable")[:, :k].astype(np.int32)
    chosen = np.take_along_axis(p, ids, axis=1)
    if not normalise:
        return ids, chosen, p
    total = np.zeros(len(p), np.float32)
    for rank in range(k):
        total = total + chosen[:, rank]
    return ids, chosen / total[:, None], p


def combine(weights: F32, outputs: F32) -> F32:
    """Add expert outputs [T, k, N] times weights [T, k] in rank order: float32 [T, N]."""
    out = np.zeros((outputs.shape[0], outputs.shape[2]), np.float32)
    for rank in range(outputs.shape[1]):
        out = out + weights[:, rank, None] * outputs[:, rank]
    return out
