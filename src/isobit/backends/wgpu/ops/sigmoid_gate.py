"""A value times the logistic function of its gate."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    (y,), n = op.outputs, op.inputs[1].shape.row[-1]
    x, gate = (g.rows(v, n) for v in op.inputs)
    g.rowwise(
        "ops/sigmoid_gate",
        y.shape,
        n,
        (x.slot, gate.slot, g.new(y)),
        lambda _: (n, x.first, x.stride, gate.first, gate.stride),
    )
