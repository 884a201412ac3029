"""Top-k: the experts of a token and their weights (docs/numerics.md, section 7)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.moe import top_k
from isobit.numerics.ops.attention import softmax
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape


@dataclass(frozen=True)
class TopK(Operation):
    """Router logits [T, experts]: the weights [T, k] of the k likeliest, and their ids int32
    [T, k], in descending order, ties to the lower id; ``normalise``: the weights add up to 1."""

    k: int
    normalise: bool
    kind = "top_k"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        (z,) = inputs
        if self.k > z.width:
            raise ValueError(f"experts used: expected at most {z.width}, got {self.k}")
        ids = Shape((self.k,), z.rows, np.int32, below=z.width)
        return Shape((self.k,), z.rows), ids

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        ids, chosen, _ = top_k(inputs[0], self.k, normalise=self.normalise)
        return chosen, ids

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        p = softmax(inputs[0].astype(np.float64))
        ids = np.argsort(-p, axis=1, kind="stable")[:, : self.k].astype(np.int32)
        chosen = np.take_along_axis(p, ids, axis=1)
        if self.normalise:
            chosen = chosen / chosen.sum(axis=1, keepdims=True)
        return chosen, ids
