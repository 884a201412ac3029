"""Matrix products with the experts that ids choose."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.backends.cuda.ops.matmul import multiply
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """Each token's row, or each that it has for an id, through its expert."""
    x, ids = op.inputs
    g.emit(multiply(g, [g.matrix(op.weights[0])], x, g.new(op.outputs[0]), ids), op.outputs[0])
