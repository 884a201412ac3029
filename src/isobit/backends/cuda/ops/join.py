"""Head vectors, one behind the other in each head."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread, head by head."""
    (x, y), (z,) = op.inputs, op.outputs
    (groups, a), (heads, b), to = x.shape.row, y.shape.row, g.new(z)
    views = [g.view(x, a), g.view(y, b)]
    each = heads // groups
    g.vectors("ops/join", z.shape, a + b, views, lambda _: (a, each, to.address), z)
