"""The reference backend's KV cache: pages of quantised head vectors, in a dictionary."""

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import F32, I32, Batch
from isobit.numerics import TILE, quantise


class _Page:
    def __init__(self, heads: int, head_dim: int) -> None:
        self.k = np.zeros((heads, TILE, head_dim), np.int16)
        self.v = np.zeros((heads, TILE, head_dim), np.int16)
        self.dk = np.zeros((heads, TILE), np.float32)
        self.dv = np.zeros((heads, TILE), np.float32)


class Cache:
    """Keys and values of one layer, page by page."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self._shape = (heads, head_dim)
        self._pages: dict[int, _Page] = {}

    def append(self, batch: Batch, k: F32, v: F32) -> None:
        """Quantise and store k, v float32 [T, heads, head_dim] at the batch's positions."""
        k_int, dk = quantise(k, planes=2)
        v_int, dv = quantise(v, planes=2)
        for i, (position, s) in enumerate(
            zip(batch.positions.tolist(), batch.sequence.tolist(), strict=True)
        ):
            number = int(batch.pages[s, position // TILE])
            page = self._pages.setdefault(number, _Page(*self._shape))
            slot = position % TILE
            page.k[:, slot], page.dk[:, slot] = k_int[i], dk[i]
            page.v[:, slot], page.dv[:, slot] = v_int[i], dv[i]

    def read(
        self, pages: I32, n: int, head: int
    ) -> tuple[NDArray[np.int16], F32, NDArray[np.int16], F32]:
        """Keys, their scales, values, their scales of positions 0 … n-1 for one head."""
        used = [self._pages[int(p)] for p in pages[: -(-n // TILE)]]
        return (
            np.concatenate([p.k[head] for p in used])[:n],
            np.concatenate([p.dk[head] for p in used])[:n],
            np.concatenate([p.v[head] for p in used])[:n],
            np.concatenate([p.dv[head] for p in used])[:n],
        )
