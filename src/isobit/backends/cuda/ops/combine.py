"""The weighted sum of a token's experts."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.backends.cuda.workspace import Pass
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A token a block."""
    (z,), (k, n) = op.outputs, op.inputs[1].shape.row
    weights, y = (g.dense(v) for v in op.inputs)
    to, exchange = g.target(z)

    def make(p: Pass) -> None:
        arguments = (weights.address, y.address, k, n, to.address, to.stride)
        g.launch("ops/combine", (p.tokens,), (*arguments, exchange.arguments[0]), exchange.defines)

    g.emit(make, z)
