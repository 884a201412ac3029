"""Receive: rows that another part of a model has computed. Moves values, computes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import Array, Arrays, Context, Operation, Shape


@dataclass(frozen=True)
class Receive(Operation):
    """A row for each of the batch's tokens, as the batch brings them: [T, width]."""

    width: int
    kind = "receive"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return (Shape((self.width,)),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        assert run.received is not None, "a batch that brings rows"
        return (run.received,)

    float64 = specification
