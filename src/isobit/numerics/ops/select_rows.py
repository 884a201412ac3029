"""Select rows: the tokens whose logits are wanted. Moves values, computes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from isobit.numerics.matmul import Weight
from isobit.numerics.ops.base import LOGIT_ROWS, Array, Arrays, Context, Operation, Shape


@dataclass(frozen=True)
class SelectRows(Operation):
    """x [T, …] and rows int32 [R]: x[rows]. What is done row by row may as well come after it."""

    kind = "select_rows"

    def shapes(self, inputs: Sequence[Shape], weights: Sequence[Weight]) -> tuple[Shape, ...]:
        """See :class:`Operation`."""
        return (Shape(inputs[0].row, LOGIT_ROWS, inputs[0].dtype),)

    def specification(self, run: Context, weights: Sequence[Weight], *inputs: Array) -> Arrays:
        """See :class:`Operation`."""
        return (inputs[0][inputs[1]],)

    float64 = specification
