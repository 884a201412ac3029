"""GELU gate: see gelu_gate.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """GELU of one vector times another."""
    to.vectors(op, to.simple(op, integers=[op.outputs[0].shape.row[-1]]))
