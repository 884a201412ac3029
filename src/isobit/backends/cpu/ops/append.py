"""Append: see append.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.program import instruction
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """A key and a value to their page."""
    ins = [to.read(v, op) for v in op.inputs]
    made = instruction("append", in_=ins, integers=[to.cache(op)])
    to.vectors(op, made, vectors=op.inputs[0].shape.row[0])
