"""GeGLU."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    (y,), n = op.outputs, op.outputs[0].shape.row[-1]
    to = g.new(y)
    views = [g.view(v, n) for v in op.inputs]
    g.vectors("ops/gelu_gate", y.shape, n, views, lambda _: (to.address,), y)
