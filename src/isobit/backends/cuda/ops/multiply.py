"""Products value by value."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    (z,) = op.outputs
    n, to = z.shape.row[-1], g.new(z)
    views = [g.view(v, n) for v in op.inputs]
    g.vectors("ops/multiply", z.shape, n, views, lambda _: (to.address,), z)
