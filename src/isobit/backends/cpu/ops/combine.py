"""Combine: see combine.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """The weighted sum of a token's experts."""
    to.dense(op.inputs[1], op)
    to.vectors(op, to.simple(op, integers=list(op.inputs[1].shape.row)))
