"""A shared expert's output, scaled by its gate, added to the others' sum."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    (z,), n = op.outputs, op.outputs[0].shape.width
    x, y, gate = (g.rows(v, width) for v, width in zip(op.inputs, (n, n, 1), strict=True))
    g.rowwise(
        "ops/gated_add",
        z.shape,
        n,
        (x.slot, y.slot, gate.slot, g.new(z)),
        lambda _: (n, x.first, x.stride, y.first, y.stride, gate.first, gate.stride),
    )
