"""RoPE's cosines and sines by position, computed once for all passes."""

import numpy as np

from isobit.arrays import F32
from isobit.numerics import RopeTable

ROPE_STEP = 1024
"""Positions whose rows are computed at once."""


class RopeRows:
    """Those of one table, for as many positions as a pass has needed so far."""

    def __init__(self, table: RopeTable) -> None:
        self._table = table
        self._parts: tuple[F32, F32] = table.rows(0, 0)

    def upto(self, last: int) -> tuple[F32, F32]:
        """Cosines and sines of positions 0 … last (-1: none), and some beyond: float32 [positions,
        size / 2] each."""
        known, end = len(self._parts[0]), (last // ROPE_STEP + 1) * ROPE_STEP
        if known < end:
            cosines, sines = self._table.rows(known, end)
            self._parts = (
                np.concatenate([self._parts[0], cosines]),
                np.concatenate([self._parts[1], sines]),
            )
        return self._parts
