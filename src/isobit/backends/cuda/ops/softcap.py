"""Softcap."""

from isobit.backends.cuda.lowering import Lowering, anything
from isobit.model.graph import Op
from isobit.numerics.ops import Softcap

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value a thread."""
    assert isinstance(op.operation, Softcap)
    g.valuewise(op, op.operation.cap)
