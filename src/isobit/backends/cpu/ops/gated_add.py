"""Gated add: see gated_add.simd.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """A vector plus another times a sigmoid."""
    to.vectors(op, to.simple(op, integers=[op.outputs[0].shape.row[-1]]))
