"""Sigmoid."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    (x,), (y,) = op.inputs, op.outputs
    n, to = y.shape.row[-1], g.new(y)
    g.vectors("ops/sigmoid", y.shape, n, [g.view(x, n)], lambda _: (to.address,), y)
