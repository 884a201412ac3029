"""RoPE: see rope.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op
from isobit.numerics.ops import Rope


def lower(to: Lowering, op: Op) -> None:
    """A head vector rotated."""
    assert isinstance(op.operation, Rope)
    table, size = to.table(op.operation.table), op.outputs[0].shape.row[-1]
    made = to.simple(op, integers=[table, size, int(op.operation.neighbours)])
    to.vectors(op, made)
