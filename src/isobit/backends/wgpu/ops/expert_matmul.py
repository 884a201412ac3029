"""Matrix products with the experts that ids choose."""

from isobit.backends.wgpu.lowering import Lowering
from isobit.backends.wgpu.ops.matmul import multiply, supports
from isobit.model.graph import Op

__all__ = ["lower", "supports"]


def lower(g: Lowering, op: Op) -> None:
    """Each token's row, or each that it has for an id, through its expert."""
    x, ids = op.inputs
    multiply(g, g.matrix(op.weights), x, g.new(op.outputs[0]), ids)
