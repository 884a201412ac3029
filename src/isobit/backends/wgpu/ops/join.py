"""Head vectors, one behind the other in each head."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    (z,), n = op.outputs, op.outputs[0].shape.row[-1]
    (groups, a), (heads, b) = (v.shape.row for v in op.inputs)
    x, y = g.rows(op.inputs[0], a), g.rows(op.inputs[1], b)
    g.rowwise(
        "ops/join",
        z.shape,
        n,
        (x.slot, y.slot, g.new(z)),
        lambda _: (n, a, heads // groups, x.first, x.stride, y.first, y.stride),
    )
