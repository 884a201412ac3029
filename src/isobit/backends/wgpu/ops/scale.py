"""Rows times a vector."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    (y,), n = op.outputs, op.outputs[0].shape.width
    x, at = g.rows(op.inputs[0], n), g.vector(op.weights[0])
    buffers = x.slot, g.vectors, g.new(y)
    g.rowwise("ops/scale", y.shape, n, buffers, lambda _: (n, x.first, x.stride, at))
