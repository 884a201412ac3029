"""Residual sums."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    (z,), n = op.outputs, op.outputs[0].shape.width
    x, y = (g.dense(v) for v in op.inputs)
    g.rowwise("ops/add.add_rows", z.shape, n, (x, y, g.new(z)), lambda _: (n,))
