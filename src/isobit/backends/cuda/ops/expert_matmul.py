"""Matrix products with the experts that ids choose."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.backends.cuda.ops.matmul import multiply
from isobit.backends.cuda.workspace import BufferView
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """Each token's row, or each that it has for an id, through its expert."""
    x, ids = op.inputs
    (y,), w = op.outputs, g.matrix(op.weights[0])
    to = BufferView(g.new(y), y.shape.width, w.rows)
    g.emit(multiply(g, [w], x, to, ids), y)
