"""The weighted sum of a token's experts."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    (z,), (k, n) = op.outputs, op.inputs[1].shape.row
    weights, y = (g.dense(v) for v in op.inputs)
    g.rowwise("ops/combine", z.shape, n, (weights, y, g.new(z)), lambda _: (n, k))
