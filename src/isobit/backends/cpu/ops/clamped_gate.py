"""Clamped gate: see clamped_gate.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op
from isobit.numerics.ops import ClampedGate


def lower(to: Lowering, op: Op) -> None:
    """The clamped SwiGLU of two vectors."""
    o, n = op.operation, op.outputs[0].shape.row[-1]
    assert isinstance(o, ClampedGate)
    to.vectors(op, to.simple(op, integers=[n], numbers=[o.limit, o.factor]))
