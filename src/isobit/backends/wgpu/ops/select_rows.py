"""The rows whose logits are wanted."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """As many of them as are computed at a time."""
    x, (y,) = op.inputs[0], op.outputs
    g.copy(g.rows(x, x.shape.width), y.shape, g.new(y), select=True)
