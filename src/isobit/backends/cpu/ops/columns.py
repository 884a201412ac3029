"""Columns: a view, nothing runs."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op
from isobit.numerics.ops import Columns


def lower(to: Lowering, op: Op) -> None:
    """Columns of another value."""
    assert isinstance(op.operation, Columns)
    to.view(op, op.operation.first, 0)
