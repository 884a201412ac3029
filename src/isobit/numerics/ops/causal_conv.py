"""Causal convolution, each channel by itself (docs/numerics.md, section 12)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape, require


@dataclass(frozen=True)
class CausalConv(Operation):
    """x [T, channels] and the weight [channels, taps], tap 0 the oldest: for each token the sum of
    the taps times the last ``taps`` rows of the sequence, oldest first, zeros before its start.

    The state is the rows that the next token needs: [taps - 1, channels], oldest first.
    """

    kind = "causal_conv"
    per_sequence = True

    def state(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        channels, taps = weights[0].shape
        return (Shape((taps - 1, channels)),)

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        require(f"channels of {weights[0].name}", weights[0].shape[0], inputs[0].width)
        return (Shape((inputs[0].width,), inputs[0].rows),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return self._run(weights[0].float32(), *inputs)

    def float64(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return self._run(weights[0].float32().astype(np.float64), *inputs)

    @staticmethod
    def _run(w: Array, x: Array, before: Array) -> Arrays:
        tokens, taps = len(x), w.shape[1]
        rows = np.concatenate([before, x.reshape(tokens, -1)]).astype(w.dtype)
        y = rows[:tokens] * w[:, 0]
        for i in range(1, taps):
            y = y + rows[i : tokens + i] * w[:, i]
        return y, rows[tokens:]
