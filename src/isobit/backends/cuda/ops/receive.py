"""Rows that another part of the model has computed."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """No launch: they come with the batch."""
    g.received.append(g.new(op.outputs[0]))
