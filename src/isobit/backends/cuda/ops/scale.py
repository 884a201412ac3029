"""Rows times a vector."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    (x,), (y,) = op.inputs, op.outputs
    n, to, s = y.shape.width, g.new(y), g.vector(op.weights[0])
    g.vectors("ops/scale", y.shape, n, [g.view(x, n)], lambda _: (s(), to.address), y)
