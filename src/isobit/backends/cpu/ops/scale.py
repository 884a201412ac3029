"""Scale: see scale.cpp."""

from isobit.backends.cpu.lowering import Lowering
from isobit.backends.cpu.program import instruction
from isobit.model.graph import Op


def lower(to: Lowering, op: Op) -> None:
    """A row times a vector."""
    weight = op.weights[0].float32()
    x, y = to.read(op.inputs[0], op), to.place(op.outputs[0])
    made = instruction("scale", in_=[x], out=[y], vectors=[weight], integers=[weight.size])
    to.vectors(op, made)
