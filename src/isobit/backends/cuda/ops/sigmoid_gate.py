"""Attention's output gate."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread, head by head."""
    (z,), n = op.outputs, op.inputs[1].shape.row[-1]
    to = g.new(z)
    views = [g.view(v, n) for v in op.inputs]
    g.vectors("ops/sigmoid_gate", z.shape, n, views, lambda _: (to.address,), z)
