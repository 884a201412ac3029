"""Sigmoid gate: see sigmoid_gate.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """Heads, each times the sigmoid of its gate."""
    to.vectors(op, to.simple(op, integers=list(op.inputs[1].shape.row)))
