"""Squared ReLU."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    g.valuewise(op)
