"""Gated delta rule: linear attention whose state decays and is corrected token by token
(docs/numerics.md, section 12; Yang et al., Gated Delta Networks, 2024); without the correction, the
scan of Mamba-2 (Dao and Gu, 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require
from isobit.numerics.pointwise import exp, tree


@dataclass(frozen=True)
class GatedDelta(Operation):
    """q and k [T, key heads, size], v [T, heads, size of v], beta and g [T, heads]: [T, heads, size
    of v]. Value head h reads key head h mod key heads; ``grouped``: h div (heads / key heads).

    For each head a state S [size, size of v], zero at the start; for each token in order

        S = exp(g) S;  d = (v - Sᵀk) beta;  S = S + k dᵀ;  o = Sᵀq

    ``corrects``: if not, d = v beta.
    """

    grouped: bool = False
    corrects: bool = True
    kind = "gated_delta"
    per_sequence = True

    def together(self, key_heads: int, heads: int) -> int:
        """How many value heads, one behind the other, read the same key head: value head h reads
        key head (h div that) mod key heads."""
        return heads // key_heads if self.grouped else 1

    def _key_heads(self, key_heads: int, heads: int) -> Array:
        return np.arange(heads) // self.together(key_heads, heads) % key_heads

    def state(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        k, v = inputs[1], inputs[2]
        return (Shape((v.row[0], k.row[1], v.row[1])),)

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        q, k, v, beta, g = inputs
        require("the keys", k.row, q.row)
        require("beta and g", (beta.width, g.width), (v.row[0], v.row[0]))
        if v.row[0] % k.row[0] or k.row[1] & (k.row[1] - 1):
            raise ValueError(f"key heads {k.row}: expected a divisor of {v.row[0]}, a power of two")
        return (Shape(v.row, q.rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        q, k, v, beta, g, state = inputs
        keep = exp(g)
        s = state.copy()  # [heads, size, size of v]
        of = self._key_heads(k.shape[1], v.shape[1])
        out = np.empty_like(v)
        for t in range(len(v)):
            kt, qt = k[t, of][:, :, None], q[t, of][:, :, None]
            s = s * keep[t][:, None, None]
            held = tree((s * kt).swapaxes(1, 2)) if self.corrects else np.float32(0)
            d = (v[t] - held) * beta[t][:, None]
            s = s + kt * d[:, None, :]
            out[t] = tree((s * qt).swapaxes(1, 2))
        return out, s

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        q, k, v, beta, g, s = (x.astype(np.float64) for x in inputs)
        of = self._key_heads(k.shape[1], v.shape[1])
        out = np.empty(v.shape)
        for t in range(len(v)):
            s = s * np.exp(g[t])[:, None, None]
            held = np.einsum("hij,hi->hj", s, k[t, of]) if self.corrects else 0
            d = (v[t] - held) * beta[t][:, None]
            s = s + k[t, of][:, :, None] * d[:, None, :]
            out[t] = np.einsum("hij,hi->hj", s, q[t, of])
        return out, s
