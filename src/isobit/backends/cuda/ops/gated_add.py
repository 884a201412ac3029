"""A shared expert's output, scaled by its gate, added to the routed sum."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    (z,), (x, y, gate) = op.outputs, op.inputs
    n, to, s = z.shape.row[-1], g.new(z), g.view(gate, 1)
    views = [g.view(x, n), g.view(y, n)]
    g.vectors("ops/gated_add", z.shape, n, views, lambda _: (*s()[:2], to.address), z)
