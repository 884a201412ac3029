"""Products value by value."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    (z,), n = op.outputs, op.outputs[0].shape.row[-1]
    x, y = (g.rows(v, n) for v in op.inputs)
    g.rowwise(
        "ops/multiply",
        z.shape,
        n,
        (x.slot, y.slot, g.new(z)),
        lambda _: (n, x.first, x.stride, y.first, y.stride),
    )
