"""Matrix products with the experts that ids choose."""

from isobit.backends.wgpu.lowering import Lowering, anything
from isobit.backends.wgpu.ops.matmul import multiply
from isobit.model.graph import Op

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """Each token's row, or each that it has for an id, through its expert."""
    x, ids = op.inputs
    multiply(g, g.matrix(op.weights), x, g.new(op.outputs[0]), ids)
