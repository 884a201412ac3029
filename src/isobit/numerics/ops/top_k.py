"""Top-k: the experts of a token and their weights (docs/numerics.md, section 7)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.moe import LEAST_SUM, best, top_k
from isobit.numerics.ops.attention import softmax
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require

MOST_GROUPS = 64
"""Groups that backends have room for."""


@dataclass(frozen=True)
class TopK(Operation):
    """Router logits [T, experts], or without ``softmax`` their probabilities: the weights [T, k] of
    the k most likely, and their ids int32 [T, k], in descending order, ties to the lower id;
    ``normalise``: the weights add up to 1.

    The weight [experts], if there is one, is added to the probabilities for the choice alone.
    ``groups``: of experts, in equal numbers; the best ``groups_used`` of them are chosen from. A
    group is as good as its best probability, without ``softmax`` the second added.
    """

    k: int
    normalise: bool
    softmax: bool = True
    groups: int = 1
    groups_used: int = 1
    kind = "top_k"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        (z,) = inputs
        size = z.width
        if self.groups > 1:
            size = z.width // self.groups
            if z.width % self.groups or size < 2 or self.groups > MOST_GROUPS:
                expected = f"up to {MOST_GROUPS} of 2 or more of {z.width} experts"
                raise ValueError(f"expert groups: expected {expected}, got {self.groups}")
            if not 1 <= self.groups_used <= self.groups:
                expected = f"expected 1 to {self.groups}, got {self.groups_used}"
                raise ValueError(f"expert groups used: {expected}")
            size *= self.groups_used
        if self.k > size:
            raise ValueError(f"experts used: expected at most {size}, got {self.k}")
        for w in weights:
            require(f"length of {w.name}", w.shape, z.row)
        ids = Shape((self.k,), z.rows, np.int32, below=z.width)
        return Shape((self.k,), z.rows), ids

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        ids, chosen, _ = top_k(
            inputs[0],
            self.k,
            normalise=self.normalise,
            softmax=self.softmax,
            bias=weights[0].float32() if weights else None,
            groups=self.groups,
            groups_used=self.groups_used,
        )
        return chosen, ids

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        p = inputs[0].astype(np.float64)
        p = softmax(p) if self.softmax else p
        score = p + weights[0].float32() if weights else p
        ids = best(score, self.k, self.groups, self.groups_used, alone=self.softmax)
        chosen = np.take_along_axis(p, ids, axis=1)
        if self.normalise:
            chosen = chosen / np.maximum(chosen.sum(axis=1, keepdims=True), LEAST_SUM)
        return chosen, ids

    @property
    def plain(self) -> bool:
        """Whether it is a softmax of all, without a choice of groups."""
        return self.softmax and self.groups_used == self.groups
