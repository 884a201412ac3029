"""Bias: see bias.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """A row plus a vector."""
    weight = op.weights[0].float32()
    to.vectors(op, to.simple(op, vectors=[weight], integers=[weight.size]))
