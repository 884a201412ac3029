"""Receive: see receive.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """The row that the batch brings for a token."""
    to.vectors(op, to.simple(op, integers=[op.outputs[0].shape.width]))
