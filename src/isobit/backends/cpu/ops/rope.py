"""RoPE: see rope.cpp."""

from isobit.backends.cpu.lower import Lowering
from isobit.model.graph import Op
from isobit.numerics.ops import Rope


def lower(to: Lowering, op: Op) -> None:
    """A head vector rotated."""
    assert isinstance(op.operation, Rope)
    to.vectors(
        op, to.simple(op, integers=[to.table(op.operation.table), op.outputs[0].shape.row[-1]])
    )
