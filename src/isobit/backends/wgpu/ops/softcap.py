"""Softcap."""

from isobit.backends.wgpu.lowering import Lowering, anything, bits
from isobit.model.graph import Op
from isobit.numerics.ops import Softcap

supports = anything


def lower(g: Lowering, op: Op) -> None:
    """A value an invocation."""
    assert isinstance(op.operation, Softcap)
    g.valuewise(op, bits(op.operation.cap))
