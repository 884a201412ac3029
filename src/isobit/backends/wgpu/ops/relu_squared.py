"""Squared ReLU."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    g.valuewise(op)
