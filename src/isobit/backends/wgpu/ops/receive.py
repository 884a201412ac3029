"""Rows that another part of the model has computed."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """No step: the backend writes them."""
    g.received.append(g.written(op.outputs[0]))
