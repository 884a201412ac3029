"""How much of a delta net's state a token keeps, as a logarithm."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    (x,), (y,) = op.inputs, op.outputs
    n, to = y.shape.width, g.new(y)
    dt, a = (g.vector(w) for w in op.weights)
    g.vectors("ops/decay", y.shape, n, [g.view(x, n)], lambda _: (dt(), a(), to.address), y)
