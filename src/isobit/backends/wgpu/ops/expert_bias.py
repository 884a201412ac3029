"""The outputs of a token's experts, each plus its own vector."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    (y,), n = op.outputs, op.outputs[0].shape.row[-1]
    x, ids, biases = g.rows(op.inputs[0], n), g.dense(op.inputs[1]), g.values(op.weights[0])
    g.rowwise(
        "ops/expert_bias",
        y.shape,
        n,
        (x.slot, ids, biases, g.new(y)),
        lambda _: (n, x.first, x.stride),
    )
