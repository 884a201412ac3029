"""Embedding: see embedding.cpp."""

from isobit.backends.cpu.device.load import matrix
from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """A row of the table."""
    to.vectors(op, to.simple(op, matrices=[matrix(op.weights[0])]))
