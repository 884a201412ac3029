"""Residual sums."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(op: Op, g: Lowering) -> None:
    """A value an invocation."""
    (z,), n = op.outputs, op.outputs[0].shape.width
    x, y = (g.dense(v) for v in op.inputs)
    g.rowwise("ops/add_rows", z.shape, n, (x, y, g.new(z)), lambda _: (n,))
