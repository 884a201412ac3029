"""The outputs of a token's experts, each times its own number."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    (y,), n = op.outputs, op.outputs[0].shape.row[-1]
    x, ids, at = g.rows(op.inputs[0], n), g.dense(op.inputs[1]), g.vector(op.weights[0])
    g.rowwise(
        "ops/expert_scale",
        y.shape,
        n,
        (x.slot, ids, g.vectors, g.new(y)),
        lambda _: (n, x.first, x.stride, at),
    )
