"""The logistic function."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    (y,), n = op.outputs, op.outputs[0].shape.row[-1]
    x = g.rows(op.inputs[0], n)
    g.rowwise("ops/sigmoid", y.shape, n, (x.slot, g.new(y)), lambda _: (n, x.first, x.stride))
