"""Heads: a view, nothing runs."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op
from isobit.numerics.ops import Heads


def lower(to: Lowering, op: Op) -> None:
    """Columns of another value."""
    assert isinstance(op.operation, Heads)
    to.view(op, op.operation.first, op.operation.step)
