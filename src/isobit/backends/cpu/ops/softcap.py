"""Softcap: see softcap.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op
from isobit.numerics.ops import Softcap


def lower(to: Lowering, op: Op) -> None:
    """Each value of a vector."""
    assert isinstance(op.operation, Softcap)
    length, cap = op.outputs[0].shape.row[-1], op.operation.cap
    to.vectors(op, to.simple(op, integers=[length], numbers=[cap]))
